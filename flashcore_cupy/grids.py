"""How a problem's work is cut: blocks of queries, parts of the keys, heads that take turns."""

from __future__ import annotations

from flashcore_cupy.config import WARP_SIZE, KernelConfig
from flashcore_cupy.problem import AttentionProblem
from flashcore_cupy.tile_checks import WARPGROUP

# What a part of split keys costs beyond its own, in keys: to begin and end, and to be merged.
_PART_KEYS, _MERGE_KEYS = 256, 24
# The same of fwd_sm90, where the next part is loaded meanwhile; that there are parts at all; and a
# round of merging eight of them.
_HOPPER_PART_KEYS, _HOPPER_SPLIT_KEYS, _HOPPER_MERGE_KEYS = 64, 128, 100
_MOST_SPLITS = 128
# Measured on an H200 at D=64, 128, 256 and 512 to 16384 queries; a long head has so many blocks.
_L2_BYTES, _LONG, _ROUNDS = 34_000_000, 40, 8
_INT_MAX = 2**31 - 1
#: Thread blocks of a launch, and heads of a problem. Kernels count them in 32 bits, and fwd_sm90
#: adds to them those that run side by side.
MAX_BLOCKS = 2**31 - 2**16


def check_sizes(problem: AttentionProblem, config: KernelConfig) -> None:
    """Raise ``ValueError`` unless all that kernels count in 32 bits of a problem fits into them.

    Lengths alone have passed ``problem.MAX_SEQLEN``. What is not here is 64 bits wide.
    """
    rows = blocks_per_head(problem, config) * config.tile.block_m
    counts = (
        ("heads in all", _heads(problem), MAX_BLOCKS),
        ("rows of a head, whole tiles of each sequence", rows, _INT_MAX),
        ("thread blocks", _largest_grid(problem, config), MAX_BLOCKS),
    )
    for what, count, most in counts:
        if count > most:
            axes = "(B, Hq, total)" if problem.packed else "(B, Hq, Sq)"
            got = problem.batch, problem.heads_q, problem.seqlen_q
            raise ValueError(
                f"q: got {axes} = {got}, which makes {count} {what}; at most {most}, so split the "
                f"batch over several calls"
            )


def _heads(problem: AttentionProblem) -> int:
    return problem.heads_q * (1 if problem.packed else problem.batch)


def _largest_grid(problem: AttentionProblem, config: KernelConfig) -> int:
    """Of all launches; keys are split only as far as the grid allows."""
    grid = query_blocks(problem, config) * config.tile.cluster
    if config.tile.fp8:  # the quantiser has a block per head of q, k and v
        grid = max(grid, problem.batch * (problem.heads_q + 2 * problem.heads_kv))
    if config.source == "ladder/wmma_unfused.cu":  # a block per tile of scores, a warp per row
        tiles = -(-problem.visible_kv // config.tile.block_n)
        per_row = -(-_heads(problem) * problem.seqlen_q // config.num_warps)
        grid = max(grid, grid * tiles, per_row)
    return grid


def blocks_per_head(problem: AttentionProblem, config: KernelConfig) -> int:
    """Blocks of rows per head of q, or of k and v where a group's heads are packed."""
    block_m, rows = config.tile.block_m, _rows_per_head(problem, config)
    # Each packed sequence may start within a block, and so may the rows before and behind them: see
    # PackedBatch in schedule.cuh.
    return rows // block_m + problem.batch + 2 if problem.packed else -(-rows // block_m)


def _rows_per_head(problem: AttentionProblem, config: KernelConfig) -> int:
    group = problem.heads_q // problem.heads_kv if config.tile.pack_gqa else 1
    return problem.seqlen_q * group


def query_blocks(problem: AttentionProblem, config: KernelConfig) -> int:
    """Blocks of rows of all heads and sequences."""
    group = problem.heads_q // problem.heads_kv if config.tile.pack_gqa else 1
    return _heads(problem) // group * blocks_per_head(problem, config)


def splits(problem: AttentionProblem, config: KernelConfig, resident: int) -> int:
    """Parts of the keys that the thread blocks of one row of tiles share out.

    A cluster's thread blocks have one each. Else the number that ends first if all blocks that fit
    on the GPU, ``resident``, run side by side, each taking as long as its keys, and some more for
    its beginning and for the merge.
    """
    if config.tile.cluster > 1:
        return config.tile.cluster
    if not config.tile.split_kv or problem.batch_invariant:
        return 1
    blocks, keys = query_blocks(problem, config), problem.visible_kv
    most = min(_MOST_SPLITS, max(1, MAX_BLOCKS // max(1, blocks)))
    if problem.packed:  # on average; only the device knows the lengths
        keys = -(-keys // max(1, problem.batch))
        blocks = max(1, blocks // 2)  # about every other one has no sequence
    tiles = max(1, -(-keys // config.tile.block_n))

    def cost(parts: int) -> tuple[float, int]:
        waves = -(-blocks * parts // resident)
        own = waves * -(-tiles // parts) * config.tile.block_n
        if not config.uses_tma:
            return own + waves * _PART_KEYS + _MERGE_KEYS * (parts - 1), own
        # Half of the thread blocks read about as fast as memory delivers; between that and all of
        # them some have the way to memory for themselves, and others wait: B=1, 8 heads, 65536
        # keys, D=128 71, 77 and 69 us in 9, 12 and 16 parts. So of equals the most parts.
        busy = max(own, 2 * blocks * keys / resident)
        merge = _hopper_merge_keys(problem, config, parts)
        return busy + waves * _HOPPER_PART_KEYS + merge, own

    return min(range(1, min(tiles, most) + 1), key=cost)


def _hopper_merge_keys(problem: AttentionProblem, config: KernelConfig, parts: int) -> int:
    """What fwd_sm90 takes to merge the parts: a warpgroup, four columns per thread at a time."""
    if parts == 1:
        return 0
    rows = min(config.tile.block_m, _rows_per_head(problem, config))
    rounds = -(-rows * config.head_dim_v // (4 * WARPGROUP * WARP_SIZE))
    return _HOPPER_SPLIT_KEYS + _HOPPER_MERGE_KEYS * rounds * -(-parts // 8)


def section(problem: AttentionProblem, config: KernelConfig, multiprocessors: int) -> int:
    """Heads whose blocks are dealt out together; see ``deal_out_section`` in ``schedule.cuh``.

    As many as have their K and V in L2 together, or, of long sequences, as make up several rounds
    of blocks: there a few blocks of every head are under way at a time and share what they read.
    """
    blocks = blocks_per_head(problem, config)
    head_bytes = 2 * problem.visible_kv * (config.head_dim + config.head_dim_v)
    room = _L2_BYTES // 2 if blocks <= 4 else _L2_BYTES
    heads = max(1, room // max(1, head_bytes))
    size = 1 << heads.bit_length() - 1
    if blocks >= _LONG:
        rounds = -(-_ROUNDS * multiprocessors // blocks)
        size = max(size, 1 << (rounds - 1).bit_length())
    # The scheduler multiplies it by the blocks of a head, in 32 bits: keys that take no room in L2
    # must not make it larger than all heads.
    return min(size, query_blocks(problem, config) // max(1, blocks))
