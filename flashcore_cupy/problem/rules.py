"""The score rules: what scores go through besides their scale, and which keys a query sees.

One record per argument of ``attention``, in the order in which they apply. With b, h, i, j for the
batch, the query head, the query and the key:

    s = scale * q.k                             softmax_scale
    s = cap * tanh(s / cap)                     softcap
    s = s - slope * |i + offset - j|            alibi_slopes
    s = s + bias[b, h, i, j]                    bias
    s = score_mod(s, b, h, i, j)                score_mod

and then query i sees key j where causal, window, mask and mask_mod all let it; a block_mask has the
last two asked in mixed blocks alone. What the softmax gives goes through dropout. How to add a rule
stands in CONTRIBUTING.md.

Nothing here needs a GPU or CuPy: of arrays it takes shape, dtype, strides, and an address.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.problem import blocks
from flashcore_cupy.problem.blocks import Around, Array, Block, BoolArray, ScoreShape
from flashcore_cupy.problem.dropout import DropoutP
from flashcore_cupy.problem.listed_blocks import BlockLists, BlockMaskRule
from flashcore_cupy.problem.mods import (
    Mods,
    apply_score_mod,
    describe_mods,
    flags_of_mask_mod,
    linearize_score_mod,
)
from flashcore_cupy.problem.rule import (
    HEAD_STRIDES,
    Bounds,
    Broadcast,
    BroadcastRule,
    PerHeadRule,
    Rows,
    Rule,
    Slopes,
)
from flashcore_cupy.problem.values import check_number, shown

#: A window this wide hides nothing: sequences are not longer (MAX_SEQLEN).
UNBOUNDED_WINDOW = 2**30
NO_WINDOW = (-1, -1)
#: float32's largest number: a cap beyond it caps nothing.
_FLOAT32_MAX = 3.4028234663852886e38
#: A smaller cap makes no difference to a softmax, which it makes uniform; its inverse is finite.
_LEAST_SOFTCAP = 1e-30
#: Softcaps up to here, 50 in Gemma 2, lose 2^-23 of themselves without being wrong about scores.
_USUAL_SOFTCAP = 128.0


@dataclass(frozen=True)
class Rules:
    """The rules of one call, described without their data; hashable, so that they key a cache."""

    window: tuple[int, int] = NO_WINDOW
    """Keys to the left and right of a query's own position; -1 is no bound."""
    softcap: float = 0.0
    alibi_slopes: tuple[int, int] | None = None
    """Element strides along batches and heads."""
    bias: Broadcast | None = None
    mask: Broadcast | None = None
    sink: bool = False
    dropout_p: float = 0.0
    mods: Mods | None = None
    block_mask: BlockLists | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The arguments, beyond the window, that are not at their defaults."""
        return tuple(rule.name for rule, _ in self.given if rule.name != "window")

    @property
    def values(self) -> dict[str, Any]:
        """The arguments that are no arrays and no formulas."""
        return {rule.name: getattr(self, rule.name) for rule in RULES if rule.takes == "value"}

    @property
    def given(self) -> tuple[tuple[Rule, Any], ...]:
        """The rules that are not at their defaults, with their descriptions."""
        formulas = vars(self.mods) if self.mods is not None else {}
        described = ((rule, (vars(self) | formulas).get(rule.name)) for rule in RULES)
        return tuple((rule, x) for rule, x in described if x not in (None, False, rule.default))

    def bits(self, dtype: str) -> tuple[str, ...]:
        """The names in ``RULE_BITS`` of what a kernel for q of a dtype is built with."""
        loads = (name for rule, x in self.given for name in rule.loads(x))
        return (*(name for rule, x in self.given for name in rule.bits(x, dtype)), *loads)

    @property
    def differ_by_head(self) -> bool:
        """Whether keys may be hidden from one query head and not from another."""
        return any(rule.differs_by_head(x) for rule, x in self.given)


class Window(Rule):
    """Beltagy et al. 2020, arXiv 2004.05150, section 3.1."""

    name, default, takes = "window", NO_WINDOW, "value"
    acts_on = "positions"

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> tuple[int, int]:
        """Return (left, right), -1 for a side that hides nothing."""
        use = "use (left, right), each an int from 0, or -1 for no bound"
        wrong = f"window: got {shown(value)}; {use}"
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise ValueError(wrong)
        sides = []
        for side in value:
            try:
                n = side.__index__()
            except Exception:  # of no integer, or of an array of any library that is none
                raise ValueError(wrong) from None
            if isinstance(side, bool) or n < -1:
                raise ValueError(wrong)
            sides.append(-1 if n >= UNBOUNDED_WINDOW else n)
        return sides[0], sides[1]


class Softcap(Rule):
    """Gemma 2, arXiv 2408.00118, section 2."""

    name, default, takes = "softcap", 0.0, "value"
    codes: ClassVar = {"softcap": 1, "softcap_wide": 4096}
    numbers = ("softcap", "inverse_softcap")

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> float:
        """Return the cap as a float, 0 for none, which infinity is, too."""
        cap = check_number("softcap", value, "0 for none")
        if not cap >= 0:  # so written that NaN fails
            raise ValueError(f"softcap: got {shown(cap)}; use a positive number, or 0 for none")
        if cap == 0 or cap > _FLOAT32_MAX:
            return 0.0
        return max(float(cap), _LEAST_SOFTCAP)

    def bits(self, described: Any, dtype: str) -> tuple[str, ...]:
        """Return the way that is right about scores far below the cap, where that shows."""
        wide = described > _USUAL_SOFTCAP and dtype != "float32"
        return ("softcap_wide" if wide else "softcap",)

    def params(self, described: Any) -> dict[str, Any]:
        """Return the cap and its inverse."""
        return {"softcap": described, "inverse_softcap": 1 / described}

    def apply(self, value: Any, scores: Array, at: Block, around: Around) -> None:
        """Turn s into cap tanh(s / cap)."""
        if not value:
            return
        cap = scores.dtype.type(value)
        with np.errstate(all="ignore"):
            ratio = scores / cap
            # There tanh(x) is x to the last bit; and x, if subnormal, has lost bits of the score.
            same = np.abs(ratio) < math.sqrt(np.finfo(scores.dtype).eps)
            np.tanh(ratio, out=ratio)
            ratio *= cap
        np.copyto(scores, ratio, where=~same)

    def linearize(self, value: Any, scores: Array, at: Block, around: Around) -> Slopes:
        """1 - tanh^2, by exponentials: it stays exact where it is small."""
        if not value:
            return Slopes()
        with np.errstate(all="ignore"):
            tail = np.exp(-2 * np.abs(scores / scores.dtype.type(value)))
        self.apply(value, scores, at, around)
        return Slopes(np.asarray(4 * tail / np.square(1 + tail)))

    def bounds(self, value: Any, before: Bounds, scores: ScoreShape) -> Bounds:
        """The tanh is of approximate instructions."""
        if not value:
            return before
        return Bounds(min(before.largest, value), before.error + value * 2.0**-20)


class AlibiSlopes(PerHeadRule):
    """Press et al. 2022, arXiv 2108.12409, section 3; by distance, so that it is symmetric."""

    name = "alibi_slopes"
    codes: ClassVar = {"alibi": 2}
    pointer, strides = "alibi", HEAD_STRIDES

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> tuple[int, int]:
        """Return the element strides of batches and heads."""
        super().describe(value, scores, dtype)
        strides = [s // value.dtype.itemsize for s in value.strides]
        return (0, strides[0]) if len(strides) == 1 else (strides[0], strides[1])

    def params(self, described: Any) -> dict[str, Any]:
        """Return the strides."""
        return {"alibi_strides": described}

    def check(self, value: Any, scores: ScoreShape) -> None:
        """(Hq,) or (B, Hq)."""
        shape, allowed = tuple(value.shape), ((scores.heads,), (scores.batch, scores.heads))
        if shape not in allowed:
            raise ValueError(
                f"alibi_slopes: got shape {shape}; use (Hq,) = {allowed[0]} or "
                f"(B, Hq) = {allowed[1]}"
            )

    def apply(self, value: Any, scores: Array, at: Block, around: Around) -> None:
        """Subtract slope * distance."""
        slopes = self.of_batch(np.asarray(value), around.number(at.batch))
        slope = scores.dtype.type(float(slopes[at.head]))
        scores -= slope * blocks.distances(at, around).astype(scores.dtype)

    def add_gradient(self, into: Array, d_scores: Array, at: Block, around: Around) -> None:
        """Subtract the sum over the block, each times its distance."""
        slopes = self.of_batch(into, around.number(at.batch))
        slopes[at.head] -= np.sum(d_scores * blocks.distances(at, around))

    def bounds(self, value: Any, before: Bounds, scores: ScoreShape) -> Bounds:
        """No distance is longer than both sequences."""
        grown = float(np.abs(value).max()) * (scores.seqlen_q + scores.seqlen_kv)
        return before.rounded(before.largest + grown)


class Bias(BroadcastRule):
    """Added to the scores."""

    name, pointer, when_packed = "bias", "bias", "score_mod"
    has_gradient = True
    codes: ClassVar = {"bias": 4, "bias_fp32": 8}
    load_codes: ClassVar = {"bias_pairs": 256}

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> Broadcast:
        """Return how it broadcasts."""
        if value.dtype.name not in (dtype, "float32"):
            wanted = "q's, float32" if dtype == "float32" else f"q's, {dtype}, or float32"
            raise TypeError(f"bias: got dtype {value.dtype.name}; use {wanted}")
        return self.broadcast(value, scores)

    def bits(self, described: Any, dtype: str) -> tuple[str, ...]:
        """Return which dtype it has."""
        return ("bias_fp32" if described.dtype == "float32" else "bias",)

    def loads(self, described: Any) -> tuple[str, ...]:
        """In pairs, if it can be."""
        return ("bias_pairs",) if described.pairs else ()

    def params(self, described: Any) -> dict[str, Any]:
        """Return the strides."""
        return {"bias_strides": described.strides}

    def apply(self, value: Any, scores: Array, at: Block, around: Around) -> None:
        """Add it."""
        scores += blocks.cut(value, at, around).astype(scores.dtype)

    def add_gradient(self, into: Array, d_scores: Array, at: Block, around: Around) -> None:
        """Add the block, summed over the axes along which it is broadcast."""
        blocks.add_to_broadcast(into, d_scores, at)

    def bounds(self, value: Any, before: Bounds, scores: ScoreShape) -> Bounds:
        """What it adds, where that is finite."""
        finite = np.abs(np.where(np.isfinite(value), value, 0).astype(np.float64))
        return before.rounded(before.largest + float(finite.max(initial=0.0)))


class ScoreMod(Rule):
    """A formula of the user's; FlexAttention, Dong et al. 2024, arXiv 2412.05496."""

    name, takes = "score_mod", "formula"
    codes: ClassVar = {"score_mod": 16}

    def apply(self, value: Any, scores: Array, at: Block, around: Around) -> None:
        """Have the function change the block."""
        apply_score_mod(value, scores, at, around)

    def linearize(self, value: Any, scores: Array, at: Block, around: Around) -> Slopes:
        """By dual numbers, or as its user says."""
        return linearize_score_mod(value, scores, at, around)

    def bounds(self, value: Any, before: Bounds, scores: ScoreShape) -> Bounds:
        """Formulas are taken to leave scores about as large as they are."""
        return before.rounded(before.largest)


