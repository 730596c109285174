"""The score rules and the mask of attention, as every NumPy path applies them.

What a rule means is said in ``problem.rules``; the float64 oracle and the tiled attention share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple, TypedDict

import numpy as np

from flashcore_cupy.problem.attention_problem import Causal
from flashcore_cupy.problem.blocks import Array, Block, BoolArray, Scores
from flashcore_cupy.problem.mods import MaskMod, ScoreMod, check_mods
from flashcore_cupy.problem.rule import Rule
from flashcore_cupy.problem.rules import RULES, check_softcap


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

    @cached_property
    def scores(self) -> Scores:
        """Sizes of all scores."""
        sizes = self.sizes
        return Scores(sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_kv)

    @cached_property
    def _given(self) -> list[tuple[Rule, Any]]:
        given = [(rule, getattr(self, rule.name)) for rule in RULES]
        return [(rule, value) for rule, value in given if value is not None]

    def apply(self, scores: Array, at: Block) -> None:
        """Turn the products q.k of a block, (M, N), into its scores: in place, in their dtype."""
        scores *= scores.dtype.type(self.scale)
        for rule, value in self._given:
            rule.apply(value, scores, at, self)

    def visible(self, at: Block) -> BoolArray:
        """Return where the queries of a block see its keys, (M, N)."""
        left, right = self.reach
        parts = []
        if at.keys.stop - 1 > at.lowest + self.offset + right:
            parts.append(at.kv_idx <= at.q_idx + (self.offset + right))
        if at.keys.start < at.highest + self.offset - left:
            parts.append(at.kv_idx >= at.q_idx + (self.offset - left))
        seen = (rule.seen(value, at, self) for rule, value in self._given)
        parts += [part for part in seen if part is not None]
        return reduce(np.logical_and, parts) if parts else np.ones(at.shape, np.bool_)

    def doubtful(self, at: Block) -> list[Block]:
        """Return the parts of a block that need a look: in the rest all queries see all keys."""
        if any(rule.acts_on == "keys" for rule, _ in self._given):
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

    def number(self, batch: int) -> int:
        """Return the b of a batch, or of a sequence of a packed batch."""
        return batch if self.sequence is None else self.sequence


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
    for rule in RULES:
        value = getattr(rules, rule.name)
        if rule.takes == "value" or rule.takes == "formula" or value is None:
            continue
        scores = rules.scores
        if rules.sequence is not None and value.ndim == 2 and len(value) > rules.sequence:
            # A packed batch passes the slopes of all its sequences to each of them.
            scores = scores._replace(batch=len(value))
        rule.check_shape(value.shape, scores)
