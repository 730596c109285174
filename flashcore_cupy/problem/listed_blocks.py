"""The rule of block masks: which blocks of scores are computed, and in which rules are asked.

What a user makes is a ``block_mask.BlockMask``; here are its lists as a call takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from flashcore_cupy.problem.blocks import Around, Array, Block, BoolArray, ScoreShape
from flashcore_cupy.problem.rule import Rule

#: Queries and keys that a block may have. ``listed_tiles.cuh`` has shifts.
BLOCK_SIZES = (64, 128)
#: The arrays of a block mask: of mixed blocks and of full ones, counts and indices.
LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
#: The state of a block, as a grid of blocks has it.
EMPTY, MIXED, FULL = 0, 1, 2


@dataclass(frozen=True)
class Lists:
    """The lists of a block mask, where the kernel or NumPy reads them."""

    arrays: Mapping[str, Any]
    """Some of ``LISTS``, by name."""
    block: tuple[int, int]
    seqlens: tuple[int, int]
    rule_heads: int = 1
    """Heads that its own rule tells apart: 1, or all of q."""

    @cached_property
    def grid(self) -> Array:
        """The state of each block, (B or 1, heads or 1, Qb, Kb), of NumPy's arrays."""
        grid: Array = state_grid(self.arrays, self.block, self.seqlens, np)
        return grid


class BlockLists(NamedTuple):
    """The same without the data, and so a part of the key of whatever is built."""

    block: tuple[int, int]
    batches: int
    heads: int
    """Of the lists: 1, or a divisor of Hq."""
    capacity: tuple[int, int]
    """Indices of mixed and of full blocks that there is room for, per block of queries."""
    strides: tuple[tuple[int, ...], ...]
    """Elements, of each of ``LISTS``; empty of one that there is not."""
    made: bool = False
    """The call makes them from its own mask and mask_mod, in scratch: nobody has passed any."""


def blocks_of(length: int, block: int) -> int:
    """How many blocks a sequence has."""
    return -(-length // block)


def state_grid(
    arrays: Mapping[str, Any], block: tuple[int, int], seqlens: tuple[int, int], xp: Any
) -> Any:
    """The state of each block, uint8, from lists; indices and counts out of range are left out."""
    columns = blocks_of(seqlens[1], block[1])
    grid = None
    for state, counts, indices in ((MIXED, *LISTS[:2]), (FULL, *LISTS[2:])):
        if counts not in arrays:
            continue
        listed = _listed(arrays[counts], arrays[indices], columns, xp)
        if grid is None:
            grid = listed.astype(xp.uint8) * xp.uint8(state)
        else:
            grid = xp.where(listed, xp.uint8(state), grid)
    return grid


def _listed(counts: Any, indices: Any, columns: int, xp: Any) -> Any:
    """Which blocks are in a list, (..., Qb, Kb) bool."""
    rows, capacity = counts.size, indices.shape[-1]
    if xp is np:  # which knows what they hold: no list is longer than this
        capacity = min(capacity, max(0, int(counts.max(initial=0))))
    nth = xp.arange(capacity)[None, :]
    flat = indices[..., :capacity].reshape(rows, capacity).astype(xp.int64)
    inside = (nth < counts.reshape(rows, 1)) & (flat >= 0) & (flat < columns)
    found = xp.zeros((rows, columns + 1), xp.bool_)  # the last column takes what is out of range
    row = xp.arange(rows)[:, None] * (columns + 1)
    found.reshape(-1)[(row + xp.where(inside, flat, columns)).reshape(-1)] = True
    return found[:, :columns].reshape(*counts.shape, columns)


class BlockMaskRule(Rule):
    """Lists of blocks; FlexAttention, Dong et al. 2024, arXiv 2412.05496, section 4.3."""

    name, takes, when_packed = "block_mask", "blocks", "mask_mod"
    acts_on = "keys"
    codes: ClassVar = {"blocks": 16384}
    integers = ("list_batches", "list_heads", "list_shift_q", "list_shift_kv")

    def describe(self, value: Lists, scores: ScoreShape, dtype: str) -> BlockLists:
        """Return sizes and strides of the lists."""
        self.check(value, scores)
        arrays = value.arrays
        batches, heads = next(x.shape[:2] for name, x in arrays.items() if name in LISTS[::2])
        # No count is larger than int32 holds.
        room = (arrays[name].shape[-1] if name in arrays else 0 for name in LISTS[1::2])
        capacity = [min(n, 2**31 - 1) for n in room]
        strides = (
            tuple(s // 4 for s in arrays[name].strides) if name in arrays else () for name in LISTS
        )
        return BlockLists(value.block, batches, heads, (capacity[0], capacity[1]), tuple(strides))

    def params(self, described: BlockLists) -> dict[str, Any]:
        """Return the sizes of lists and blocks."""
        shifts = [size.bit_length() - 1 for size in described.block]
        given = (described.batches, described.heads, *shifts)
        return dict(zip(self.integers, given, strict=True))

    def differs_by_head(self, described: BlockLists) -> bool:
        """A list is of one head's queries."""
        return True

    def check(self, value: Lists, scores: ScoreShape) -> None:
        """Lists of these lengths, of all batches and heads or of some that share them."""
        wanted = (scores.seqlen_q, scores.seqlen_kv)
        if value.seqlens != wanted:
            raise ValueError(
                f"block_mask: is of (Sq, Skv) = {value.seqlens}, but q and k have {wanted}"
            )
        counts = next(x for name, x in value.arrays.items() if name in LISTS[::2])
        batches, heads = counts.shape[:2]
        if batches not in (1, scores.batch):
            raise ValueError(
                f"block_mask: has lists of {batches} batches, but q has {scores.batch}; use as "
                f"many, or 1"
            )
        if heads == 0 or scores.heads % heads:
            raise ValueError(
                f"block_mask: has lists of {heads} heads, but q has {scores.heads}; use 1, or as "
                f"many as k or q has"
            )

        if value.rule_heads not in (1, scores.heads):
            raise ValueError(
                f"block_mask: its intervals are of {value.rule_heads} heads, but q has "
                f"{scores.heads}; use 1, or as many as q has"
            )

    def seen(self, value: Lists, at: Block, around: Around) -> BoolArray:
        """Return where the blocks are listed."""
        listed: BoolArray = self._states(value, at, around) != EMPTY
        return listed

    def granted(self, value: Lists, at: Block, around: Around) -> BoolArray:
        """Return where the blocks are full."""
        full: BoolArray = self._states(value, at, around) == FULL
        return full

    def _states(self, value: Lists, at: Block, around: Around) -> Array:
        grid = value.grid
        heads = around.scores.heads // grid.shape[1]
        own = grid[0 if len(grid) == 1 else at.batch, at.head // heads]
        states: Array = own[at.q_idx // value.block[0], at.kv_idx // value.block[1]]
        return states
