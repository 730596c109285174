"""What tests of the NumPy attention share: operands, small tiles, the judgement by the oracle."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from flashcore_cupy.cpu import reference, tiled_attention
from flashcore_cupy.cpu.reference import Comparison, compare, make_inputs, naive, oracle, tiled

FLOAT16, BFLOAT16, FLOAT32 = (np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32))
DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
CAUSAL = (False, True, "top-left")

# The same examples in every run, so that a failure is the code's.
repeatable = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def tiles(block_m: int, block_n: int) -> Any:
    """Context in which the tiled attention takes these tiles, so that few keys make many."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tiled_attention, "BLOCK_M", block_m)
    patch.setattr(tiled_attention, "BLOCK_N", block_n)
    return _Undo(patch)


class _Undo:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def largest_score(q: Any, k: Any, v: Any, **rules: Any) -> float:
    """Return the largest |score|, at least 1."""
    scores = reference.gate_scores(q, k, v, **rules)
    return float(np.abs(scores[np.isfinite(scores)]).max(initial=1.0))


def judge(q: Any, k: Any, v: Any, **rules: Any) -> Comparison:
    """Compare tiled with oracle, o by the acceptance rule and lse closely; return o's outcome."""
    o, lse = tiled(q, k, v, **rules)
    assert o.dtype == q.dtype and lse.dtype == np.float32
    expected, expected_lse = oracle(q, k, v, **rules)
    noise = 2e-6 * largest_score(q, k, v, **rules) + 1e-6
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=noise)
    return compare(o, expected, naive(q, k, v, **rules))


def normal(dtype: Any = np.float32, **sizes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N(0, 1) operands: by default B = 1, H = 2, S = 100, D = 32."""
    given = {"batch": 1, "heads": 2, "seqlen": 100, "head_dim": 32} | sizes
    return make_inputs("normal", dtype=dtype, **given)


STRIDES = ("contiguous", "bshd", "padded", "every second", "reversed", "last axis first")


def strided(x: np.ndarray, how: str) -> np.ndarray:
    """Return a view equal to x that lies `how` in a buffer that is NaN everywhere else."""
    order = {"bshd": (0, 2, 1, 3), "last axis first": (3, 0, 1, 2)}.get(how, (0, 1, 2, 3))
    step = 2 if how == "every second" else 1
    margin = 0 if how == "contiguous" else 3
    sizes = [x.shape[axis] for axis in order]
    buffer = np.full([n * step + 2 * margin for n in sizes], np.nan, x.dtype)
    view = buffer[tuple(slice(margin, margin + n * step, step) for n in sizes)]
    view = view.transpose(np.argsort(order))
    if how == "reversed":
        view = view[:, :, ::-1, ::-1]
    view[...] = x
    return view
