"""Whether the gradients of a whole problem are right, or a stage of them that a gate stops at.

``verify_gradients`` has the rule. Its oracle needs every query of a key and every key of a query,
so of a problem too large for it a sample is of whole heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.check import verify_gradients
from flashcore_cupy.check.verify import RNG, score_error, with_limit
from flashcore_cupy.check.verify_gradients import ExpectedGradients
from flashcore_cupy.cpu import reference, reference_gradients
from flashcore_cupy.cpu.reference import Comparison
from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.blocks import Array

#: Scores of the heads that are checked, at most, but of one head.
SCORE_BUDGET = 2**24

Head = tuple[int, int]
"""A batch, and a head of k and v; with it go the query heads that share it."""


@dataclass(frozen=True)
class GradientsCheck:
    """Outcome of a check of gradients, or of a stage. Errors are absolute."""

    each: Mapping[str, Comparison]
    """By the names of ``Gradients``, or by the gate's."""
    heads_checked: int
    heads_total: int
    """Heads of k and v, of all batches together."""

    quantization_error: ClassVar[None] = None

    @property
    def ok(self) -> bool:
        """Whether each is within what is allowed, everywhere looked at."""
        return not self.reason

    @property
    def reason(self) -> str:
        """What is wrong; empty if nothing is."""
        return "; ".join(f"{n}: {found.reason}" for n, found in self.each.items() if found.reason)

    @property
    def comparison(self) -> Comparison:
        """Of the one that is worst by what is allowed."""
        return max(self.each.values(), key=_badness)

    def to_json(self) -> dict[str, Any]:
        """Return everything known."""
        return {
            "ok": self.ok,
            "reason": self.reason,
            "heads_checked": self.heads_checked,
            "heads_total": self.heads_total,
            "each": {name: asdict(found) for name, found in self.each.items()},
        }


def _badness(found: Comparison) -> tuple[bool, float]:
    allowed = found.allowed_error
    return not found.ok, found.max_error / allowed if allowed else found.max_error


@dataclass(frozen=True)
class BackwardExpectation:
    """What a problem's gradients should be, of some heads; computed once, used often."""

    problem: AttentionProblem
    heads: Sequence[Head]
    expected: ExpectedGradients

    def judge(self, got: Mapping[str, Array]) -> GradientsCheck:
        """Judge gradients (B, H, S, D) by the names in ``Gradients``."""
        each = {}
        for name, one in self.expected.each.items():
            found = one.judge(_of_heads(got[name], self.heads, self.problem))
            if not self.problem.rules.dropout_p:
                group = got[name].shape[1] // self.problem.heads_kv
                found = _at_real_head(found, self.heads, group)
            each[name] = found
        return GradientsCheck(each, len(self.heads), self.problem.batch * self.problem.heads_kv)


def expect(
    problem: AttentionProblem, operands: Mapping[str, Array], wrt: Sequence[str]
) -> BackwardExpectation:
    """What the gradients of q, k and v are, as far as ``wrt`` names them.

    ``operands``: do, q, k and v, canonical (B, H, S, D). All rules of the problem are values.
    """
    heads = sample_heads(problem)
    chosen = (_of_heads(operands[n], heads, problem) for n in ("do", "q", "k", "v"))
    do, q, k, v = chosen
    rules: dict[str, Any] = {"softmax_scale": problem.softmax_scale, "causal": problem.causal}
    rules |= {"rng": RNG, **problem.rules.values}
    expected = verify_gradients.expect(do, q, k, v, wrt=wrt, **rules)
    return BackwardExpectation(problem, heads, expected)


def check_stage(
    problem: AttentionProblem,
    gate: str,
    operands: Mapping[str, Array],
    got: Array,
    rules: Mapping[str, Any],
) -> GradientsCheck:
    """Check what a gate gives, (B, Hq, Sq, Skv), float32.

    ``operands``: do, q, k, v, o, lse and, if there is one, dlse, canonical; o and lse are those
    that the pass was given. ``rules``: all of ``attention``'s, NumPy arrays and callables.
    """
    values, terms = reference_gradients.stage(gate, **operands, **rules)
    # Products of float32, as of scores; of dS, what a probability is off by, too.
    relative = (16 + problem.head_dim_v / 4) * 2.0**-24
    if gate == "ds":
        lse = operands["lse"]
        largest = float(np.abs(lse[np.isfinite(lse)]).max(initial=0.0))
        scores = score_error(problem, operands["q"], operands["k"], rules)
        relative += 2 * scores + 2.0**-16 + 2.0**-22 * largest
    allowed = relative * float(np.where(np.isfinite(terms), terms, 0).max(initial=0.0))
    found = with_limit(reference.compare(got, values, values), allowed)
    heads = problem.batch * problem.heads_kv
    return GradientsCheck({gate: found}, heads, heads)


def sample_heads(problem: AttentionProblem, *, budget: int | None = None) -> list[Head]:
    """All heads of k and v, or so many that their scores stay within ``budget``, but one.

    The default is ``SCORE_BUDGET``. A sample has the first, the last if there are two, and others
    at random; with dropout, which knows heads by their number, the first ones.
    """
    every = [(b, h) for b in range(problem.batch) for h in range(problem.heads_kv)]
    group = problem.heads_q // problem.heads_kv
    scores = max(1, group * problem.seqlen_q * problem.seqlen_kv)
    count = max(1, (SCORE_BUDGET if budget is None else budget) // scores)
    if count >= len(every):
        return every
    if problem.rules.dropout_p:
        return every[: min(count, problem.heads_kv)]
    chosen = [0, len(every) - 1][:count]
    others = np.setdiff1d(np.arange(len(every)), chosen)
    drawn = np.random.default_rng(0).choice(others, count - len(chosen), replace=False)
    return [every[n] for n in sorted([*chosen, *map(int, drawn)])]


def _of_heads(x: Array, heads: Sequence[Head], problem: AttentionProblem) -> Array:
    """(B, H, ...) to (heads, H / Hkv, ...); with dropout, to the first of each axis."""
    group = x.shape[1] // problem.heads_kv
    if problem.rules.dropout_p:
        batch, head = heads[-1]
        return x[: batch + 1, : (head + 1) * group]
    return np.stack([x[b, h * group : (h + 1) * group] for b, h in heads])


def _at_real_head(found: Comparison, heads: Sequence[Head], group: int) -> Comparison:
    """The same comparison with the index in the whole gradient instead of in the sample."""
    worst = found.worst_index
    if worst is None:
        return found
    batch, head_kv = heads[worst[0]]
    real = (batch, head_kv * group + worst[1], *worst[2:])
    return replace(found, worst_index=real, reason=found.reason.replace(f"{worst}", f"{real}"))
