"""Block masks with a dense twin: lists as they come from anywhere, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashcore_cupy.cpu import reference
from flashcore_cupy.problem.block_mask import BlockMask

EMPTY, MIXED, FULL = 0, 1, 2
#: A rule of mixed blocks, as a kernel takes it and as NumPy does.
RULE = "(kv_idx * 7 + q_idx * 3 + h) % 5 < 3"


def rule(b: Any, h: Any, q_idx: Any, kv_idx: Any, **_: Any) -> Any:
    return (kv_idx * 7 + q_idx * 3 + h) % 5 < 3


@dataclass(frozen=True)
class Drawn:
    """The states of blocks, (B or 1, heads or 1, Qb, Kb), and the sizes that they are of."""

    states: np.ndarray
    seqlens: tuple[int, int]
    block: tuple[int, int]

    def lists(self, rng: np.random.Generator, *, stray: bool = False) -> list[np.ndarray]:
        """Counts and indices of mixed blocks, and of full ones, in any order.

        stray: some indices are out of range, and one count is larger than there is room.
        """
        found = []
        for state in (MIXED, FULL):
            *rows, columns = self.states.shape
            room = columns + 2 * stray
            counts = np.zeros(rows, np.int32)
            indices = np.full((*rows, room), 2**30, np.int32)  # behind the count: anything
            for row in np.ndindex(*rows):
                own = np.flatnonzero(self.states[row] == state)
                own = rng.permutation(own)
                if stray:
                    own = np.insert(own, rng.integers(len(own) + 1), (columns, -1))
                counts[row] = len(own)
                indices[row][: len(own)] = own
                if stray and len(own) == room:
                    counts[row] = 2**30
            found += [counts, indices]
        return found

    def mask(self, xp: Any, rng: np.random.Generator, **how: Any) -> BlockMask:
        """The block mask, of arrays of a module."""
        lists = [xp.asarray(x) for x in self.lists(rng, **how)]
        return BlockMask.from_lists(
            *lists, seqlen_q=self.seqlens[0], seqlen_kv=self.seqlens[1], block=self.block
        )

    def elements(self, state: int | None) -> np.ndarray:
        """Where blocks have a state, or are listed at all, (B or 1, heads or 1, Sq, Skv)."""
        states = self.states
        for axis, size in enumerate(self.block, 2):
            states = np.repeat(states, size, axis=axis)
        states = states[:, :, : self.seqlens[0], : self.seqlens[1]]
        return states != EMPTY if state is None else states == state

    def dense(self, heads: int) -> np.ndarray:
        """Where a query sees a key, (B or 1, heads, Sq, Skv), the mixed blocks by ``rule``."""
        full, mixed = (
            np.repeat(self.elements(state), heads // self.states.shape[1], axis=1)
            for state in (FULL, MIXED)
        )
        h, q_idx, kv_idx = np.ogrid[:heads, : self.seqlens[0], : self.seqlens[1]]
        return full | (mixed & rule(0, h, q_idx, kv_idx))


def drawn(
    rng: np.random.Generator,
    seqlens: tuple[int, int],
    block: tuple[int, int],
    lists: tuple[int, int] = (1, 1),
    shares: tuple[float, float, float] = (0.5, 0.25, 0.25),
    *,
    unseen: int | None = None,
) -> Drawn:
    """Draw states; shares: of empty, mixed and full blocks. One row of blocks is empty.

    unseen: a column of blocks that is, too, if there is one.
    """
    rows, columns = (-(-n // size) for n, size in zip(seqlens, block, strict=True))
    states = rng.choice(3, (*lists, rows, columns), p=shares).astype(np.uint8)
    if rows > 2:
        states[:, :, 1] = EMPTY
    if unseen is not None:
        states[:, :, :, unseen : unseen + 1] = EMPTY
    return Drawn(states, seqlens, block)


def poisoned_keys(x: np.ndarray, dense: np.ndarray, heads_kv: int) -> np.ndarray:
    """Keys or values with NaN in each row that no query of the head's group sees."""
    batches = np.broadcast_to(dense, (len(x), *dense.shape[1:]))
    group = dense.shape[1] // heads_kv
    seen = batches.reshape(len(x), heads_kv, group, *dense.shape[2:]).any(axis=(2, 3))
    return np.where(seen[..., None], x, np.asarray(np.nan, x.dtype))


def poisoned_queries(x: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Queries with NaN in each row that sees no key."""
    return np.where(dense.any(axis=3)[..., None], x, np.asarray(np.nan, x.dtype))


def operands() -> Any:
    """q, k and v: 2 batches, 4 heads over 2, 200 queries, 300 keys."""
    return reference.make_inputs(
        "normal", batch=2, heads=4, heads_kv=2, head_dim=32, seqlen=200, seqlen_kv=300
    )


def with_its_rule() -> tuple[BlockMask, np.ndarray]:
    """A block mask of these that has its rule, and the same as a dense one."""
    rng = np.random.default_rng(1)
    draw = drawn(rng, (200, 300), (64, 128), (2, 2))
    return replace(draw.mask(np, rng, stray=True), mask_mod=rule), draw.dense(4)
