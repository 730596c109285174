"""Which tiles a kernel can be built with, and what they take of shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashcore_cupy.problem import ITEMSIZE

if TYPE_CHECKING:
    from flashcore_cupy.config import KernelConfig

WARP_SIZE = 32
WMMA = 16
"""WMMA fragments are 16 x 16 x 16."""
WARPGROUP = 4
"""Warps that issue wgmma together."""
_MAX_BOX = 256  # rows that TMA copies at once
TMA_ALIGN = 16
"""Bytes that rows which TMA copies start and end on."""
_MAX_STAGES = 4
_NAMED_BARRIERS = 15  # the sixteenth is __syncthreads's


def illegal(c: KernelConfig) -> list[str]:
    """Why a tile does not fit its kernel, most basic reason first."""
    t, source = c.tile, c.source
    sizes = {
        n: getattr(t, n)
        for n in [
            *("block_m", "block_n", "warps_m", "warps_n", "warps_d", "num_stages", "min_blocks"),
            "cluster",
        ]
    }
    reasons = [f"{name}={value} is not positive" for name, value in sizes.items() if value < 1]
    if reasons:
        return reasons
    if c.threads > 1024:
        reasons.append(f"warps_m x warps_n = {c.num_warps} warps; a thread block holds at most 32")
    if source == "fwd_sm90.cu":
        return reasons + _illegal_sm90(c)
    if t.cluster > 1:
        reasons.append("cluster is wgmma_sm90's")
    if source != "fwd_sm80.cu" and (t.warps_d > 1 or t.pack_gqa or t.split_kv):
        reasons.append("warps_d, pack_gqa and split_kv are mma_sm80's")
    if source == "ladder/scalar.cu":
        if t.block_n != WARP_SIZE:
            reasons.append(
                f"block_n={t.block_n}; scalar gives each of 32 lanes one key: block_n=32"
            )
        if t.block_m % c.num_warps:
            reasons.append(f"block_m={t.block_m} is not a multiple of the {c.num_warps} warps")
        if t.num_stages != 1 or t.cp_async or t.warp_softmax or t.fp8:
            reasons.append("scalar has one stage and none of cp_async, warp_softmax, fp8")
        return reasons
    if t.block_m % (WMMA * t.warps_m):
        reasons.append(f"block_m={t.block_m} is not a multiple of 16 x warps_m = {16 * t.warps_m}")
    if t.block_n % (WMMA * t.warps_n):
        reasons.append(f"block_n={t.block_n} is not a multiple of 16 x warps_n = {16 * t.warps_n}")
    if source == "ladder/wmma_unfused.cu":
        if t.num_stages != 2 or t.warp_softmax or t.fp8:
            reasons.append("wmma_unfused has num_stages=2 and neither warp_softmax nor fp8")
        return reasons
    if source == "fwd_sm80.cu":
        return reasons + _illegal_sm80(c)
    if t.num_stages not in (1, 2):
        reasons.append(f"num_stages={t.num_stages}; one stage, or two in turn")
    if t.warp_softmax:
        if t.warps_n != 1 or t.block_m != WMMA * t.warps_m:
            reasons.append("warp_softmax: a warp owns 16 whole rows: warps_n=1, block_m=16*warps_m")
        if 2 * t.block_m > 2 * t.num_stages * t.block_n:
            reasons.append(
                "warp_softmax: O leaves through K and V: block_m <= num_stages * block_n"
            )
    elif c.threads % t.block_m or c.threads // t.block_m not in (1, 2, 4, 8, 16, 32):
        reasons.append(
            f"{c.threads} threads do not divide evenly among block_m={t.block_m} softmax rows"
        )
    elif t.block_n % (c.threads // t.block_m):
        reasons.append(f"block_n={t.block_n} is not a multiple of the threads of a softmax row")
    if t.fp8 and not t.warp_softmax:
        reasons.append("fp8 goes with warp_softmax")
    if t.fp8 and t.cp_async:
        reasons.append("fp8 widens on load, so its copies cannot be asynchronous: cp_async=False")
    return reasons


def _illegal_sm80(c: KernelConfig) -> list[str]:
    t, size = c.tile, ITEMSIZE[c.dtype]
    reasons = []
    if t.num_stages not in (1, 2):
        reasons.append(f"num_stages={t.num_stages}; one stage, or two in turn")
    if not t.cp_async or t.warp_softmax or t.fp8:
        reasons.append("mma_sm80 has cp_async and neither warp_softmax nor fp8")
    if t.block_n % (WMMA * t.warps_n * t.warps_d) or c.head_dim_v % (WMMA * t.warps_d):
        reasons.append(f"warps_d={t.warps_d}: keys and columns do not divide into steps of 16")
    if t.warps_d > 1 and t.warps_m > _NAMED_BARRIERS:
        reasons.append(f"warps_m={t.warps_m}: at most {_NAMED_BARRIERS} where warps share rows")
    alone = t.warps_n == 1 and t.num_stages == 1 and not t.split_kv and size == 2
    if t.warps_d > 1 and not alone:
        reasons.append("warps_d: with 16-bit inputs, one stage, and neither warps_n nor split_kv")
    if t.warps_d > 1:
        panel, panel_p = panel_cols(c.head_dim_v), panel_cols(t.block_n)
        keys = t.block_n // t.warps_d
        if c.head_dim_v % 32 == 0 and c.head_dim_v // t.warps_d % panel:
            reasons.append(
                f"warps_d={t.warps_d}: each warp needs whole panels of {panel} of the "
                f"{c.head_dim_v} columns"
            )
        if t.block_n % 32 == 0 and keys % panel_p and panel_p % keys:
            reasons.append(
                f"block_n={t.block_n}, warps_d={t.warps_d}: a warp's {keys} keys are neither whole "
                f"panels of {panel_p} nor an equal part of one"
            )
    if size == 4 and t.block_n // t.warps_n > 64:
        reasons.append(f"block_n={t.block_n}: a warp takes at most 64 keys of float32")
    merged = (t.warps_n - 1) * 32 * (t.block_m // 16) * (4 + c.head_dim_v // t.warps_d // 2) * 4
    if merged > t.num_stages * t.block_n * (
        _row_bytes(c, c.head_dim) + _row_bytes(c, c.head_dim_v)
    ):
        reasons.append(f"warps_n={t.warps_n}: their results do not fit over K and V for the merge")
    return reasons


def _illegal_sm90(c: KernelConfig) -> list[str]:
    t = c.tile
    reasons = []
    if t.warps_m not in (4, 8, 12) or t.block_m != WMMA * t.warps_m:
        reasons.append(
            f"block_m={t.block_m}, warps_m={t.warps_m}: one to three warpgroups of 4 warps, each "
            f"with 64 queries: warps_m=4, 8 or 12, block_m=16*warps_m"
        )
    if t.block_n % WMMA or t.block_n > _MAX_BOX:
        reasons.append(f"block_n={t.block_n} is not a multiple of 16 up to {_MAX_BOX}")
    if t.num_stages > _MAX_STAGES:
        reasons.append(f"num_stages={t.num_stages}; at most {_MAX_STAGES}")
    switches = ("cp_async", "warp_softmax", "fp8")
    others = [name for name in ("warps_n", "warps_d") if getattr(t, name) > 1]
    others += [name for name in switches if getattr(t, name)]
    if (t.pack_gqa or t.split_kv) and t.warps_m > WARPGROUP:
        reasons.append("wgmma_sm90 has pack_gqa and split_kv for one consumer warpgroup alone")
    if t.cluster not in (1, 2, 4, 8) or (t.cluster > 1 and not t.split_kv):
        reasons.append(f"cluster={t.cluster}; 2, 4 or 8 thread blocks, with split_kv")
    part = 4 * t.block_m * (c.head_dim_v + 8 + 2)  # O, padded, and m and l: see split_combine.cuh
    if t.cluster > 1 and part > ITEMSIZE[c.dtype] * t.num_stages * t.block_n * c.head_dim:
        reasons.append(f"cluster={t.cluster}: a part does not fit over K for the merge")
    if others:
        reasons.append(f"wgmma_sm90 has no {', '.join(others)}")
    if c.head_dim % 32 or c.head_dim_v % 32:
        reasons.append("wgmma_sm90 has tiles of 32, 64, 96, ... columns")
    return reasons


def padded_row(columns: int) -> int:
    """Elements between rows of a shared tile; see ``padded_row`` in ``ladder/tile_load.cuh``."""
    return columns + 8


def round_up(n: int, multiple: int) -> int:
    """The next multiple of ``multiple``, or ``n`` itself."""
    return -(-n // multiple) * multiple


def _scalar_smem(c: KernelConfig) -> int:
    t = c.tile
    return 4 * (t.block_m * c.dim_qk + t.block_n * (c.dim_qk | 1) + t.block_n * c.dim_v)


def _unfused_smem(c: KernelConfig) -> int:
    t, ld, size = c.tile, padded_row(c.head_dim), ITEMSIZE[c.dtype]
    scores = size * (t.block_m + t.block_n) * ld
    stage = size * (t.block_m * padded_row(t.block_n) + t.block_n * ld)
    output = t.num_stages * stage + 4 * t.block_m * ld + 4 * t.block_m
    return round_up(max(scores, output), 128)


def _fused_smem(c: KernelConfig) -> int:
    t, ld, size = c.tile, padded_row(c.head_dim), ITEMSIZE[c.dtype]
    ld_s = padded_row(t.block_n)
    total = size * ld * (t.block_m + 2 * t.num_stages * t.block_n)  # Q, K, V
    total += 4 * t.block_m * ld_s  # S, and P over it
    if not t.warp_softmax:
        total += 4 * t.block_m * ld  # O
        total += 4 * t.block_m * (c.threads // t.block_m)  # partial maxima and sums
    return round_up(total + 4 * t.block_m, 128)


def _row_bytes(c: KernelConfig, columns: int) -> int:
    """A shared row of fwd_sm80: swizzled, or padded; see ``shared_layout.cuh``."""
    swizzled = ITEMSIZE[c.dtype] == 2 and columns % 32 == 0
    return columns * ITEMSIZE[c.dtype] + (0 if swizzled else 16)


_WORK_BYTES = 96
"""``Work`` in ``schedule.cuh``, a counter, two pointers, and the barriers of K and V."""


def _sm80_smem(c: KernelConfig) -> int:
    t = c.tile
    row, row_v = _row_bytes(c, c.head_dim), _row_bytes(c, c.head_dim_v)
    total = t.block_m * max(row, row_v) + t.num_stages * t.block_n * (row + row_v)
    if t.warps_d > 1:
        total += t.block_m * _row_bytes(c, t.block_n) + 4 * t.warps_d * t.block_m
    if t.warps_d > 1 and ("mask" in c.rules or "mask_mod" in c.rules):
        total += 16 * c.num_warps * -(-t.block_n // t.warps_d // 128)  # which keys each warp sees
    return round_up(total + _WORK_BYTES, 128)


_HOPPER_BYTES = 1024
"""Barriers of fwd_sm90, rounded up; and what it takes to align all that is loaded by TMA."""
_HOPPER_SMEM = 227 * 1024
"""Bytes that a thread block may have there."""


def _sm90_smem(c: KernelConfig) -> int:
    return _sm90_loaded(c) + ITEMSIZE[c.dtype] * c.tile.block_m * c.staged_cols


def _sm90_loaded(c: KernelConfig) -> int:
    return _sm90_kv(c) + q_stages(c) * ITEMSIZE[c.dtype] * c.tile.block_m * c.head_dim


def _sm90_kv(c: KernelConfig) -> int:
    t, size = c.tile, ITEMSIZE[c.dtype]
    total = t.num_stages * size * t.block_n * (c.head_dim + c.head_dim_v) + 2 * _HOPPER_BYTES
    if "mask" in c.rules or "mask_mod" in c.rules:
        total += _HOPPER_BYTES  # which keys each warp sees
    return total


def q_stages(c: KernelConfig) -> int:
    """Tiles of Q in shared memory: fwd_sm90 loads the next block's Q early where there is room."""
    if not c.uses_tma:
        return 1
    two = 2 * ITEMSIZE[c.dtype] * c.tile.block_m * c.head_dim
    return 2 if _sm90_kv(c) + two <= _HOPPER_SMEM else 1


