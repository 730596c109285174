"""Random problems by the fastest kernels."""

from __future__ import annotations

from fuzz import run
from places import Place


def test_problems_at_random(on: Place) -> None:
    run(10 if on.is_emulated else 100, on, derandomize=True)
