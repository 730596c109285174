"""THE table: which tile a kernel uses for which head dim, and which kernel a problem gets.

To add a head dim or a tile, add a ``Row``; compile checks, tests, ``warmup`` and the ladder iterate
over ``ROWS``. Times in the comments: one H200, B=4 H=16 S=2048 D=64 float16, a replayed graph.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flashcore_cupy.config import KernelConfig, Tile, check_overrides
from flashcore_cupy.problem import ITEMSIZE, MAX_HEAD_DIM, AttentionProblem, check_choice


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


@dataclass(frozen=True)
class Row:
    """A tile, for heads of up to ``head_dim`` columns."""

    kernel: str
    head_dim: int
    tile: Tile
    max_blocks: int | None = None
    """Only for grids that would hold at most this many blocks of 128 queries."""
    max_arch: int | None = None
    """Only up to this compute capability: for newer ones the compiler spills."""

    def serves(self, problem: AttentionProblem) -> bool:
        """Whether the row is meant for a grid of this size."""
        blocks = problem.batch * problem.heads_q * -(-problem.seqlen_q // 128)
        return self.max_blocks is None or blocks <= self.max_blocks


#: The ladder, slowest first.
KERNELS: Mapping[str, Kernel] = {
    k.name: k
    for k in (
        Kernel(
            "scalar",
            "scalar.cu",
            ("scalar",),
            "one fused kernel, online softmax, no tensor cores",
            dtypes=("float16", "bfloat16", "float32"),
        ),
        Kernel(
            "wmma_unfused",
            "wmma_unfused.cu",
            ("wmma_scores", "wmma_softmax", "wmma_pv"),
            "two tensor-core products with a softmax between, S and P in global memory",
        ),
        Kernel(
            "wmma_fused_32",
            "wmma_fused.cu",
            ("wmma_fused",),
            "FlashAttention in one kernel: 32 x 32 tiles, S and P in shared memory",
        ),
        Kernel(
            "wmma_fused_64",
            "wmma_fused.cu",
            ("wmma_fused",),
            "64 x 64 tiles: each K and V row is loaded half as often",
        ),
        Kernel(
            "wmma_cp_async",
            "wmma_fused.cu",
            ("wmma_fused",),
            "two stages: the next K and V tile is on its way while this one is used",
        ),
        Kernel(
            "wmma_warp_softmax",
            "wmma_fused.cu",
            ("wmma_fused",),
            "a warp owns its rows: softmax by shuffle, O in registers, one barrier per tile",
        ),
        Kernel(
            "mma_sm80",
            "fwd_sm80.cu",
            ("fwd_sm80",),
            "mma.sync and ldmatrix: scores, probabilities and output stay in registers",
        ),
        Kernel(
            "fp8_wmma",
            "wmma_fused.cu",
            ("wmma_fused",),
            "q, k, v quantised to e4m3 with a scale per head, widened to 16 bit on load",
            quantizes=True,
        ),
    )
}

#: Head dims with rows of their own in the WMMA kernels; others are padded to the next one.
WMMA_HEAD_DIMS = (32, 64, 80, 96, 128)
#: Those of the mma.sync kernel.
MMA_HEAD_DIMS = (*WMMA_HEAD_DIMS, 192, 256)

_UNFUSED = Tile(128, 64, warps_m=4, warps_n=4, num_stages=2, cp_async=True)
_FUSED_32 = Tile(32, 32, warps_m=2, warps_n=2, min_blocks=5)
_FUSED_64 = Tile(64, 64, warps_m=4, warps_n=2)
_CP_ASYNC = Tile(64, 64, warps_m=4, warps_n=2, num_stages=2, cp_async=True)
_WARP = Tile(64, 64, warps_m=4, num_stages=2, cp_async=True, warp_softmax=True, min_blocks=3)
_MMA = Tile(128, 64, warps_m=4, num_stages=2, cp_async=True)
# Short of queries, a GPU is filled by small blocks whose warps share out the keys.
_FEW = Tile(32, 128, warps_m=2, warps_n=2, num_stages=2, cp_async=True)
_FEW_BLOCKS = 40
_SOME = Tile(64, 128, warps_m=4, warps_n=2, num_stages=2, cp_async=True)
_SOME_BLOCKS = 100
_FP8 = Tile(64, 64, warps_m=4, num_stages=2, warp_softmax=True, fp8=True)

#: In order of preference: a problem gets the first row of its kernel and head dim that is meant for
#: its grid (``max_blocks``) and for the target (``max_arch``), and fits the target's shared memory.
ROWS: tuple[Row, ...] = (
    # 5597 us. Half the queries per block where the accumulators of 256 columns need the registers.
    Row("scalar", 128, Tile(16, 32, warps_m=4)),
    Row("scalar", MAX_HEAD_DIM, Tile(8, 32, warps_m=4)),
    # 1651 us; 64 queries per block 1959, 256 queries 2152.
    *(Row("wmma_unfused", d, _UNFUSED) for d in WMMA_HEAD_DIMS),
    *(Row("wmma_unfused", d, replace(_UNFUSED, block_m=64)) for d in (80, 96, 128)),
    # 1154 us; bounded to five blocks' worth of registers, 96 and fewer.
    *(Row("wmma_fused_32", d, _FUSED_32) for d in WMMA_HEAD_DIMS),
    # 837 us with 8 warps as 4 x 2; 4 warps 1045, 2 x 4 869, 16 warps 1228.
    *(Row("wmma_fused_64", d, _FUSED_64) for d in WMMA_HEAD_DIMS),
    # 800 us with 128 keys per tile, 818 with 64.
    *(Row("wmma_cp_async", d, replace(_CP_ASYNC, block_n=128)) for d in (32, 64)),
    *(Row("wmma_cp_async", d, _CP_ASYNC) for d in WMMA_HEAD_DIMS),
    *(Row("wmma_cp_async", d, replace(_CP_ASYNC, block_n=32)) for d in (96, 128)),
    # 425 us bounded to three blocks' worth of registers, 477 unbounded.
    *(Row("wmma_warp_softmax", d, _WARP) for d in (32, 64, 80)),
    # Two blocks are all that shared memory holds; a third one's worth of registers would spill.
    *(Row("wmma_warp_softmax", d, replace(_WARP, min_blocks=2)) for d in (96, 128)),
    Row("wmma_warp_softmax", 128, replace(_WARP, block_n=32)),
    # B=1 H=8 S=512 D=64: 8.7 us with 8 warps on tiles of 256 keys, 9.1 with 4 on 128.
    *(Row("mma_sm80", d, replace(_FEW, block_n=256, warps_n=4), _FEW_BLOCKS) for d in (32, 64)),
    *(Row("mma_sm80", d, _FEW, _FEW_BLOCKS) for d in MMA_HEAD_DIMS[:5]),
    *(Row("mma_sm80", d, replace(_FEW, block_n=64), _FEW_BLOCKS) for d in MMA_HEAD_DIMS[3:]),
    *(Row("mma_sm80", d, replace(_FEW, block_n=32), _FEW_BLOCKS) for d in (192, 256)),
    *(Row("mma_sm80", d, _SOME, _SOME_BLOCKS) for d in WMMA_HEAD_DIMS),
    # As many keys as registers hold beside 32 queries per warp: a 16-row warp reads K and V from
    # shared memory twice as often (D=128 B=4 S=4096: 2574 us with 8 warps, 1809 with 4).
    *(Row("mma_sm80", d, replace(_MMA, block_n=n)) for d, n in ((32, 128), (64, 112), (80, 64))),
    Row("mma_sm80", 96, _MMA),
    Row("mma_sm80", 128, replace(_MMA, block_n=48), max_arch=90),
    Row("mma_sm80", 128, replace(_MMA, block_n=32)),
    *(Row("mma_sm80", d, replace(_MMA, warps_m=8)) for d in (192, 256)),
    *(Row("mma_sm80", d, replace(_MMA, block_m=64, block_n=32)) for d in (192, 256)),
    # 569 us with two stages, 647 with one.
    *(Row("fp8_wmma", d, _FP8) for d in WMMA_HEAD_DIMS),
    *(Row("fp8_wmma", d, replace(_FP8, block_n=32)) for d in (80, 96, 128)),
)

#: What ``kernel="auto"`` tries, fastest first.
AUTO_ORDER = (
    "mma_sm80",
    "wmma_warp_softmax",
    "wmma_cp_async",
    "wmma_fused_64",
    "wmma_fused_32",
    "scalar",
)

#: The quantiser that runs ahead of fp8_wmma: one block per head.
QUANTIZE_TILE = Tile(16, 16, warps_m=32)

#: Shared memory that one thread block may have, bytes (CUDA C++ Programming Guide, "Compute
#: Capabilities", table of technical specifications).
_KIB = 1024
_SMEM_LIMIT = {
    75: 64 * _KIB,
    80: 163 * _KIB,
    86: 99 * _KIB,
    87: 163 * _KIB,
    88: 163 * _KIB,
    89: 99 * _KIB,
    90: 227 * _KIB,
    100: 227 * _KIB,
    103: 227 * _KIB,
    110: 227 * _KIB,
    120: 99 * _KIB,
    121: 99 * _KIB,
}

#: Targets that every row is built for by the tests and by ``warmup --all``.
TARGETS = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")


@dataclass(frozen=True)
class Selection:
    """The kernel that a problem gets on a target, and why the faster ones were passed over."""

    kernel: Kernel
    config: KernelConfig
    passed_over: tuple[tuple[str, str], ...] = ()


def capability(arch: str) -> int:
    """90 for "sm_90a"."""
    digits = "".join(c for c in arch.partition("_")[2] if c.isdigit())
    if not digits:
        raise ValueError(f"arch: got {arch!r}; use a target such as 'sm_90a'")
    return int(digits)


def smem_limit(arch: str) -> int:
    """Bytes of shared memory that a thread block may have on ``arch``; 48 KiB where unknown."""
    return _SMEM_LIMIT.get(capability(arch), 48 * _KIB)


def rows_of(kernel: str) -> list[Row]:
    """The rows of a kernel, in order of preference."""
    return [row for row in ROWS if row.kernel == kernel]


def configure(
    problem: AttentionProblem,
    kernel: Kernel,
    arch: str,
    overrides: Mapping[str, object] | None = None,
) -> KernelConfig:
    """The kernel's configuration for a problem; ``ValueError`` says why there is none."""
    if problem.dtype not in kernel.dtypes:
        raise ValueError(f"takes {' and '.join(kernel.dtypes)}, not {problem.dtype}")
    columns = max(problem.head_dim, problem.head_dim_v)
    wide = [row.head_dim for row in rows_of(kernel.name) if row.head_dim >= columns]
    if not wide:
        most = max(row.head_dim for row in rows_of(kernel.name))
        raise ValueError(f"takes head dims up to {most}, not {columns}")
    reasons = []
    for row in rows_of(kernel.name):
        if row.head_dim == min(wide) and row.serves(problem):
            try:
                return check_target(row, configure_row(row, problem, overrides), arch)
            except ValueError as error:
                reasons.append(str(error))
    raise ValueError(reasons[0])


