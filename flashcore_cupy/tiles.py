"""THE table: which tile a kernel uses for which head dim, and which kernel a problem gets.

To add a head dim or a tile, add a ``Row``; compile checks, tests, ``warmup`` and the ladder iterate
over ``ROWS``. Times in the comments: one H200, B=4 H=16 S=2048 D=64 float16, a replayed graph.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flashcore_cupy.config import (
    KernelConfig,
    Tile,
    check_no_rules,
    check_overrides,
    quantize_config,
    rules_of,
)
from flashcore_cupy.problem import DTYPES, ITEMSIZE, AttentionProblem, check_choice
from flashcore_cupy.rows import PER_SCORE
from flashcore_cupy.rows import Row as Row
from flashcore_cupy.rungs import AUTO_ORDER as AUTO_ORDER
from flashcore_cupy.rungs import HOPPER as HOPPER
from flashcore_cupy.rungs import KERNELS as KERNELS
from flashcore_cupy.rungs import Kernel as Kernel
from flashcore_cupy.targets import TARGETS as TARGETS
from flashcore_cupy.targets import capability as capability
from flashcore_cupy.targets import check_fits
from flashcore_cupy.targets import smem_limit as smem_limit
from flashcore_cupy.tensor_map import check_layout

#: Head dims with rows of their own in the WMMA kernels; others are padded to the next one.
WMMA_HEAD_DIMS = (32, 64, 80, 96, 128)
#: Those of the mma.sync kernel.
MMA_HEAD_DIMS = (*WMMA_HEAD_DIMS, 192, 256)
FP32 = ("float32",)

_UNFUSED = Tile(128, 64, warps_m=4, warps_n=4, num_stages=2, cp_async=True)
_FUSED_32 = Tile(32, 32, warps_m=2, warps_n=2, min_blocks=5)
_FUSED_64 = Tile(64, 64, warps_m=4, warps_n=2)
_CP_ASYNC = Tile(64, 64, warps_m=4, warps_n=2, num_stages=2, cp_async=True)
_WARP = Tile(64, 64, warps_m=4, num_stages=2, cp_async=True, warp_softmax=True, min_blocks=3)
# 32 rows per warp: a 16-row warp reads K and V from shared memory twice as often.
_MMA = Tile(128, 64, warps_m=4, cp_async=True)
# Short of queries, a GPU is filled by small blocks whose warps share out the keys.
_FEW = Tile(32, 128, warps_m=2, warps_n=2, num_stages=2, cp_async=True)
_FEW_BLOCKS = 40
_SOME = Tile(64, 128, warps_m=4, warps_n=2, num_stages=2, cp_async=True)
_SOME_BLOCKS = 100
# One query, or a few, per sequence: K and V are read once, by as many blocks as fill the GPU.
_DECODE = Tile(16, 128, warps_m=1, warps_n=4, cp_async=True, pack_gqa=True, split_kv=True)
_DECODE_ROWS = 16
# A tile of wgmma's; heads that share nothing gain nothing by it.
_GROUPED: dict[str, Any] = {"max_rows": 64, "min_group": 2}
# Thread blocks that merge in shared memory, 2 us sooner than in global memory. B=1, 32/8 heads,
# D=128, 1024 keys: 6.1 us, 8.6 without. But only 64 of them find a place at once, in twos 128, and
# 64 do not read as fast as all: 65536 keys 75 us, 69 without.
_CLUSTERS: tuple[tuple[int, dict[str, Any]], ...] = tuple(
    (size, {"max_rows": _DECODE_ROWS, "max_heads_kv": heads, "max_head_keys": 3 << 16})
    for size, heads in ((8, 8), (4, 16), (2, 64))
)
_FP32 = Tile(64, 32, warps_m=4, cp_async=True)
_FP32_WIDE = replace(_FP32, block_n=16)
_FP32_TALL = replace(_FP32_WIDE, block_m=96, warps_m=6)
_FP32_DECODE = replace(_DECODE, block_n=64)
_WGMMA = Tile(128, 128, warps_m=8, num_stages=2)
_WGMMA_192 = Tile(192, 128, warps_m=12, num_stages=3)
_WGMMA_64 = Tile(64, 128, warps_m=4, num_stages=2)
_WGMMA_NARROW = replace(_WGMMA, block_n=64)
_BIAS = ("bias", "bias_fp32")
_MODS = ("score_mod", "mask_mod")
_SOFTCAP = ("softcap", "softcap_wide")
_BOTH_MODS = "score_mod+mask_mod"
_MOST = ("bias_fp32", "alibi+causal", _BOTH_MODS)
_TINY_BLOCKS = 12
_FP8 = Tile(64, 64, warps_m=4, num_stages=2, warp_softmax=True, fp8=True)


def _wgmma_decode(block_n: int, num_stages: int) -> Tile:
    return Tile(64, block_n, warps_m=4, num_stages=num_stages, pack_gqa=True, split_kv=True)


def _wgmma_row(head_dim: int, tile: Tile, round_cost: float, **limits: Any) -> Row:
    return Row(
        *("wgmma_sm90", head_dim, tile),
        round_cost=round_cost,
        above_blocks=_TINY_BLOCKS,
        above_rows=_DECODE_ROWS,
        **limits,
    )


#: In order of preference: a problem gets the first row of its kernel and head dim that is meant for
#: it (see ``Row``; those with a ``round_cost`` by that) and for the target (``max_arch``), and fits
#: the target's shared memory.
ROWS: tuple[Row, ...] = (
    # 5597 us. Half the queries per block where the accumulators of 256 columns need the registers.
    Row("scalar", 128, Tile(16, 32, warps_m=4), dtypes=DTYPES),
    Row("scalar", 256, Tile(8, 32, warps_m=4), dtypes=DTYPES),
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
    *(Row("mma_sm80", d, _DECODE, max_rows=_DECODE_ROWS) for d in MMA_HEAD_DIMS),
    *(Row("mma_sm80", d, replace(_DECODE, block_n=64), max_rows=_DECODE_ROWS) for d in (192, 256)),
    # B=1 H=8 S=512 D=64: 8.2 us; 8.5 with 8 warps, or on tiles of 256 keys.
    *(Row("mma_sm80", d, _FEW, _FEW_BLOCKS) for d in MMA_HEAD_DIMS[:5]),
    *(Row("mma_sm80", d, replace(_FEW, block_n=64), _FEW_BLOCKS) for d in MMA_HEAD_DIMS[3:]),
    *(Row("mma_sm80", d, replace(_FEW, block_n=32), _FEW_BLOCKS) for d in (192, 256)),
    *(Row("mma_sm80", d, _SOME, _SOME_BLOCKS) for d in WMMA_HEAD_DIMS),
    # D=64, S=512 causal: 184 us, 190 with the row below.
    Row(
        *("mma_sm80", 64, replace(_MMA, num_stages=2, min_blocks=3)),
        max_keys=512,
        max_arch=90,
        spills_with=(*PER_SCORE, "window"),
    ),
    # Two blocks on long tiles: S=2048 is 5 % faster than with three on short ones.
    Row(
        *("mma_sm80", 64, replace(_MMA, block_n=128, num_stages=2, min_blocks=2)),
        min_arch=90,
        max_arch=100,
        spills_with=(*PER_SCORE, "window"),
    ),
    # Three blocks of 168 registers' threads.
    *(
        Row(
            "mma_sm80",
            d,
            replace(_MMA, num_stages=2, min_blocks=3),
            max_arch=90,
            spills_with=(*PER_SCORE, "window"),
        )
        for d in (32, 64)
    ),
    # D=128: 1.02 to 1.17 times.
    *(
        Row("mma_sm80", d, replace(_MMA, num_stages=2), spills_with=PER_SCORE)
        for d in WMMA_HEAD_DIMS
    ),
    Row("mma_sm80", 192, replace(_MMA, block_n=48), head_dim_v=128, spills_with=PER_SCORE),
    # Rules take registers, too. D=64: 1 to 11 % faster than 64 queries and one stage.
    Row("mma_sm80", 64, replace(_MMA, num_stages=2, min_blocks=2)),
    *(Row("mma_sm80", d, replace(_MMA, block_m=64, min_blocks=2)) for d in (32, 80, 96, 128)),
    Row("mma_sm80", 192, replace(_MMA, block_m=64), head_dim_v=128),
    # Two blocks of 64 rows per SM. Warps of 32 rows on half of the columns read shared memory 28 %
    # less, which is what this head dim waits for: D=256 4 to 10 % faster than the next.
    Row("mma_sm80", 256, replace(_MMA, block_m=64, warps_m=2, warps_d=2), spills_with=PER_SCORE),
    *(Row("mma_sm80", d, replace(_MMA, block_m=64)) for d in (192, 256)),
    Row("mma_sm80", 64, replace(_MMA, block_m=64), head_dim_v=256, spills_with=PER_SCORE),
    Row("mma_sm80", 64, replace(_MMA, block_m=64, block_n=32), head_dim_v=256),
    Row(
        *("mma_sm80", 512, replace(_MMA, block_m=64, warps_m=4, warps_d=4)),
        max_arch=90,
        spills_with=("bias_fp32+mask",),
    ),
    Row("mma_sm80", 512, replace(_MMA, block_m=32, block_n=32, warps_m=2, warps_d=2)),
    *(Row("mma_sm80", d, _FP32_DECODE, max_rows=_DECODE_ROWS, dtypes=FP32) for d in WMMA_HEAD_DIMS),
    *(Row("mma_sm80", d, _FP32, dtypes=FP32) for d in WMMA_HEAD_DIMS[:-1]),
    # Which tile fits the registers without spilling depends on the target.
    Row("mma_sm80", 128, _FP32, max_arch=100, dtypes=FP32),
    Row("mma_sm80", 128, _FP32_WIDE, min_arch=120, dtypes=FP32),
    Row("mma_sm80", 192, _FP32_WIDE, max_arch=90, dtypes=FP32),
    Row("mma_sm80", 256, _FP32_WIDE, max_arch=100, dtypes=FP32),
    Row("mma_sm80", 192, _FP32_TALL, min_arch=100, max_arch=100, dtypes=FP32),
    Row("mma_sm80", 192, _FP32_WIDE, min_arch=120, dtypes=FP32),
    # As many bytes of K and V on their way as shared memory holds. B=16, 32/8 heads, 16 queries,
    # 4096 keys, D=128: 65 us, 151 unpacked.
    *(
        Row(
            *("wgmma_sm90", d, replace(_wgmma_decode(block_n, stages), cluster=cluster)),
            **{"head_dim_v": dv, "above_blocks": _TINY_BLOCKS, **limits},
        )
        for cluster, limits in (*_CLUSTERS, (1, {"max_rows": _DECODE_ROWS}), (1, _GROUPED))
        for d, dv, block_n, stages in (
            *((64, 64, 128, 4), (96, 96, 128, 4), (128, 128, 128, 3)),
            *((192, 128, 64, 4), (192, 192, 64, 4), (256, 256, 64, 3)),
        )
    ),
    # Time per round: D=64 S=1024 13.4, 10.9 and 7.9 us, D=128 14.7 and 11.4.
    _wgmma_row(64, _WGMMA_192, 1, spills_with=(*_BIAS, *_SOFTCAP, "score_mod")),
    # One tile of keys needs no second place: B=32 H=8 S=128 on an H100 7.50 us, 7.76 with two.
    _wgmma_row(64, replace(_WGMMA, num_stages=1), 0.83, max_keys=128),
    _wgmma_row(64, _WGMMA, 0.83),
    _wgmma_row(64, _WGMMA_64, 0.6),
    *(_wgmma_row(d, _WGMMA, 1) for d in (96, 128)),
    *(_wgmma_row(d, _WGMMA_64, 0.75, spills_with=(*_BIAS, _BOTH_MODS)) for d in (96, 128)),
    _wgmma_row(192, _WGMMA, 1, head_dim_v=128, spills_with=PER_SCORE),
    _wgmma_row(192, replace(_WGMMA, block_n=112), 1.05, head_dim_v=128),
    _wgmma_row(192, replace(_WGMMA, block_n=96), 1, spills_with=_MOST),
    _wgmma_row(192, _WGMMA_NARROW, 1.1),  # for all rules; not yet timed
    # 512 keys: 130 us against 134, causal 97 against 104, for half of O is stored by TMA.
    _wgmma_row(256, _WGMMA_NARROW, 0.97, max_keys=512, spills_with=_MOST),
    _wgmma_row(256, replace(_WGMMA, block_n=80), 1, spills_with=PER_SCORE),
    _wgmma_row(256, _WGMMA_NARROW, 1.05, spills_with=_MOST),
    _wgmma_row(256, replace(_WGMMA, block_n=48), 1.1),  # likewise
    # 569 us with two stages, 647 with one.
    *(Row("fp8_wmma", d, _FP8) for d in WMMA_HEAD_DIMS),
    *(Row("fp8_wmma", d, replace(_FP8, block_n=32)) for d in (80, 96, 128)),
)


@dataclass(frozen=True)
class Selection:
    """The kernel that a problem gets on a target, and why the faster ones were passed over."""

    kernel: Kernel
    config: KernelConfig
    passed_over: tuple[tuple[str, str], ...] = ()

    def explained(self, arch: str) -> list[str]:
        """Return a line for the kernel on its target, and one for each that was passed over."""
        lines = [f"{self.kernel.name} on {arch}: {self.config.describe()}"]
        return lines + [f"passed over {name}: {reason}" for name, reason in self.passed_over]


def rows_of(kernel: str) -> list[Row]:
    """The rows of a kernel, in order of preference."""
    return [row for row in ROWS if row.kernel == kernel]


def configure(
    problem: AttentionProblem,
    kernel: Kernel,
    arch: str,
    overrides: Mapping[str, object] | None = None,
    *,
    auto: bool = False,
) -> KernelConfig:
    """The kernel's configuration for a problem; ``ValueError`` says why there is none.

    ``auto``: nor is there one where another kernel is meant for so small a grid.
    """
    if problem.dtype not in kernel.dtypes:
        raise ValueError(f"takes {' and '.join(kernel.dtypes)}, not {problem.dtype}")
    _check_arch(kernel, arch)
    if not kernel.has_rules:
        check_no_rules(problem)
    if kernel.tma:
        check_layout(problem)
        if problem.rules.mask is not None and not problem.rules.mask.chunks:
            raise ValueError(
                "reads a mask 16 keys at a time: its rows have to begin on multiples of 16 bytes, "
                "with a multiple of 16 keys"
            )
    if auto and kernel.tma and problem.rules.bias is not None and not problem.rules.bias.pairs:
        raise ValueError("is slower with a bias that cannot be read two keys at a time")
    dims = (problem.head_dim, problem.head_dim_v)
    own = [row for row in rows_of(kernel.name) if problem.dtype in row.dtypes]
    wide = {row.dims for row in own if row.dims[0] >= dims[0] and row.dims[1] >= dims[1]}
    if not wide:
        most = max(row.head_dim for row in own)
        asked = "/".join(map(str, dict.fromkeys(dims)))
        raise ValueError(f"takes head dims up to {most} in {problem.dtype}, not {asked}")
    reasons = []
    meant = [row for row in own if row.dims == min(wide, key=sum) and row.serves(problem)]
    filled = [row for row in meant if not row.unfilled_by(problem)]
    filled.sort(key=lambda row: row.grid_cost(problem))  # otherwise as they stand in the table
    if auto and meant and not filled:
        raise ValueError(meant[0].unfilled_by(problem))
    if not auto:
        filled += [row for row in meant if row not in filled]
    for row in filled:
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
    scalar = kernel.source == "ladder/scalar.cu"
    columns = max(problem.head_dim, problem.head_dim_v)
    head_dim, head_dim_v = (columns, columns) if scalar else row.dims
    left, right = problem.window
    config = KernelConfig(
        kernel=kernel.name,
        source=kernel.source,
        dtype=problem.dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dim_qk=problem.head_dim,
        dim_v=problem.head_dim_v,
        tile=row.tile.override(overrides or {}),
        causal=right >= 0,
        gate=problem.gate,
        # scalar reads element by element: one build serves every alignment.
        align_bytes=ITEMSIZE[problem.dtype] if scalar else problem.align_bytes,
        tma_stores=kernel.tma,
        window=left >= 0,
        rules=rules_of(problem) if kernel.has_rules else (),
        packed=problem.packed,
        mods=problem.rules.mods,
    )
    config.check()
    group = problem.heads_q // problem.heads_kv
    if config.tile.pack_gqa and problem.rules.differ_by_head:
        raise ValueError("config: pack_gqa with a rule that hides keys from some heads of a group")
    if kernel.tma and config.tile.pack_gqa and config.tile.block_m % group:
        raise ValueError(
            f"packs groups of 1, 2, 4, ... {config.tile.block_m} heads, not of {group}"
        )
    return config


def _check_arch(kernel: Kernel, arch: str) -> None:
    if kernel.tma and arch != HOPPER:
        raise ValueError(f"needs wgmma, which {HOPPER} alone has; the target is {arch}")


def check_target(row: Row, config: KernelConfig, arch: str) -> KernelConfig:
    """Return the row's configuration; ``ValueError`` says what of it the target lacks."""
    _check_arch(KERNELS[row.kernel], arch)
    if row.max_arch is not None and capability(arch) > row.max_arch:
        raise ValueError(f"has a row up to sm_{row.max_arch} alone, the target is {arch}")
    if row.min_arch is not None and capability(arch) < row.min_arch:
        raise ValueError(f"has a row from sm_{row.min_arch} on alone, the target is {arch}")
    check_fits(config, arch)
    return config


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
            config = configure(problem, KERNELS[name], arch, auto=True)
        except ValueError as error:
            passed_over.append((name, str(error)))
        else:
            return Selection(KERNELS[name], config, tuple(passed_over))
    reasons = "; ".join(f"{name} {why}" for name, why in passed_over)
    raise ValueError(f"kernel: none can do this problem on {arch}: {reasons}")
