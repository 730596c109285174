"""FlashCore for CuPy: fused attention for CuPy arrays, compiled on your machine at first call.

>>> import cupy, flashcore_cupy
>>> o = flashcore_cupy.attention(q, k, v, causal=True)
"""

from __future__ import annotations

from flashcore_cupy._version import __version__
from flashcore_cupy.attention import attention, explain
from flashcore_cupy.backward import attention_backward, explain_backward
from flashcore_cupy.block_masks import block_mask
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.gradients import Gradients
from flashcore_cupy.problem.rng import dropout_mask
from flashcore_cupy.select.registry import KERNELS

__all__ = [
    "KERNELS",
    "BlockMask",
    "Gradients",
    "__version__",
    "attention",
    "attention_backward",
    "block_mask",
    "dropout_mask",
    "explain",
    "explain_backward",
]


def __dir__() -> list[str]:
    return sorted(__all__)