class Mask(BroadcastRule):
    """True where a query attends."""

    name, pointer, when_packed = "mask", "mask", "mask_mod"
    acts_on = "keys"
    codes: ClassVar = {"mask": 32}
    load_codes: ClassVar = {"mask_pairs": 512, "mask_chunks": 2048}

    def describe(self, value: Any, scores: ScoreShape, dtype: str) -> Broadcast:
        """Return how it broadcasts."""
        return self.broadcast(value, scores)

    def check(self, value: Any, scores: ScoreShape) -> None:
        """Booleans that broadcast."""
        if value.dtype.name != "bool":
            raise TypeError(
                f"mask: got dtype {value.dtype.name}; use bool, True where a query attends "
                f"(an additive mask is a bias)"
            )
        super().check(value, scores)

    def loads(self, described: Any) -> tuple[str, ...]:
        """16 keys at a time or two, if it can be."""
        if described.chunks:
            return ("mask_chunks",)
        return ("mask_pairs",) if described.pairs else ()

    def params(self, described: Any) -> dict[str, Any]:
        """Return the strides."""
        return {"mask_strides": described.strides}

    def differs_by_head(self, described: Any) -> bool:
        """Unless it is broadcast along the heads."""
        return bool(described.strides[1])

    def seen(self, value: Any, at: Block, around: Around) -> BoolArray:
        """Return its block."""
        return blocks.cut(value, at, around)


