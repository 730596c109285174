"""Scores of any size that float32 holds, with every kernel."""

from __future__ import annotations

import numpy as np
import pytest
from cases_far_scores import *  # noqa: F403
from cases_far_scores import EQUAL, SCALED, Place, levels, operands

from flashcore_cupy.check import verify


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_of_e4m3_far_from_zero(on: Place, dtype: str) -> None:
    """Against what the quantiser left: its scale per head makes scores of any size."""
    on = on.by("fp8_wmma")

    def judge(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None) -> None:
        bound = on.launched(q, k, v, return_lse=True, softmax_scale=scale)
        result = verify.check_plan(bound, q, k, v)
        assert result.ok, result.reason

    for size in ("few blocks", "enough"):
        q, k, v = operands(on, size, dtype)
        for a, b, scale in on.few(*EQUAL[dtype], *SCALED):
            q[..., 3], k[..., 3] = a, b
            judge(q, k, v, scale)
        for scale in on.few(1e4, 1e10, 8e37):
            judge(*levels(on, size, dtype), scale)
