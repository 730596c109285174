"""The interface of a score rule; ``rules`` has one record per rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from flashcore_cupy.problem.blocks import Around, Array, Block, BoolArray, ScoreShape

# Element strides of arrays, as ``AttentionParams`` has them.
HEAD_STRIDES = np.dtype([("batch", "i8"), ("head", "i8")])
BROADCAST_STRIDES = np.dtype([("batch", "i8"), ("head", "i8"), ("row", "i8"), ("column", "i8")])


@dataclass(frozen=True)
class Broadcast:
    """An array that is broadcast to (B, Hq, Sq, Skv)."""

    dtype: str
    strides: tuple[int, int, int, int]
    """Elements; 0 along an axis that the array lacks."""
    pairs: bool
    """Two neighbouring keys can be loaded at once."""
    chunks: bool = False
    """Of a mask: 16 of them can."""


class Bounds(NamedTuple):
    """What holds of all scores in fp32."""

    largest: float
    """Of their magnitudes."""
    error: float

    def rounded(self, largest: float) -> Bounds:
        """Return what holds once they have been changed, and are at most so large."""
        return Bounds(largest, self.error + largest * 2.0**-22)


class Rows(NamedTuple):
    """What the gradient of a sink needs of some rows of one head."""

    head: int
    lse: Array
    """(M,), natural log."""
    delta: Array
    """(M,): the sum over columns of do * o, less dlse."""


class Slopes(NamedTuple):
    """The derivatives of a block of scores (M, N) after a rule, each (M, N)."""

    score: Array | None = None
    """By what they were before; None where it is 1."""
    elements: Mapping[tuple[str, int], Array] = {}
    """By elements of mod_args: by the array's name, and the element's number in C order."""

    def each(self, f: Callable[[Array], Array]) -> Slopes:
        """Return f of each of them."""
        score = None if self.score is None else f(self.score)
        return Slopes(score, {element: f(x) for element, x in self.elements.items()})


class Rule:
    """One argument of ``attention`` that changes scores, or hides keys: all that is said of it."""

    name: ClassVar[str]
    default: ClassVar[Any] = None
    takes: ClassVar[Literal["value", "array", "numbers per head", "formula", "blocks"]] = "array"
    acts_on: ClassVar[Literal["scores", "keys", "positions", "sum", "probabilities"]] = "scores"
    """It changes scores; or it hides keys, one by one or all that are too far; or it joins the sum
    of a row's exponentials; or it changes what the softmax gives."""
    codes: ClassVar[Mapping[str, int]] = {}
    """Its bits in ``FC_RULES``, by name; ``score.cuh`` has the same."""
    load_codes: ClassVar[Mapping[str, int]] = {}
    """More of them, which say how its array is loaded."""
    pointer: ClassVar[str | None] = None
    """The field of ``AttentionParams`` that holds its array's address."""
    strides: ClassVar[np.dtype[Any] | None] = None
    """Those of that array, in the field ``<pointer>_strides``; None if a kernel needs none."""
    numbers: ClassVar[tuple[str, ...]] = ()
    """More fields of ``AttentionParams``, float32."""
    integers: ClassVar[tuple[str, ...]] = ()
    """And int32."""
    when_packed: ClassVar[str | None] = None
    """What to use instead in a packed batch; None if it goes with one."""
    has_gradient: ClassVar[bool] = False
    """Its array has one: it implements ``add_gradient`` or ``add_row_gradient``, and ``axes``."""

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> Any:
        """Check the argument and describe it without its data; ``dtype`` is q's."""
        raise NotImplementedError

    # Of a call that has the rule; ``described``: what ``describe`` has returned.

    def bits(self, described: Any, dtype: str) -> tuple[str, ...]:
        """Return the names in ``codes`` of what its kernel is built with."""
        return tuple(self.codes)[:1]

    def loads(self, described: Any) -> tuple[str, ...]:
        """Return those in ``load_codes``."""
        return ()

    def params(self, described: Any) -> dict[str, Any]:
        """Return its fields of ``AttentionParams``, besides the address of its array."""
        return {}

    def differs_by_head(self, described: Any) -> bool:
        """Whether it may hide a key, or drop it, from one query head and not from another."""
        return False

    def check(self, value: Any, scores: ScoreShape) -> None:
        """Raise ``TypeError`` or ``ValueError`` for an array that does not fit the scores."""

    def apply(self, value: Any, scores: Array, at: Block, around: Around) -> None:
        """Change a block of scores (M, N) in place, in their dtype."""

    def linearize(self, value: Any, scores: Array, at: Block, around: Around) -> Slopes:
        """Change a block as ``apply`` does; return the derivatives of what it becomes."""
        self.apply(value, scores, at, around)
        return Slopes()

    def axes(self, value: Any) -> tuple[bool, bool]:
        """Whether its array has an axis of batches, and one of heads."""
        raise NotImplementedError

    def add_gradient(self, into: Array, d_scores: Array, at: Block, around: Around) -> None:
        """Add what the gradient of a block of scores that it has changed gives its array's."""

    def add_row_gradient(self, value: Any, into: Array, rows: Rows) -> None:
        """Add what rows give its array's gradient, if it joins their sums."""

    def bounds(self, value: Any, before: Bounds, scores: ScoreShape) -> Bounds:
        """Return what holds of scores that it has changed, from what held before."""
        return before

    def seen(self, value: Any, at: Block, around: Around) -> BoolArray | None:
        """Return where the queries of a block see its keys, (M, N); None for everywhere."""
        return None

    def granted(self, value: Any, at: Block, around: Around) -> BoolArray | None:
        """Return where no other rule that hides keys one by one is asked; None for nowhere."""
        return None


