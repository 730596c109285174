"""The score rules and the mask of attention, as every NumPy path applies them.

What a rule means is said in ``problem.rules``; the float64 oracle and the tiled attention share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any, NamedTuple

import numpy as np

from flashcore_cupy.problem.attention_problem import Causal
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.blocks import Array, Block, BoolArray, ScoreShape
from flashcore_cupy.problem.mod_elements import MOD_ARGS, mod_args_among
from flashcore_cupy.problem.mods import check_mods
from flashcore_cupy.problem.philox import Dropout
from flashcore_cupy.problem.rng import missing_rng
from flashcore_cupy.problem.rule import Rows, Rule, Slopes
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.problem.values import check_names


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


class NumpyRules:
    """The rules of one attention of these sizes.

    Takes ``attention``'s arguments of the same names, as NumPy arrays and callables: softmax_scale,
    causal, rng, mod_args, and every rule of ``problem.rules.RULES``; and the derivative of a
    score_mod, if its user gives it. ``mod_gradients``: the names of those of mod_args that
    ``linearize`` differentiates by. ``sequence``: of a packed batch, the number of the sequence
    that the operands, with B = 1, are: the b of alibi_slopes (B, Hq), score_mod, mask_mod and
    dropout; None for a batch that is not packed.

    Raises TypeError or ValueError where an argument does not fit the sizes.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        softmax_scale: float | None = None,
        causal: Causal = False,
        mod_args: Mapping[str, Any] | None = None,
        score_mod_grad: Callable[..., Any] | None = None,
        mod_gradients: tuple[str, ...] = (),
        sequence: int | None = None,
        rng: Any = None,
        **rules: Any,
    ) -> None:
        causal_offset(causal, sizes.seqlen_q, sizes.seqlen_kv)  # refuses what it does not know
        check_names("attention", rules, [rule.name for rule in RULES])
        if sequence is not None and sizes.batch != 1:
            raise ValueError(
                f"sequence: got operands with B = {sizes.batch}; one sequence has B = 1"
            )
        self.sizes, self.causal, self.sequence = sizes, causal, sequence
        self.softmax_scale, self.mod_args = softmax_scale, mod_args
        self.score_mod_grad, self.mod_gradients = score_mod_grad, mod_gradients
        values = {
            rule.name: self._checked(rule, rules.get(rule.name, rule.default)) for rule in RULES
        }
        self._window, self._sink = values["window"], values["sink"]
        self.keep_scale, self._dropout = _dropout_of(values["dropout_p"], rng)
        self._given = [(rule, values[rule.name]) for rule in RULES if values[rule.name] is not None]
        check_mods(rules.get("score_mod"), rules.get("mask_mod"), mod_args)

    def _checked(self, rule: Rule, value: Any) -> Any:
        if rule.takes == "value":
            return rule.describe(value, self.scores, "float64")
        if rule.takes == "formula" or value is None:
            return value
        if isinstance(value, BlockMask):
            value = value.lists(cpu=True)
        scores = self.scores
        if self.sequence is not None and value.ndim == 2 and len(value) > self.sequence:
            # A packed batch passes the slopes of all its sequences to each of them.
            scores = scores._replace(batch=len(value))
        rule.check(value, scores)
        return value

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
        left, right = (everything if n < 0 else min(n, everything) for n in self._window)
        return left, 0 if self.causal else right

    def sink_of(self, head: int) -> float:
        """Return the sink of a query head; -inf, which adds nothing, if there is none."""
        return -math.inf if self._sink is None else float(self._sink[head])

    def drop(self, x: Array, at: Block) -> None:
        """Set a block (M, N) to 0 where dropout drops its probabilities, in place.

        What is left is to be multiplied by ``keep_scale``.
        """
        if self._dropout is not None:
            batch = self.number(at.batch)
            kept = self._dropout.kept(batch, at.head, at.queries, at.keys)
            np.copyto(x, 0, where=~kept)

    @cached_property
    def scores(self) -> ScoreShape:
        """Sizes of all scores."""
        sizes = self.sizes
        return ScoreShape(sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_kv)

    def apply(self, scores: Array, at: Block) -> None:
        """Turn the products q.k of a block, (M, N), into its scores: in place, in their dtype."""
        scores *= scores.dtype.type(self.scale)
        for rule, value in self._given:
            rule.apply(value, scores, at, self)

    def linearize(self, scores: Array, at: Block) -> list[Slopes]:
        """``apply``; return each rule's derivatives."""
        scores *= scores.dtype.type(self.scale)
        return [rule.linearize(value, scores, at, self) for rule, value in self._given]

    def pull_back(
        self, d: Array, derivatives: Sequence[Slopes], into: Mapping[str, Array], at: Block
    ) -> None:
        """Turn the gradient of a block's scores into that of scale * q.k, in place.

        ``derivatives`` are those of ``linearize``. ``into``: arrays of rules' gradients, by name;
        the block's part is added. Where the gradient is 0 it stays so, whatever the derivative.
        """
        steps = zip(self._given, derivatives, strict=True)
        for (rule, _), slopes in reversed(list(steps)):
            if rule.name in into:
                rule.add_gradient(into[rule.name], d, at, self)
            for (name, number), slope in slopes.elements.items():
                if (target := into.get(f"{MOD_ARGS}{name}")) is not None:
                    target.flat[number] += np.sum(d * slope, where=d != 0)
            if slopes.score is not None:
                np.multiply(d, slopes.score, out=d, where=d != 0)

    def gradient_axes(self, names: Collection[str]) -> tuple[bool, bool]:
        """Whether all of these rules' arrays tell batches apart, and whether they tell heads."""
        if mod_args_among(names):  # as their user has it
            return False, False
        axes = [rule.axes(value) for rule, value in self._given if rule.name in names]
        return all(batches for batches, _ in axes), all(heads for _, heads in axes)

    def add_row_gradients(self, into: Mapping[str, Array], rows: Rows) -> None:
        """Add what rows give the gradients of what joins their sums."""
        for rule, value in self._given:
            if rule.name in into:
                rule.add_row_gradient(value, into[rule.name], rows)

    def visible(self, at: Block) -> BoolArray:
        """Return where the queries of a block see its keys, (M, N)."""
        left, right = self.reach
        parts = []
        if at.keys.stop - 1 > at.lowest + self.offset + right:
            parts.append(at.kv_idx <= at.q_idx + (self.offset + right))
        if at.keys.start < at.highest + self.offset - left:
            parts.append(at.kv_idx >= at.q_idx + (self.offset - left))
        parts += self._looked_up(at)
        return reduce(np.logical_and, parts) if parts else np.ones(at.shape, np.bool_)

    def _looked_up(self, at: Block) -> list[BoolArray]:
        """Return where each rule lets the queries of a block see its keys."""
        found = []
        granted = [rule.granted(value, at, self) for rule, value in self._given]
        for (rule, value), own in zip(self._given, granted, strict=True):
            seen = rule.seen(value, at, self)
            if seen is None:
                continue
            for other in granted:
                if other is not None and other is not own:
                    seen = seen | other
            found.append(seen)
        return found

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


def _dropout_of(dropout_p: float, rng: Any) -> tuple[float, Dropout | None]:
    """The factor of what is kept, and what is dropped; None where nothing is."""
    if not dropout_p:
        return 1.0, None
    if rng is None:
        raise missing_rng(dropout_p)
    return 1 / (1 - dropout_p), Dropout.of(dropout_p, rng)
