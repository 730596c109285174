"""THE table: which tile a kernel uses for which head dim, and which kernel a problem gets.

A line is a kernel and a head dim, or a pair (D, Dv): its choices, in order of preference. A choice
is a tile and what it is meant for; those that several lines share stand above them, with their
reasons. Compile checks, tests, ``warmup`` and the ladder iterate over ``ROWS``.

For head dim 160 add a line between 128 and 192 to ``_SM80_ROWS``, for Hopper one to
``_SM90_ROWS``, for float32 one to ``_SM80_FP32_ROWS``; nothing else. ``benchmarks/tune.py`` finds
the tile; the ``Row`` that it prints may stand among the lines as it is.

Times in the comments: one H200, B=4 H=16 S=2048 D=64 float16, a replayed graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from flashcore_cupy.problem.attention_problem import DTYPES
from flashcore_cupy.select.config import Tile
from flashcore_cupy.select.row import PER_SCORE, Row

_Choice = Callable[..., Row]


def _line(kernel: str, dims: int | tuple[int, int], *choices: _Choice) -> list[Row]:
    """What a kernel may take for a head dim, or for a pair of D and Dv."""
    head_dim, head_dim_v = (dims, None) if isinstance(dims, int) else dims
    return [choice(kernel=kernel, head_dim=head_dim, head_dim_v=head_dim_v) for choice in choices]


def _choice(tile: Tile, **limits: Any) -> _Choice:
    """A tile, and what it is meant for: fields of ``Row`` by name."""
    return partial(Row, tile=tile, **limits)


# --- the ladder -----------------------------------------------------------------------------------

#: Head dims of the WMMA kernels; others are padded to the next one.
WMMA_HEAD_DIMS = (32, 64, 80, 96, 128)

# 1651 us; 64 queries per block 1959, 256 queries 2152.
_UNFUSED = Tile(128, 64, warps_m=4, warps_n=4, num_stages=2, cp_async=True)
_unfused = partial(_line, "wmma_unfused")
_ROWS_128 = _choice(_UNFUSED)
_ROWS_64 = _choice(replace(_UNFUSED, block_m=64))

# 1154 us; bounded to five blocks' worth of registers, 96 and fewer.
_FUSED_32 = _choice(Tile(32, 32, warps_m=2, warps_n=2, min_blocks=5))
# 837 us with 8 warps as 4 x 2; 4 warps 1045, 2 x 4 869, 16 warps 1228.
_FUSED_64 = _choice(Tile(64, 64, warps_m=4, warps_n=2))

# 800 us with 128 keys per tile, 818 with 64.
_CP_ASYNC = Tile(64, 64, warps_m=4, warps_n=2, num_stages=2, cp_async=True)
_cp_async = partial(_line, "wmma_cp_async")


def _async(keys: int) -> _Choice:
    return _choice(replace(_CP_ASYNC, block_n=keys))


# 425 us bounded to three blocks' worth of registers, 477 unbounded.
_WARP = Tile(64, 64, warps_m=4, num_stages=2, cp_async=True, warp_softmax=True, min_blocks=3)
_warp = partial(_line, "wmma_warp_softmax")
_THREE_CTAS_WARP = _choice(_WARP)
# Two blocks are all that shared memory holds; a third one's worth of registers would spill.
_TWO_CTAS_WARP = _choice(replace(_WARP, min_blocks=2))
_KEYS_32_WARP = _choice(replace(_WARP, block_n=32))

# 569 us with two stages, 647 with one.
_FP8 = Tile(64, 64, warps_m=4, num_stages=2, warp_softmax=True, fp8=True)
_fp8 = partial(_line, "fp8_wmma")
_FP8_64, _FP8_32 = _choice(_FP8), _choice(replace(_FP8, block_n=32))

_LADDER_ROWS = (
    # 5597 us.
    *_line("scalar", 128, _choice(Tile(16, 32, warps_m=4), dtypes=DTYPES)),
    # The accumulators of 256 columns need the registers of half of the queries.
    *_line("scalar", 256, _choice(Tile(8, 32, warps_m=4), dtypes=DTYPES)),
    *_unfused(32, _ROWS_128),
    *_unfused(64, _ROWS_128),
    *_unfused(80, _ROWS_128, _ROWS_64),
    *_unfused(96, _ROWS_128, _ROWS_64),
    *_unfused(128, _ROWS_128, _ROWS_64),
    *(row for dim in WMMA_HEAD_DIMS for row in _line("wmma_fused_32", dim, _FUSED_32)),
    *(row for dim in WMMA_HEAD_DIMS for row in _line("wmma_fused_64", dim, _FUSED_64)),
    *_cp_async(32, _async(128), _async(64)),
    *_cp_async(64, _async(128), _async(64)),
    *_cp_async(80, _async(64)),
    *_cp_async(96, _async(64), _async(32)),
    *_cp_async(128, _async(64), _async(32)),
    *_warp(32, _THREE_CTAS_WARP),
    *_warp(64, _THREE_CTAS_WARP),
    *_warp(80, _THREE_CTAS_WARP),
    *_warp(96, _TWO_CTAS_WARP),
    *_warp(128, _TWO_CTAS_WARP, _KEYS_32_WARP),
    *_fp8(32, _FP8_64),
    *_fp8(64, _FP8_64),
    *_fp8(80, _FP8_64, _FP8_32),
    *_fp8(96, _FP8_64, _FP8_32),
    *_fp8(128, _FP8_64, _FP8_32),
)

# --- mma_sm80 -------------------------------------------------------------------------------------

_sm80 = partial(_line, "mma_sm80")

# 32 rows per warp: a 16-row warp reads K and V from shared memory twice as often.
_MMA = Tile(128, 64, warps_m=4, cp_async=True)
_MMA_2 = replace(_MMA, num_stages=2)
_MMA_64 = replace(_MMA, block_m=64)
_PLAIN = (*PER_SCORE, "window")
_DECODE = Tile(16, 128, warps_m=1, warps_n=4, cp_async=True, pack_gqa=True, split_kv=True)
_DECODE_ROWS = 16
_SMALL = Tile(32, 128, warps_m=2, warps_n=2, num_stages=2, cp_async=True)


def _one(keys: int) -> _Choice:
    """One query, or a few: K and V are read once, by as many blocks as fill the GPU."""
    return _choice(replace(_DECODE, block_n=keys), max_rows=_DECODE_ROWS)


def _few(keys: int) -> _Choice:
    """With few queries, a GPU is filled by small blocks whose warps split the keys.

    B=1 H=8 S=512 D=64: 8.2 us; 8.5 with 8 warps, or on tiles of 256 keys.
    """
    return _choice(replace(_SMALL, block_n=keys), max_blocks=40)


_SOME = _choice(Tile(64, 128, warps_m=4, warps_n=2, num_stages=2, cp_async=True), max_blocks=100)
# Three blocks of 168 registers' threads.
_THREE_CTAS = _choice(replace(_MMA_2, min_blocks=3), max_arch=90, spills_with=_PLAIN)
# D=64, S=512 causal: 184 us, 190 with _LONG_TILES.
_FEW_KEYS = partial(_THREE_CTAS, max_keys=512)
# Two blocks on long tiles: S=2048 is 5 % faster than with three on short ones.
_LONG_TILES = _choice(
    replace(_MMA_2, block_n=128, min_blocks=2), min_arch=90, max_arch=100, spills_with=_PLAIN
)
# D=128: 1.02 to 1.17 times.
_TWO_STAGES = _choice(_MMA_2, spills_with=PER_SCORE)
# D=128, compiled for a GPU before Hopper: 64 keys spill 36 bytes. Not timed there.
_48_KEYS = _choice(replace(_MMA_2, block_n=48), max_arch=89, spills_with=PER_SCORE)
_64_KEYS = _choice(_MMA_2, min_arch=90, spills_with=PER_SCORE)
# Rules take registers, too.
_RULED = _choice(replace(_MMA_64, min_blocks=2))
_RULED_128 = _choice(replace(_MMA_64, min_blocks=2), spills_with=("bias_fp32+blocks",))
_KEYS_32 = _choice(replace(_MMA_64, block_n=32))  # for all rules; not yet timed
# D=64: 1 to 11 % faster than _RULED.
_RULED_64 = _choice(replace(_MMA_2, min_blocks=2))
_WIDE = _choice(_MMA_64)
# Two blocks of 64 rows per SM. Warps of 32 rows on half of the columns read shared memory 28 %
# less, which is what this head dim waits for: D=256 4 to 10 % faster than _WIDE.
_COLUMNS = _choice(replace(_MMA_64, warps_m=2, warps_d=2), spills_with=PER_SCORE)

# fmt: off
_SM80_ROWS = (
    # D         one query, a few     small grids          larger   all others
    *_sm80(32,  _one(128),           _few(128),           _SOME,   _THREE_CTAS, _TWO_STAGES,
                                                                   _RULED),
    *_sm80(64,  _one(128),           _few(128),           _SOME,   _FEW_KEYS, _LONG_TILES,
                                                                   _THREE_CTAS, _TWO_STAGES,
                                                                   _RULED_64),
    *_sm80(80,  _one(128),           _few(128),           _SOME,   _TWO_STAGES, _RULED),
    *_sm80(96,  _one(128),           _few(128), _few(64), _SOME,   _TWO_STAGES, _RULED),
    *_sm80(128, _one(128),           _few(128), _few(64), _SOME,   _64_KEYS, _48_KEYS, _RULED_128,
                                                                   _KEYS_32),
    *_sm80(192, _one(128), _one(64), _few(64), _few(32),           _WIDE),
    *_sm80(256, _one(128), _one(64), _few(64), _few(32),           _COLUMNS, _WIDE),
    # (D, Dv) and wider heads, for whatever grid
    *_sm80((192, 128), _choice(replace(_MMA, block_n=48), spills_with=PER_SCORE), _WIDE),
    *_sm80((64, 256),  _choice(_MMA_64, spills_with=PER_SCORE),
                       _choice(replace(_MMA_64, block_n=32))),
    *_sm80(512,        _choice(replace(_MMA_64, warps_d=4), max_arch=90,
                               spills_with=("bias_fp32+mask", "score_mod+mask_mod", "blocks")),
                       _choice(replace(_MMA, block_m=32, block_n=32, warps_m=2, warps_d=2))),
)
# fmt: on

# --- mma_sm80 in float32: which tile fits the registers without spilling depends on the target ----

_fp32 = partial(_choice, dtypes=("float32",))
_FP32 = Tile(64, 32, warps_m=4, cp_async=True)
_FP32_WIDE = replace(_FP32, block_n=16)
_FP32_TALL = replace(_FP32_WIDE, block_m=96, warps_m=6)
_FP32_ONE = _fp32(replace(_DECODE, block_n=64), max_rows=_DECODE_ROWS)
_FP32_ALL = _fp32(_FP32)

# fmt: off
_SM80_FP32_ROWS = (
    # D         one query, a few   all others
    *_sm80(32,  _FP32_ONE,         _FP32_ALL),
    *_sm80(64,  _FP32_ONE,         _FP32_ALL),
    *_sm80(80,  _FP32_ONE,         _FP32_ALL),
    *_sm80(96,  _FP32_ONE,         _FP32_ALL),
    *_sm80(128, _FP32_ONE,         _fp32(_FP32, max_arch=100), _fp32(_FP32_WIDE, min_arch=120)),
    *_sm80(192,                    _fp32(_FP32_WIDE, max_arch=90),
                                   _fp32(_FP32_TALL, min_arch=100, max_arch=100),
                                   _fp32(_FP32_WIDE, min_arch=120)),
    *_sm80(256,                    _fp32(_FP32_WIDE, max_arch=100)),
)
# fmt: on

# --- wgmma_sm90 -----------------------------------------------------------------------------------

_sm90 = partial(_line, "wgmma_sm90")

_TINY_BLOCKS = 12
_WGMMA = Tile(128, 128, warps_m=8, num_stages=2)
_WGMMA_192 = Tile(192, 128, warps_m=12, num_stages=3)
_WGMMA_64 = Tile(64, 128, warps_m=4, num_stages=2)
_NARROW = replace(_WGMMA, block_n=64)
# Clusters combine splits in shared memory, which is 2 us faster than in global memory. B=1, 32/8
# heads, D=128, 1024 keys: 6.1 us, 8.6 without. But in clusters of 8 only 64 thread blocks run at
# once, in pairs 128, and 64 do not read as fast as all: 65536 keys 75 us, 69 without.
_CLUSTER_HEADS = {8: 8, 4: 16, 2: 64}
_CLUSTER_KEYS = 3 << 16
# A tile of wgmma's; heads that share nothing gain nothing by it.
_GROUPED_ROWS = 64
_MANY_HEADS = 1024


def _few_rows(block_n: int, num_stages: int) -> list[_Choice]:
    """One query, or a few, per sequence: in clusters of few heads, apart, and grouped.

    As many bytes of K and V on their way as shared memory holds. B=16, 32/8 heads, 16 queries, 4096
    keys, D=128: 65 us, 151 unpacked.
    """
    tile = Tile(64, block_n, warps_m=4, num_stages=num_stages, pack_gqa=True, split_kv=True)
    choice = partial(_choice, above_blocks=_TINY_BLOCKS)
    clusters = [
        choice(
            replace(tile, cluster=cluster),
            max_rows=_DECODE_ROWS,
            max_heads_kv=heads,
            max_head_keys=_CLUSTER_KEYS,
        )
        for cluster, heads in _CLUSTER_HEADS.items()
    ]
    apart = choice(tile, max_rows=_DECODE_ROWS)
    return [*clusters, apart, choice(tile, max_rows=_GROUPED_ROWS, min_group=2)]


def _rounds(tile: Tile, cost: float, **limits: Any) -> _Choice:
    """For grids by their rounds of thread blocks, each of which takes so long."""
    return _choice(
        tile, round_cost=cost, above_blocks=_TINY_BLOCKS, above_rows=_DECODE_ROWS, **limits
    )


_BIAS = ("bias", "bias_fp32")
_SOFTCAP = ("softcap", "softcap_wide")
_BIAS_AND_DROPOUT = ("bias+dropout", "bias_fp32+dropout")
_BLOCKS = ("blocks+mask", "blocks+dropout", "blocks+mask_mod+causal", "blocks+mask_mod+window")
_BOTH_MODS = "score_mod+mask_mod"
_HEAVY_RULES = ("bias_fp32", "alibi+causal", _BOTH_MODS)
_SMALL_BLOCKS = _rounds(_WGMMA_64, 0.75, spills_with=(*_BIAS, _BOTH_MODS))

# Time per round: D=64 S=1024 13.4, 10.9 and 7.9 us, D=128 14.7 and 11.4.
_SM90_ROWS = (
    *_sm90(
        64,
        *_few_rows(128, num_stages=4),
        _rounds(
            _WGMMA_192,
            1,
            spills_with=(*_BIAS, *_SOFTCAP, "score_mod", "alibi+dropout", *_BLOCKS),
        ),
        # One tile of keys needs no second place: B=32 H=8 S=128 on an H100 7.50 us, 7.76 with two.
        _rounds(replace(_WGMMA, num_stages=1), 0.83, max_keys=128),
        _rounds(_WGMMA, 0.83),
        _rounds(_WGMMA_64, 0.6),
    ),
    *_sm90(
        96,
        *_few_rows(128, num_stages=4),
        # 1.10 times as fast as _WGMMA on long sequences; with 128 keys it spills.
        _rounds(
            replace(_WGMMA_192, block_n=112),
            1,
            # 112 keys do not divide a block of a block mask, and 64 have not been timed.
            spills_with=(*_BIAS, *_SOFTCAP, "alibi", "score_mod", "dropout", "blocks"),
        ),
        _rounds(_WGMMA, 0.8),
        _rounds(_WGMMA_64, 0.6, spills_with=(*_BIAS, _BOTH_MODS)),
    ),
    *_sm90(
        128,
        # Two thread blocks per multiprocessor where there are many heads. One H200, 8192 keys, 32/8
        # heads: 128 sequences take 963 us, and 991 us by one block with tiles of 128 keys; 16
        # sequences take 127 us, and 124 us.
        _choice(
            Tile(64, 64, warps_m=4, num_stages=2, pack_gqa=True, split_kv=True, min_blocks=2),
            above_blocks=_MANY_HEADS,
            max_rows=_DECODE_ROWS,
        ),
        *_few_rows(128, num_stages=3),
        _rounds(_WGMMA, 1, spills_with=_BIAS_AND_DROPOUT),
        _SMALL_BLOCKS,
        _rounds(_NARROW, 1.1),  # for all rules; not yet timed
    ),
    *_sm90(
        (192, 128),
        *_few_rows(64, num_stages=4),
        _rounds(_WGMMA, 1, spills_with=PER_SCORE),
        _rounds(replace(_WGMMA, block_n=112), 1.05),
    ),
    *_sm90(
        192,
        *_few_rows(64, num_stages=4),
        _rounds(replace(_WGMMA, block_n=96), 1, spills_with=_HEAVY_RULES),
        _rounds(_NARROW, 1.1),  # for all rules; not yet timed
    ),
    *_sm90(
        256,
        *_few_rows(64, num_stages=3),
        # 512 keys: 130 us against 134, causal 97 against 104, for half of O is stored by TMA.
        _rounds(_NARROW, 0.97, max_keys=512, spills_with=_HEAVY_RULES),
        _rounds(replace(_WGMMA, block_n=80), 1, spills_with=PER_SCORE),
        _rounds(_NARROW, 1.05, spills_with=_HEAVY_RULES),
        _rounds(replace(_WGMMA, block_n=48), 1.1),  # for all rules; not yet timed
    ),
)

# --- cluster_sm90 ---------------------------------------------------------------------------------

_cluster = partial(_line, "cluster_sm90")
_CLUSTER = Tile(64, 128, warps_m=4)
# 64 queries' pairs of thread blocks find a place each.
_PAIRS = 33


def _at_once(most: int, tile: Tile, **limits: Any) -> _Choice:
    """For so many keys at most, of which each warpgroup has one tile."""
    return _choice(replace(tile, one_tile=True), max_keys=most, **limits)


_TWO_GROUPS = replace(_CLUSTER, warps_n=2)
_TWO_BLOCKS = replace(_CLUSTER, cluster=2)
_FOUR_GROUPS = replace(_CLUSTER, warps_n=2, cluster=2)
_HALF_TILE = _at_once(64, replace(_CLUSTER, block_n=64, alone=True))
_ONE_TILE = _at_once(128, replace(_CLUSTER, alone=True))
# Clusters whose thread blocks are alone on a multiprocessor are faster than two warpgroups.
_TWO_TILES = _at_once(256, replace(_TWO_BLOCKS, alone=True), max_blocks=_PAIRS)
_FOUR_TILES = _at_once(512, _FOUR_GROUPS, max_blocks=_PAIRS)
_WIDE_TILES = _at_once(
    512,
    replace(_TWO_BLOCKS, block_n=256, alone=True),
    max_blocks=_PAIRS,
    spills_with=PER_SCORE,
)

# One H100, 8 heads, float16, a replayed graph; in brackets the faster of wgmma_sm90 and mma_sm80,
# whose launches do not overlap.
_CLUSTER_ROWS = (
    *_cluster(
        64,
        _HALF_TILE,  # S=64 1.9 us (3.8)
        _ONE_TILE,  # S=128 2.1 us (3.9), not alone 2.3
        _TWO_TILES,  # S=256 2.5 us (5.0), not alone 3.2; B=2 2.8, _TWO_GROUPS 3.3
        _at_once(256, _TWO_GROUPS),
        _WIDE_TILES,  # S=512 3.6 us (6.5), _FOUR_TILES 3.8; causal both 3.8
        _FOUR_TILES,
        _choice(replace(_TWO_GROUPS, num_stages=2), max_keys=512),  # 16 heads, S=512 (6.8)
        _choice(_FOUR_GROUPS, max_blocks=_PAIRS),
        _choice(replace(_TWO_GROUPS, num_stages=3)),  # S=1024 8.5 us (10.1), _FOUR_GROUPS 11.2
    ),
    *_cluster(
        128,
        _HALF_TILE,
        _ONE_TILE,  # S=128 2.6 us (5.6), not alone 2.8
        _TWO_TILES,  # S=256 3.3 us (6.2), _TWO_GROUPS 3.9, not alone 4.1
        _at_once(256, _TWO_BLOCKS),
        _FOUR_TILES,  # S=512 5.0 us (8.1)
        _choice(_TWO_GROUPS),  # 16 heads, S=512 (8.8), causal (9.6)
    ),
)

#: In order of preference: a problem gets the first row of its kernel and head dim that is meant for
#: it (see ``Row``; those with a ``round_cost`` by that) and for the target (``max_arch``), and fits
#: the target's shared memory.
ROWS: tuple[Row, ...] = (*_LADDER_ROWS, *_SM80_ROWS, *_SM80_FP32_ROWS, *_SM90_ROWS, *_CLUSTER_ROWS)
