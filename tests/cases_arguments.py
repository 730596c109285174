"""Small operands of every size apart, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flashcore_cupy

attention = flashcore_cupy.attention

B, HQ, HKV, SQ, SKV, D, DV = 2, 4, 2, 9, 14, 16, 8


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def operands(dtype: Any = np.float16) -> list[np.ndarray]:
    """q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv)."""
    shapes = (B, HQ, SQ, D), (B, HKV, SKV, D), (B, HKV, SKV, DV)
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def ones(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def refusal(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- slopes and sinks of other dtypes, and in lists -----------------------------------------------

SLOPES = np.array([0.5, 0.25, 2.0, 1.0], np.float32)