class MaskMod(Rule):
    """A formula of the user's, as ``ScoreMod``."""

    name, takes = "mask_mod", "formula"
    acts_on = "keys"
    codes: ClassVar = {"mask_mod": 64}

    def differs_by_head(self, described: Any) -> bool:
        """A formula may ask for the head."""
        return True

    def seen(self, value: Any, at: Block, around: Around) -> BoolArray:
        """Ask the function."""
        return flags_of_mask_mod(value, at, around)


class Sink(PerHeadRule):
    """A logit that joins the denominator; gpt-oss, after Xiao et al. 2023, arXiv 2309.17453."""

    name = "sink"
    acts_on = "sum"
    codes: ClassVar = {"sink": 128}
    pointer = "sink"

    def add_row_gradient(self, value: Any, into: Array, rows: Rows) -> None:
        """Subtract its own weight in each row, times the row's delta."""
        with np.errstate(all="ignore"):
            weight = np.exp(float(value[rows.head]) - rows.lse)
            into[rows.head] -= np.sum(weight * rows.delta, where=rows.lse != -np.inf)


#: In the order in which they apply.
RULES: tuple[Rule, ...] = (
    *(Window(), Softcap(), AlibiSlopes(), Bias(), ScoreMod()),
    *(BlockMaskRule(), Mask(), MaskMod(), Sink(), DropoutP()),
)
NO_RULES = Rules()