def panel_cols(columns: int) -> int:
    """Columns that lie side by side in a tile, and in a box; see ``shared_layout.cuh``."""
    return 64 if columns % 64 == 0 else 32


def staged_cols(c: KernelConfig) -> int:
    """Columns of O that fwd_sm90 stores by TMA: as many panels as there is room for."""
    # A box of 16 rows is one of the array only where rows are queries of one sequence; and what
    # parts of the keys have found is merged in memory.
    is_box = not (c.packed or c.tile.pack_gqa or c.tile.split_kv)
    has_output = c.gate not in ("qk", "softmax")
    if not (c.tma_stores and c.align_bytes == TMA_ALIGN and is_box and has_output):
        return 0
    panel = panel_cols(c.head_dim_v)
    room = (_HOPPER_SMEM - _sm90_loaded(c)) // (ITEMSIZE[c.dtype] * c.tile.block_m)
    return max(0, min(c.head_dim_v, room // panel * panel))


def _quantize_smem(c: KernelConfig) -> int:
    return 4 * c.num_warps


SMEM_BYTES = {
    "ladder/scalar.cu": _scalar_smem,
    "ladder/wmma_unfused.cu": _unfused_smem,
    "ladder/wmma_fused.cu": _fused_smem,
    "fwd_sm80.cu": _sm80_smem,
    "fwd_sm90.cu": _sm90_smem,
    "ladder/fp8_quantize.cu": _quantize_smem,
}
