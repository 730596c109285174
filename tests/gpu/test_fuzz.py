"""Random problems on a GPU."""

from __future__ import annotations

from fuzz import run


def test_gpu() -> None:
    run(100, on_gpu=True, derandomize=True)
