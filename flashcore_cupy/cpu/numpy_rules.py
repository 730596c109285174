"""The score rules and the mask of attention, as every NumPy path applies them.

Here alone is said what a rule means; the float64 oracle and the tiled attention share it. In this
order, with b, h, i, j for the batch, the query head, the query and the key:

    s = scale * q.k                             softmax_scale
    s = cap * tanh(s / cap)                     softcap
    s = s - slope * |i + offset - j|            alibi_slopes
    s = s + bias[b, h, i, j]                    bias
    s = score_mod(s, b, h, i, j)                score_mod

and then query i sees key j where causal, window, mask and mask_mod all let it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from flashcore_cupy.problem.attention_problem import Causal
from flashcore_cupy.problem.rules import check_softcap
from flashcore_cupy.problem.values import shown

Array: TypeAlias = NDArray[Any]
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]
ScoreMod: TypeAlias = Callable[..., Any]
MaskMod: TypeAlias = Callable[..., Any]


class Sizes(NamedTuple):
    """Sizes of one attention: (B, Hq, Sq, D) x (B, Hkv, Skv, D) x (B, Hkv, Skv, Dv)."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    head_dim_v: int

    @property
    def group(self) -> int:
        """Number of query heads that share a head of K and V."""
        return self.heads_q // self.heads_kv if self.heads_kv else 0