#: Every bit of ``FC_RULES``, by name. "scale_first" is of a tiny softmax_scale.
RULE_BITS: Mapping[str, int] = {
    "scale_first": 1024,
    **{name: bit for rule in RULES for name, bit in rule.codes.items()},
    **{name: bit for rule in RULES for name, bit in rule.load_codes.items()},
}


def describe_rules(scores: ScoreShape, dtype: str, *, packed: bool = False, **given: Any) -> Rules:
    """Check every rule of a call and describe it.

    ``given``: the rules' arguments and ``mod_args``; ``rng`` is not looked at. Arrays come as
    ``ArraySpec`` or anything with shape, strides, dtype and address; ``dtype`` is q's. Raises
    ``TypeError`` or ``ValueError`` naming the argument, what it got and what works.
    """
    for rule in RULES:
        if packed and rule.when_packed and given.get(rule.name) is not None:
            raise ValueError(
                f"{rule.name}: not with cu_seqlens, whose sequences have no common shape; "
                f"use {rule.when_packed} with mod_args"
            )
    assert set(given) <= {rule.name for rule in RULES} | {"mod_args", "rng"}, f"no rules: {given}"
    described = {
        rule.name: rule.describe(given[rule.name], scores, dtype)
        for rule in RULES
        if (rule.takes == "value" and rule.name in given)
        or (rule.takes not in ("value", "formula") and given.get(rule.name) is not None)
    }
    mods = (given.get("score_mod"), given.get("mask_mod"), given.get("mod_args") or {})
    return Rules(**described, mods=describe_mods(*mods))


def hiding(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments without the rules that hide no key: all that gate "pv" asks for."""
    others = {rule.name for rule in RULES if rule.acts_on in ("scores", "sum")}
    return {name: x for name, x in arguments.items() if name not in others}
