"""How a problem's work is cut: blocks of rows, and splits of their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.select.config import KernelConfig

_MOST_SPLITS = 128
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
    blocks = query_blocks(problem, config) * config.tile.cluster
    launched = (*config.before(), config)
    return max(grid for each in launched for grid in each.grids(problem, blocks))


def blocks_per_head(problem: AttentionProblem, config: KernelConfig) -> int:
    """Blocks of rows per head of q, or of k and v where a group's heads are packed."""
    block_m, rows = config.tile.block_m, rows_per_head(problem, config)
    # Each packed sequence may start within a block, and so may the rows before and behind them: see
    # PackedBatch in work.cuh.
    return rows // block_m + problem.batch + 2 if problem.packed else -(-rows // block_m)


def rows_per_head(problem: AttentionProblem, config: KernelConfig) -> int:
    """Rows per head of q, or of k and v where a group's heads are packed."""
    group = problem.heads_q // problem.heads_kv if config.tile.pack_gqa else 1
    return problem.seqlen_q * group


def query_blocks(problem: AttentionProblem, config: KernelConfig) -> int:
    """Blocks of rows of all heads and sequences."""
    group = problem.heads_q // problem.heads_kv if config.tile.pack_gqa else 1
    return _heads(problem) // group * blocks_per_head(problem, config)


class Split(NamedTuple):
    """A number of splits of the keys, and what it makes of a grid."""

    splits: int
    waves: int
    """Rounds of the thread blocks that fit on the GPU side by side."""
    own_keys: int
    """Keys that are read in all rounds, one thread block after the other."""
    share: float
    """Keys that each would read if all that fit were busy to the end."""


def fastest_split(
    problem: AttentionProblem,
    config: KernelConfig,
    resident: int,
    cost: Callable[[Split], float],
) -> int:
    """The number of splits that ends first by ``cost``, a time in keys; of equals the fewest keys.

    ``resident`` thread blocks run side by side on the GPU. Each takes as long as its keys, and some
    more to begin and to combine.
    """
    if not config.tile.split_kv or problem.batch_invariant:
        return 1
    blocks, keys = query_blocks(problem, config), problem.visible_kv
    most = min(_MOST_SPLITS, max(1, MAX_BLOCKS // max(1, blocks)))
    if problem.packed:  # on average; only the device knows the lengths
        keys = -(-keys // max(1, problem.batch))
        blocks = max(1, blocks // 2)  # about every other one has no sequence
    tiles = max(1, -(-keys // config.tile.block_n))

    def order(splits: int) -> tuple[float, int]:
        waves = -(-blocks * splits // resident)
        own = waves * -(-tiles // splits) * config.tile.block_n
        return cost(Split(splits, waves, own, blocks * keys / resident)), own

    return min(range(1, min(tiles, most) + 1), key=order)