def sizes_of(q: Array, k: Array, v: Array) -> Sizes:
    """Return the sizes of canonical (B, H, S, D) operands; ValueError where they do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {x.shape}; use 4 axes (B, H, S, D)")
    batch, heads_q, seqlen_q, head_dim = q.shape
    _, heads_kv, seqlen_kv, head_dim_v = v.shape
    if k.shape != (batch, heads_kv, seqlen_kv, head_dim) or v.shape[0] != batch:
        raise ValueError(
            f"q, k, v: got shapes {q.shape}, {k.shape}, {v.shape}; use (B, Hq, Sq, D), "
            "(B, Hkv, Skv, D), (B, Hkv, Skv, Dv)"
        )
    if heads_q != heads_kv and (heads_kv == 0 or heads_q % heads_kv):
        raise ValueError(
            f"k: got {heads_kv} heads for q's {heads_q}; "
            "the heads of q are a multiple of those of k and v"
        )
    return Sizes(batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v)


def causal_offset(causal: Causal, seqlen_q: int, seqlen_kv: int) -> int | None:
    """Return the offset of the causal diagonal: query i sees key j iff j <= i + offset.

    None stands for "not causal". True aligns the diagonal with the bottom right corner of the
    scores (the last query sees every key), "top-left" with the top left (query 0 sees key 0 only).
    Raises ValueError for anything else.
    """
    if isinstance(causal, bool):
        return seqlen_kv - seqlen_q if causal else None
    if causal == "top-left":
        return 0
    raise ValueError(f"causal: got {causal!r}; use False, True (bottom-right) or 'top-left'")


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


class RuleArguments(TypedDict, total=False):
    """The keyword arguments that make `Rules`, which tells what they are."""

    softmax_scale: float | None
    causal: Causal
    window: tuple[int, int]
    softcap: float
    alibi_slopes: Array | None
    bias: Array | None
    mask: BoolArray | None
    sink: Array | None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    mod_args: Mapping[str, Any] | None
    sequence: int | None


@dataclass(frozen=True, eq=False)
class Rules:
    """The rules of one attention of these sizes.

    Raises TypeError or ValueError where an argument does not fit the sizes.
    """

    sizes: Sizes
    softmax_scale: float | None = None
    """1 / sqrt(D) by default."""
    causal: Causal = False
    """True (bottom-right) or "top-left": query i sees key j <= i + offset."""
    window: tuple[int, int] = (-1, -1)
    """(left, right): i + offset - left <= j <= i + offset + right; -1 is no bound."""
    softcap: float = 0.0
    """0 is none, and so is infinity."""
    alibi_slopes: Array | None = None
    """(Hq,) or (B, Hq)."""
    bias: Array | None = None
    """Any float dtype; broadcasts to (B, Hq, Sq, Skv)."""
    mask: BoolArray | None = None
    """Where a query may see a key; broadcasts to (B, Hq, Sq, Skv)."""
    sink: Array | None = None
    """(Hq,): a logit per query head that joins the maximum and the denominator, without a value."""
    score_mod: ScoreMod | None = None
    """score_mod(score, b, h, q_idx, kv_idx, **mod_args) on a block: score (M, N), float, which it
    may overwrite; b and h integers; q_idx (M, 1) and kv_idx (1, N), int64. Returns the new scores.
    Called from several threads, on blocks of any size."""
    mask_mod: MaskMod | None = None
    """mask_mod(b, h, q_idx, kv_idx, **mod_args), likewise: booleans that broadcast to (M, N)."""
    mod_args: Mapping[str, Any] | None = None
    """What the two take beside their positional arguments."""
    sequence: int | None = None
    """Of a packed batch, the number of the sequence that the operands, with B = 1, are: the b of
    alibi_slopes (B, Hq), score_mod and mask_mod. None for a batch that is not packed."""

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def scale(self) -> float:
        """The factor of the scores."""
        if self.softmax_scale is None:
            return 1.0 / math.sqrt(self.sizes.head_dim)
        return float(self.softmax_scale)

    @cached_property
    def cap(self) -> float:
        """The softcap as it is applied; 0 is none."""
        return check_softcap(self.softcap)

    @cached_property
    def offset(self) -> int:
        """Query i stands at key i + offset: there the causal diagonal, windows and ALiBi meet."""
        return 0 if self.causal == "top-left" else self.sizes.seqlen_kv - self.sizes.seqlen_q

    @cached_property
    def reach(self) -> tuple[int, int]:
        """How far left and right of i + offset query i sees, causal and window taken together."""
        everything = self.sizes.seqlen_q + self.sizes.seqlen_kv
        left, right = (everything if n < 0 else min(int(n), everything) for n in self.window)
        return left, 0 if self.causal else right

    def sink_of(self, head: int) -> float:
        """Return the sink of a query head; -inf, which adds nothing, if there is none."""
        return -math.inf if self.sink is None else float(self.sink[head])

    def apply(self, scores: Array, at: Block) -> None:
        """Turn the products q.k of a block, (M, N), into its scores: in place, in their dtype."""
        number = scores.dtype.type
        scores *= number(self.scale)
        if self.cap:
            _soften(scores, number(self.cap))
        if self.alibi_slopes is not None:
            distance = np.abs(at.q_idx + self.offset - at.kv_idx).astype(scores.dtype)
            scores -= number(self._slope(at)) * distance
        if self.bias is not None:
            scores += self._cut(self.bias, at).astype(scores.dtype)
        if self.score_mod is not None:
            given = self._number(at.batch), at.head, at.q_idx, at.kv_idx
            result = self.score_mod(scores, *given, **(self.mod_args or {}))
            scores[...] = _fitted("score_mod", _numbers(result), scores.shape)

    def visible(self, at: Block) -> BoolArray:
        """Return where the queries of a block see its keys, (M, N)."""
        left, right = self.reach
        parts = []
        if at.keys.stop - 1 > at.lowest + self.offset + right:
            parts.append(at.kv_idx <= at.q_idx + (self.offset + right))
        if at.keys.start < at.highest + self.offset - left:
            parts.append(at.kv_idx >= at.q_idx + (self.offset - left))
        if self.mask is not None:
            parts.append(self._cut(self.mask, at))
        if self.mask_mod is not None:
            given = self._number(at.batch), at.head, at.q_idx, at.kv_idx
            parts.append(_flags(self.mask_mod(*given, **(self.mod_args or {})), at.shape))
        return reduce(np.logical_and, parts) if parts else np.ones(at.shape, np.bool_)

    def doubtful(self, at: Block) -> list[Block]:
        """Return the parts of a block that need a look: in the rest all queries see all keys."""
        if self.mask is not None or self.mask_mod is not None:
            return [at]
        left, right = self.reach
        first = max(at.keys.start, at.highest + self.offset - left)
        end = min(at.keys.stop, at.lowest + self.offset + right + 1)
        if first >= end:
            return [at]
        edges = slice(at.keys.start, first), slice(end, at.keys.stop)
        return [at._replace(keys=keys) for keys in edges if keys.start < keys.stop]

    def keys_seen(self, lowest: int, highest: int) -> slice:
        """Return the keys that causal and window leave to any query between these, inclusive."""
        left, right = self.reach
        start = min(max(0, lowest + self.offset - left), self.sizes.seqlen_kv)
        end = min(highest + self.offset + right + 1, self.sizes.seqlen_kv)
        return slice(start, max(start, end))

    def _number(self, batch: int) -> int:
        return batch if self.sequence is None else self.sequence

    def _slope(self, at: Block) -> float:
        slopes = np.asarray(self.alibi_slopes)
        of_batch = slopes if slopes.ndim == 1 else slopes[self._number(at.batch)]
        return float(of_batch[at.head])

    def _cut(self, x: Array, at: Block) -> Array:
        """A block of an array that broadcasts to (B, Hq, Sq, Skv), the only part that is copied."""
        sizes = self.sizes
        shape = sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_kv
        cut: Array = np.broadcast_to(x, shape)[at.batch, at.head, at.queries, at.keys]
        return cut


def _soften(scores: Array, cap: Any) -> None:
    """Turn scores into cap tanh(score / cap), in place."""
    with np.errstate(all="ignore"):
        ratio = scores / cap
        # There tanh(x) is x to the last bit; and x, if subnormal, has lost bits of the score.
        same = np.abs(ratio) < math.sqrt(np.finfo(scores.dtype).eps)
        np.tanh(ratio, out=ratio)
        ratio *= cap
    np.copyto(scores, ratio, where=~same)


def _numbers(result: Any) -> Array:
    """What a score_mod returned; ``TypeError`` unless that is numbers, or an array of them."""
    return _returned("score_mod", result, "the block's new scores, real numbers", _is_real)


def _flags(result: Any, shape: tuple[int, ...]) -> BoolArray:
    flags = _returned("mask_mod", result, "booleans, True where a query attends", _is_bool)
    return _fitted("mask_mod", flags, shape)


def _is_real(dtype: np.dtype[Any]) -> bool:
    # The float types that NumPy does not know itself, such as bfloat16, are of kind V, as records.
    return dtype.kind in "iuf" or (dtype.kind == "V" and "float" in dtype.name)


def _is_bool(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "b"


def _returned(
    name: str, result: Any, wanted: str, is_right: Callable[[np.dtype[Any]], bool]
) -> Array:
    try:
        # A masked array loses its mask like this.
        array = None if isinstance(result, np.ma.MaskedArray) else np.asarray(result)
    except Exception as error:  # of whatever the user returned: a ragged list, a traced array
        raise TypeError(f"{name}: returned {shown(result)}; return {wanted}") from error
    if array is None or not is_right(array.dtype):
        kind = "" if array is None or array.dtype == object else f", dtype {array.dtype.name}"
        raise TypeError(f"{name}: returned {shown(result)}{kind}; return {wanted}")
    return array


def _fitted(name: str, result: Array, shape: tuple[int, ...]) -> Array:
    try:
        return np.broadcast_to(result, shape)
    except ValueError:
        got = result.shape
        raise ValueError(f"{name}: returned shape {got}; return the block's, {shape}") from None


def check_mods(score_mod: Any, mask_mod: Any, mod_args: Mapping[str, Any] | None) -> None:
    """Raise ``TypeError`` unless these are None, or callables that take what they will be given."""
    for name, mod, first in (("score_mod", score_mod, "score, "), ("mask_mod", mask_mod, "")):
        if mod is None:
            continue
        call = f"{name}({first}b, h, q_idx, kv_idx, **mod_args)"
        if not callable(mod):
            raise TypeError(
                f"{name}: got {type(mod).__name__}; on NumPy arrays pass a callable, {call}"
            )
        try:
            signature = inspect.signature(mod)
        except (TypeError, ValueError):  # a function of C need not tell
            continue
        try:
            signature.bind(*[None] * (4 + len(first.split())), **(mod_args or {}))
        except TypeError as error:
            raise TypeError(f"{name}: cannot be called as {call}: {error}") from None


def _check(rules: Rules) -> None:
    sizes = rules.sizes
    causal_offset(rules.causal, sizes.seqlen_q, sizes.seqlen_kv)  # refuses what it does not know
    window = rules.window
    integral = isinstance(window, tuple | list) and all(
        isinstance(n, int | np.integer) and n >= -1 for n in window
    )
    if not integral or len(window) != 2:
        raise ValueError(
            f"window: got {window!r}; use (left, right), integers from 0, or -1 for no bound"
        )
    check_softcap(rules.softcap)
    if rules.sequence is not None and sizes.batch != 1:
        raise ValueError(f"sequence: got operands with B = {sizes.batch}; one sequence has B = 1")
    _check_shapes(rules)
    if rules.mask is not None and rules.mask.dtype != np.bool_:
        raise TypeError(f"mask: got dtype {rules.mask.dtype.name}; use booleans, True = attend")
    check_mods(rules.score_mod, rules.mask_mod, rules.mod_args)


def _check_shapes(rules: Rules) -> None:
    sizes = rules.sizes
    full = sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_kv
    for name, x in (("bias", rules.bias), ("mask", rules.mask)):
        if x is not None and not _broadcasts(x.shape, full):
            raise ValueError(
                f"{name}: got shape {x.shape}; use one that broadcasts to (B, Hq, Sq, Skv) = {full}"
            )
    heads = (sizes.heads_q,)
    if rules.sink is not None and rules.sink.shape != heads:
        raise ValueError(f"sink: got shape {rules.sink.shape}; use (Hq,) = {heads}")
    slopes = rules.alibi_slopes
    if slopes is not None and slopes.shape != heads:
        # A packed batch passes the slopes of all its sequences to each of them.
        whole = rules.sequence is not None and slopes.ndim == 2 and len(slopes) > rules.sequence
        batch = len(slopes) if whole else sizes.batch
        if slopes.shape != (batch, *heads):
            raise ValueError(
                f"alibi_slopes: got shape {slopes.shape}; use (Hq,) = {heads} or "
                f"(B, Hq) = {(batch, *heads)}"
            )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    axes = zip(shape[::-1], to[::-1], strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in axes)
