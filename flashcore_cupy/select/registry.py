"""All kernels by name, slowest first, and which of them "auto" tries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.ladder import Fused, Quantized, Scalar, Unfused
from flashcore_cupy.select.sm80 import Sm80
from flashcore_cupy.select.sm90 import Sm90
from flashcore_cupy.select.sm90_cluster import Sm90Cluster

_SIXTEEN_BIT = ("float16", "bfloat16")
_ALL = (*_SIXTEEN_BIT, "float32")


@dataclass(frozen=True)
class Kernel:
    """A rung of the ladder: a name that ``kernel=`` and ``--kernel`` take."""

    name: str
    family: type[KernelConfig]
    """Its class of configurations, which answers for it."""
    dtypes: tuple[str, ...]
    idea: str

    @property
    def source(self) -> str:
        """File in ``kernels/``."""
        return self.family.source

    @property
    def entries(self) -> tuple[str, ...]:
        """Entry points, in launch order."""
        return self.family.entries

    def runs_on(self, arch: str) -> bool:
        """Whether a target has what every tile of the kernel needs."""
        return self.family.why_not_on(arch) is None

    @property
    def quantizes(self) -> bool:
        """Whether it rounds its inputs to fp8 first; ``auto`` never takes it then."""
        return self.family.quantizes

    @property
    def has_maps(self) -> bool:
        """Whether it takes tensor maps, which the driver encodes."""
        return "q_map" in (self.family.params.names or ())

    @property
    def has_rules(self) -> bool:
        """Windows, score rules, masks, sinks, packed batches; the others are causal or not."""
        return self.family.has_rules


#: The ladder, slowest first.
KERNELS: Mapping[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("scalar", Scalar, _ALL, "one fused kernel, online softmax, no tensor cores"),
        Kernel(
            *("wmma_unfused", Unfused, _SIXTEEN_BIT),
            idea="two tensor-core products with a softmax between, S and P in global memory",
        ),
        Kernel(
            *("wmma_fused_32", Fused, _SIXTEEN_BIT),
            idea="FlashAttention in one kernel: 32 x 32 tiles, S and P in shared memory",
        ),
        Kernel(
            *("wmma_fused_64", Fused, _SIXTEEN_BIT),
            idea="64 x 64 tiles: each K and V row is loaded half as often",
        ),
        Kernel(
            *("wmma_cp_async", Fused, _SIXTEEN_BIT),
            idea="two stages: the next K and V tile is on its way while this one is used",
        ),
        Kernel(
            *("wmma_warp_softmax", Fused, _SIXTEEN_BIT),
            idea="a warp owns its rows: softmax by shuffle, O in registers, one barrier per tile",
        ),
        Kernel(
            *("mma_sm80", Sm80, _ALL),
            idea="mma.sync and ldmatrix: scores, probabilities and output stay in registers",
        ),
        Kernel(
            *("wgmma_sm90", Sm90, _SIXTEEN_BIT),
            idea="TMA and wgmma: a warp that loads, warpgroups that overlap softmax with products",
        ),
        Kernel(
            *("cluster_sm90", Sm90Cluster, _SIXTEEN_BIT),
            idea="few queries and keys: all loaded at once, warpgroups of a cluster share the keys",
        ),
        Kernel(
            *("fp8_wmma", Quantized, _SIXTEEN_BIT),
            idea="q, k, v quantised to e4m3 with a scale per head, widened to 16 bit on load",
        ),
    )
}

#: What ``kernel="auto"`` tries, fastest first.
AUTO_ORDER = (
    "cluster_sm90",
    "wgmma_sm90",
    "mma_sm80",
    "wmma_warp_softmax",
    "wmma_cp_async",
    "wmma_fused_64",
    "wmma_fused_32",
    "scalar",
)