def configure_row(
    row: Row, problem: AttentionProblem, overrides: Mapping[str, object] | None = None
) -> KernelConfig:
    """Join a row with a problem, for any target; ``ValueError`` says what is wrong with a tile."""
    kernel = KERNELS[row.kernel]
    scalar = kernel.source == "scalar.cu"
    config = KernelConfig(
        kernel=kernel.name,
        source=kernel.source,
        dtype=problem.dtype,
        head_dim=max(problem.head_dim, problem.head_dim_v) if scalar else row.head_dim,
        dim_qk=problem.head_dim,
        dim_v=problem.head_dim_v,
        tile=row.tile.override(overrides or {}),
        causal=bool(problem.causal),
        gate=problem.gate,
        # scalar reads element by element: one build serves every alignment.
        align_bytes=ITEMSIZE[problem.dtype] if scalar else problem.align_bytes,
    )
    config.check()
    return config


def check_target(row: Row, config: KernelConfig, arch: str) -> KernelConfig:
    """Return the row's configuration; ``ValueError`` says what of it the target lacks."""
    if row.max_arch is not None and capability(arch) > row.max_arch:
        raise ValueError(f"has a row up to sm_{row.max_arch} alone, the target is {arch}")
    _check_instructions(config, arch)
    if config.smem_bytes > smem_limit(arch):
        columns = max(config.dim_qk, config.dim_v)
        raise ValueError(
            f"needs {config.smem_bytes} bytes of shared memory at head dim {columns}, "
            f"{arch} has {smem_limit(arch)}; smaller tiles (block_m, block_n, num_stages) may fit"
        )
    return config


