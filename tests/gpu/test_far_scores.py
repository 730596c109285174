"""Scores of any size that float32 holds, with every kernel."""

from __future__ import annotations

from typing import Any

import pytest
from cases_far_scores import *  # noqa: F403
from cases_far_scores import EQUAL, SCALED, levels, operands

from flashcore_cupy.check import verify


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_of_e4m3_far_from_zero(dtype: str) -> None:
    """Against what the quantiser left: its scale per head makes scores of any size."""
    import cupy

    from flashcore_cupy.attention import plan

    def judge(q: Any, k: Any, v: Any, **rules: Any) -> None:
        device = [cupy.asarray(x) for x in (q, k, v)]
        bound = plan(*device, kernel="fp8_wmma", return_lse=True, **rules)
        bound.launch()
        result = verify.check_plan(bound, q, k, v)
        assert result.ok, result.reason

    for size in ("few blocks", "enough"):
        q, k, v = operands(size, dtype)
        for a, b, scale in (*EQUAL[dtype], *SCALED):
            q[..., 3], k[..., 3] = a, b
            judge(q, k, v, softmax_scale=scale)
        for scale in (1e4, 1e10, 8e37):
            judge(*levels(size, dtype), softmax_scale=scale)
