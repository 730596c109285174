"""Blocks of scores on the host, and the names of their arrays' types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]


class ScoreShape(NamedTuple):
    """The shape of all scores of a call, (B, Hq, Sq, Skv)."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_kv: int


class Block(NamedTuple):
    """The place of a block of scores (M, N): some queries of one head by consecutive keys."""

    batch: int
    head: int
    """The query head."""
    queries: IntArray
    """Positions (M,), in any order."""
    lowest: int
    highest: int
    """Of the queries."""
    keys: slice
    """Start and stop, inside the sequence: N keys."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)."""
        return len(self.queries), self.keys.stop - self.keys.start

    @property
    def q_idx(self) -> IntArray:
        """The queries as a column, (M, 1)."""
        return self.queries[:, None]

    @property
    def kv_idx(self) -> IntArray:
        """The keys as a row, (1, N)."""
        return np.arange(self.keys.start, self.keys.stop)[None, :]


class Around(Protocol):
    """What a rule's formula needs to know besides the block: of the whole call."""

    @property
    def scores(self) -> ScoreShape:
        """Sizes of all scores."""

    @property
    def offset(self) -> int:
        """Query i stands at key i + offset."""

    @property
    def mod_args(self) -> Mapping[str, Any] | None:
        """The arrays that score_mod and mask_mod use."""

    @property
    def score_mod_grad(self) -> Callable[..., Any] | None:
        """The derivative of score_mod, if its user gives it."""

    @property
    def mod_gradients(self) -> tuple[str, ...]:
        """The names of those of mod_args that scores are differentiated by."""

    def number(self, batch: int) -> int:
        """Return the b of a batch, or of a sequence of a packed batch."""


def cut(x: Array, at: Block, around: Around) -> Array:
    """Return a block of an array that broadcasts to (B, Hq, Sq, Skv), the only part copied."""
    block: Array = np.broadcast_to(x, tuple(around.scores))[at.batch, at.head, at.queries, at.keys]
    return block


def add_to_broadcast(x: Array, block: Array, at: Block) -> None:
    """Add a block (M, N) to an array that broadcasts to (B, Hq, Sq, Skv), summed where it does."""
    whole = x.reshape((1,) * (4 - x.ndim) + x.shape)  # a view
    batches, heads, rows, columns = np.greater(whole.shape, 1)
    one = whole[at.batch if batches else 0, at.head if heads else 0]
    over = tuple(axis for axis, varies in enumerate((rows, columns)) if not varies)
    part = one[:, at.keys] if columns else one
    part[at.queries if rows else slice(None)] += block.sum(axis=over, keepdims=True)


def distances(at: Block, around: Around) -> IntArray:
    """How far the keys of a block are from where its queries stand, (M, N)."""
    apart: IntArray = np.abs(at.q_idx + around.offset - at.kv_idx)
    return apart
