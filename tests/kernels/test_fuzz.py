"""Random problems by the fastest kernels, and by those of the backward pass."""

from __future__ import annotations

import fuzz_backward
import pytest
from fuzz import run
from places import Place


def test_problems_at_random(on: Place) -> None:
    run(10 if on.is_emulated else 100, on, derandomize=True)


@pytest.mark.parametrize("part", range(6))
def test_backward_problems_at_random(on: Place, part: int) -> None:
    count = 2 if on.is_emulated else 10
    failed = fuzz_backward.run(range(part * count, (part + 1) * count), on)
    assert not failed, "\n".join(failed)