def _check_instructions(config: KernelConfig, arch: str) -> None:
    """Raise ``ValueError`` if the target lacks instructions that the configuration uses."""
    needs = None
    if config.tile.cp_async:
        needs = "cp.async"
    elif config.dtype == "bfloat16":
        needs = "bfloat16 conversions"
    if needs and capability(arch) < 80:
        raise ValueError(f"needs {needs}, hence sm_80 or later; the target is {arch}")


def quantize_config(config: KernelConfig) -> KernelConfig:
    """The quantiser's configuration that goes with an fp8 kernel's."""
    return KernelConfig(
        kernel=config.kernel,
        source="fp8_quantize.cu",
        dtype=config.dtype,
        head_dim=config.head_dim,
        dim_qk=config.dim_qk,
        dim_v=config.dim_v,
        tile=QUANTIZE_TILE,
        align_bytes=config.align_bytes,
    )


def configs_of(selection: Selection) -> tuple[KernelConfig, ...]:
    """Every configuration that a selected kernel launches, in launch order."""
    if selection.kernel.quantizes:
        return quantize_config(selection.config), selection.config
    return (selection.config,)


def select(
    problem: AttentionProblem,
    arch: str,
    *,
    kernel: str = "auto",
    overrides: Mapping[str, object] | None = None,
) -> Selection:
    """The kernel for a problem on a target.

    ``kernel`` names one, or is "auto" for the fastest that can do it. Raises ``ValueError`` with
    the reason if there is none.
    """
    check_choice("kernel", kernel, ("auto", *KERNELS))
    changes = check_overrides(overrides or {})
    return _select(problem, arch, kernel, tuple(changes.items()))


@functools.lru_cache(maxsize=4096)
def _select(
    problem: AttentionProblem, arch: str, kernel: str, changes: tuple[tuple[str, int | bool], ...]
) -> Selection:
    if kernel == "auto":
        fastest = _fastest(problem, arch)
        if not changes:
            return fastest
        passed_over, kernel = fastest.passed_over, fastest.kernel.name
    else:
        passed_over = ()
    try:
        config = configure(problem, KERNELS[kernel], arch, dict(changes))
    except ValueError as error:
        raise ValueError(f"kernel {kernel!r}: {error}") from None
    return Selection(KERNELS[kernel], config, passed_over)


def _fastest(problem: AttentionProblem, arch: str) -> Selection:
    passed_over: list[tuple[str, str]] = []
    for name in AUTO_ORDER:
        try:
            config = configure(problem, KERNELS[name], arch)
        except ValueError as error:
            passed_over.append((name, str(error)))
        else:
            return Selection(KERNELS[name], config, tuple(passed_over))
    reasons = "; ".join(f"{name} {why}" for name, why in passed_over)
    raise ValueError(f"kernel: none can do this problem on {arch}: {reasons}")