class BroadcastRule(Rule):
    """An array that broadcasts to the scores."""

    strides = BROADCAST_STRIDES

    def axes(self, value: Any) -> tuple[bool, bool]:
        """It has those along which it is not broadcast."""
        batches, heads = ((1,) * (4 - value.ndim) + tuple(value.shape))[:2]
        return batches > 1, heads > 1

    def check(self, value: Any, scores: ScoreShape) -> None:
        """(B, Hq, Sq, Skv), or what broadcasts to it."""
        shape = tuple(value.shape)
        axes = zip(shape[::-1], tuple(scores)[::-1], strict=False)
        if len(shape) > 4 or not all(n in (1, wanted) for n, wanted in axes):
            raise ValueError(
                f"{self.name}: got shape {shape}, which does not broadcast to "
                f"(B, Hq, Sq, Skv) = {tuple(scores)}"
            )

    def broadcast(self, x: Any, scores: ScoreShape) -> Broadcast:
        """Describe an array."""
        shape, size = tuple(x.shape), x.dtype.itemsize
        self.check(x, scores)
        own = [0 if n == 1 else s // size for n, s in zip(shape, x.strides, strict=True)]
        strides = (*(0,) * (4 - len(shape)), *own)

        def loads(keys: int) -> bool:
            aligned = x.address % (keys * size) == 0 and all(s % keys == 0 for s in strides[:3])
            return aligned and strides[3] == 1 and scores.seqlen_kv % keys == 0

        chunks = size == 1 and loads(16)
        return Broadcast(x.dtype.name, strides, loads(2), chunks)  # type: ignore[arg-type]


class PerHeadRule(Rule):
    """A number per query head."""

    takes = "numbers per head"
    has_gradient = True

    def axes(self, value: Any) -> tuple[bool, bool]:
        """Heads, and before them batches, if there are two."""
        return value.ndim > 1, True

    def of_batch(self, values: Array, number: int) -> Array:
        """Return the heads' numbers for a batch, (Hq,), as a view."""
        return values if values.ndim == 1 else values[number]

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> Any:
        """Return True: there are any."""
        self.check(value, scores)
        if value.dtype.name != "float32":
            raise TypeError(f"{self.name}: got dtype {value.dtype.name}; use float32")
        return True

    def check(self, value: Any, scores: ScoreShape) -> None:
        """(Hq,)."""
        if tuple(value.shape) != (scores.heads,):
            raise ValueError(
                f"{self.name}: got shape {tuple(value.shape)}; use (Hq,) = ({scores.heads},)"
            )
