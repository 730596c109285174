"""The ladder: every kernel by its name, slowest first, and which of them "auto" tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The one target that has wgmma.
HOPPER = "sm_90a"


@dataclass(frozen=True)
class Kernel:
    """A rung of the ladder: a name that ``kernel=`` and ``--kernel`` take."""

    name: str
    source: str
    entries: tuple[str, ...]
    """Entry points, in launch order."""
    idea: str
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    quantizes: bool = False
    """Rounds its inputs to fp8 first, so ``auto`` never takes it."""
    has_rules: bool = False
    """Windows, score rules, masks, sinks, packed batches; the others are causal or not."""
    tma: bool = False
    """Loads by TMA and multiplies by wgmma: for ``HOPPER`` alone."""


#: The ladder, slowest first.
KERNELS: Mapping[str, Kernel] = {
    k.name: k
    for k in (
        Kernel(
            "scalar",
            "ladder/scalar.cu",
            ("scalar",),
            "one fused kernel, online softmax, no tensor cores",
            dtypes=("float16", "bfloat16", "float32"),
        ),
        Kernel(
            "wmma_unfused",
            "ladder/wmma_unfused.cu",
            ("wmma_scores", "wmma_softmax", "wmma_pv"),
            "two tensor-core products with a softmax between, S and P in global memory",
        ),
        Kernel(
            "wmma_fused_32",
            "ladder/wmma_fused.cu",
            ("wmma_fused",),
            "FlashAttention in one kernel: 32 x 32 tiles, S and P in shared memory",
        ),
        Kernel(
            "wmma_fused_64",
            "ladder/wmma_fused.cu",
            ("wmma_fused",),
            "64 x 64 tiles: each K and V row is loaded half as often",
        ),
        Kernel(
            "wmma_cp_async",
            "ladder/wmma_fused.cu",
            ("wmma_fused",),
            "two stages: the next K and V tile is on its way while this one is used",
        ),
        Kernel(
            "wmma_warp_softmax",
            "ladder/wmma_fused.cu",
            ("wmma_fused",),
            "a warp owns its rows: softmax by shuffle, O in registers, one barrier per tile",
        ),
        Kernel(
            "mma_sm80",
            "fwd_sm80.cu",
            ("fwd_sm80",),
            "mma.sync and ldmatrix: scores, probabilities and output stay in registers",
            dtypes=("float16", "bfloat16", "float32"),
            has_rules=True,
        ),
        Kernel(
            "wgmma_sm90",
            "fwd_sm90.cu",
            ("fwd_sm90",),
            "TMA and wgmma: a warp that loads, warpgroups that overlap softmax with products",
            has_rules=True,
            tma=True,
        ),
        Kernel(
            "fp8_wmma",
            "ladder/wmma_fused.cu",
            ("wmma_fused",),
            "q, k, v quantised to e4m3 with a scale per head, widened to 16 bit on load",
            quantizes=True,
        ),
    )
}

#: What ``kernel="auto"`` tries, fastest first.
AUTO_ORDER = (
    "wgmma_sm90",
    "mma_sm80",
    "wmma_warp_softmax",
    "wmma_cp_async",
    "wmma_fused_64",
    "wmma_fused_32",
    "scalar",
)
