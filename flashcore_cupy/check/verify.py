"""Whether a kernel's result is right: the rule of acceptance, on all query rows or a sample.

Outputs are judged by ``reference.compare``. A debug gate stops before the rounding to the inputs'
dtype that this rule allows for, so gates have tighter limits of their own, derived below. fp8 is
judged on its own dequantised inputs, with the quantisation's error told beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashcore_cupy.cpu import reference
from flashcore_cupy.cpu.reference import Comparison
from flashcore_cupy.problem.attention_problem import EPSILON, AttentionProblem
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.rule import Bounds
from flashcore_cupy.problem.rules import RULES, hiding

if TYPE_CHECKING:
    from flashcore_cupy.select.plan import Plan

Rows = NDArray[np.int64]
Naive = Callable[[Rows], Array]
Operands = tuple[Array, Array, Array]
Given = Mapping[str, Any] | None

#: Scores that the float64 oracle evaluates at most; beyond, it takes a sample of the query rows.
SCORE_BUDGET = 2**25
#: Seed and offset of a problem with dropout whose call does not say them.
RNG = 0, 0
_FEWEST_ROWS = 16
_E4M3_MAX = np.float32(448)
_SMALLEST_MAX = np.float32(1e-30)  # fp8_quantize.cu leaves a head below as it is


@dataclass(frozen=True)
class Check:
    """Outcome of a check. Errors are absolute; rows are query rows of each head."""

    comparison: Comparison
    rows_checked: int
    rows_total: int
    lse_error: float | None = None
    quantization_error: float | None = None
    """fp8: max error of exact attention on the quantised inputs, against the original ones."""
    faults: tuple[str, ...] = ()
    """What else is wrong, beside the comparison."""

    @property
    def ok(self) -> bool:
        """Whether the result is within what is allowed, everywhere looked at."""
        return self.comparison.ok and not self.faults

    @property
    def reason(self) -> str:
        """Why it is not ok; empty if it is."""
        return "; ".join(filter(None, (self.comparison.reason, *self.faults)))

    def to_json(self) -> dict[str, Any]:
        """Return a flat mapping of everything known."""
        return {
            **asdict(self.comparison),
            "ok": self.ok,
            "reason": self.reason,
            "rows_checked": self.rows_checked,
            "rows_total": self.rows_total,
            "lse_error": self.lse_error,
            "quantization_error": self.quantization_error,
        }


@dataclass(frozen=True)
class Expectation:
    """What one problem on given inputs should give, at ``rows``; computed once, used often."""

    rows: Rows
    rows_total: int
    values: Array
    """float64: (B, Hq, rows, Dv), or (B, Hq, rows, Skv) for the gates qk and softmax."""
    naive: Array
    allowed: float | None
    """A limit that stands in for ``compare``'s."""
    lse: Array | None
    lse_allowed: float
    quantization_error: float | None = None

    def judge(self, got: Array, lse: Array | None = None) -> Check:
        """Judge a result (B, Hq, Sq, ...), and its log-sum-exp (B, Hq, Sq) if there is one."""
        comparison = reference.compare(got[:, :, self.rows], self.values, self.naive)
        if self.allowed is not None:
            comparison = with_limit(comparison, self.allowed)
        faults, lse_error = [], None
        if lse is not None and self.lse is not None:
            lse_error, fault = self._judge_lse(lse[:, :, self.rows], self.lse)
            faults += [fault] if fault else []
        return Check(
            _at_real_rows(comparison, self.rows),
            len(self.rows),
            self.rows_total,
            lse_error,
            self.quantization_error,
            tuple(faults),
        )

    def _judge_lse(self, lse: Array, expected: Array) -> tuple[float, str]:
        result = with_limit(reference.compare(lse, expected, expected), self.lse_allowed)
        result = _at_real_rows(result, self.rows)
        return result.max_error, f"lse: {result.reason}" if result.reason else ""


def expect(
    problem: AttentionProblem, q: Array, k: Array, v: Array, *, tile: int = 64, rules: Given = None
) -> Expectation:
    """What ``problem`` gives on q, k, v: canonical (B, H, S, D) NumPy arrays.

    ``tile`` is the kernel's block_m: a sample of the rows includes those beside its boundaries.
    ``rules`` are ``attention``'s arguments of this name, NumPy arrays and callables, as far as the
    problem does not hold their values; ``ValueError`` if one of them is missing.
    """
    rules = _rules(problem, rules)

    def naive(rows: Rows) -> Array:
        if problem.gate != "pv":
            return reference.naive(q, k, v, rows=rows, **rules)
        # All scores 0, whatever q and k hold and the rules make of them.
        return reference.naive(np.zeros_like(q), np.zeros_like(k), v, rows=rows, **hiding(rules))

    return _expect(problem, (q, k, v), naive, tile, rules)


def expect_packed(
    problem: AttentionProblem, operands: Operands, boundaries: Sequence[Array], rules: Given = None
) -> Expectation:
    """``expect`` of packed sequences: q, k, v (1, H, total, D), split at both ``boundaries``."""
    rules = _rules(problem, rules)
    packed = [x[0].swapaxes(0, 1) for x in operands]
    values, lse = reference.oracle_varlen(*packed, *boundaries, **rules)
    by_naive = reference.naive_varlen(*packed, *boundaries, **rules)
    o, naive = (x.swapaxes(0, 1)[None] for x in (values, by_naive))
    lse_allowed = _lse_error(lse, score_error(problem, *operands[:2], rules))
    rows = np.arange(problem.seqlen_q)
    return Expectation(rows, problem.seqlen_q, o, naive, None, lse[None], lse_allowed)


def _expect(
    problem: AttentionProblem, operands: Operands, naive: Naive, tile: int, rules: dict[str, Any]
) -> Expectation:
    rows, (q, k, v) = sample_rows(problem, tile), operands
    limit = score_error(problem, q, k, rules)
    allowed: float | None = None
    lse, lse_allowed = None, 0.0
    if problem.gate == "qk":
        values = reference.gate_scores(q, k, v, rows=rows, **rules)
        expected_by_naive, allowed = values, limit
    elif problem.gate == "softmax":
        values = reference.gate_probabilities(q, k, v, rows=rows, **rules)
        expected_by_naive = values
        relative = EPSILON.get(problem.dtype, 0.0) + 2 * limit + 2.0**-18
        allowed = float(values.max(initial=0.0)) * relative + 2.0**-24
    elif problem.gate == "pv":
        values = reference.gate_uniform(q, k, v, rows=rows, **rules)
        expected_by_naive = naive(rows)
    else:
        values, lse = reference.oracle(q, k, v, rows=rows, **rules)
        expected_by_naive, lse_allowed = naive(rows), _lse_error(lse, limit)
    return Expectation(rows, problem.seqlen_q, values, expected_by_naive, allowed, lse, lse_allowed)


def _lse_error(lse: Array, score_error: float) -> float:
    finite = np.abs(lse[np.isfinite(lse)])
    return score_error + 1e-5 + 2.0**-20 * float(finite.max(initial=0.0))


def sample_size(problem: AttentionProblem, budget: int | None = None) -> int:
    """How many query rows of each head ``sample_rows`` gives."""
    per_row = max(1, problem.batch * problem.heads_q * problem.seqlen_kv)
    affordable = (SCORE_BUDGET if budget is None else budget) // per_row
    return min(problem.seqlen_q, max(_FEWEST_ROWS, affordable))


def sample_rows(problem: AttentionProblem, tile: int, *, budget: int | None = None) -> Rows:
    """All query rows, or so many that the scores of all heads stay within ``budget``.

    The default is ``SCORE_BUDGET``. A sample has the first and last row, those beside boundaries
    of tiles, and others at random.
    """
    total, count = problem.seqlen_q, sample_size(problem, budget)
    if count >= total:
        return np.arange(total)
    last, middle = (total - 1) // tile * tile, total // 2 // tile * tile
    edges = [0, total - 1, *(b + d for b in (tile, middle, last) for d in (-1, 0, 1))]
    chosen = sorted({row for row in edges if 0 <= row < total})[:count]
    others = np.setdiff1d(np.arange(total), chosen)
    drawn = np.random.default_rng(0).choice(others, count - len(chosen), replace=False)
    return np.sort(np.concatenate([chosen, drawn])).astype(np.int64)


class Quantized(NamedTuple):
    """A tensor as e4m3 (B, H, S, D), and its scale per head, float32 (B, H)."""

    values: Array
    scale: Array

    def dequantized(self) -> Array:
        """Return values * scale in float64."""
        scale = self.scale.astype(np.float64)[:, :, None, None]
        product: Array = self.values.astype(np.float64) * scale
        return product


def quantize(x: Array) -> Quantized:
    """Round (B, H, S, D) to e4m3, the largest magnitude of each head at 448, as the GPU does."""
    x32 = x.astype(np.float32)
    magnitude = np.where(np.isfinite(x32), np.abs(x32), np.float32(0))
    most = magnitude.max(axis=(2, 3), initial=0.0)
    scaled = most > _SMALLEST_MAX
    divisor = np.where(scaled, most, np.float32(1))
    factor = np.where(scaled, _E4M3_MAX / divisor, np.float32(1))
    values = (x32 * factor[:, :, None, None]).astype(ml_dtypes.float8_e4m3fn)
    return Quantized(values, np.where(scaled, divisor / _E4M3_MAX, np.float32(1)))


def on_host(array: Any) -> Array:
    """A copy of a CuPy or NumPy array, as a NumPy array."""
    found: Array = array.copy() if isinstance(array, np.ndarray) else array.get()
    return found


def read_quantized(plan: Plan) -> dict[str, Quantized]:
    """Copy what the quantiser wrote for q, k and v to the host."""
    found = {}
    for operand in (plan.problem.q, plan.problem.k, plan.problem.v):
        stored = on_host(plan.arrays[f"{operand.name}8"]).view(ml_dtypes.float8_e4m3fn)
        scale = on_host(plan.arrays[f"{operand.name}_scale"])
        found[operand.name] = Quantized(stored[..., : operand.shape[3]], scale)
    return found


def expect_quantized(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    found: dict[str, Quantized],
    *,
    tile: int = 64,
) -> tuple[Expectation, list[str]]:
    """What fp8 attention gives on ``found``, and how ``found`` differs from ``quantize``.

    The expectation's ``quantization_error`` compares exact attention on both.
    """
    exact = (found["q"].dequantized(), found["k"].dequantized(), found["v"].dequantized())

    def naive(rows: Rows) -> Array:
        return naive_quantized(problem, found, rows)

    rules = _rules(problem)
    expectation = _expect(problem, exact, naive, tile, rules)
    error: float | None = None
    if problem.gate is None:
        original, _ = reference.oracle(q, k, v, rows=expectation.rows, **rules)
        error = float(np.abs(expectation.values - original).max(initial=0.0))
    inputs = {"q": q, "k": _visible(problem, k), "v": _visible(problem, v)}
    faults = [fault for name in "qkv" for fault in _quantizer_faults(name, inputs, found)]
    return replace(expectation, quantization_error=error), faults


def _visible(problem: AttentionProblem, x: Array) -> Array:
    """Return k or v as the quantiser takes it: rows that no query sees are zeros."""
    hidden = np.arange(x.shape[2]) >= problem.visible_kv
    return np.where(hidden[:, None], x.dtype.type(0), x)


def naive_quantized(problem: AttentionProblem, found: dict[str, Quantized], rows: Rows) -> Array:
    """``reference.naive`` on e4m3 values, which the 16-bit dtypes hold exactly, scales per head."""
    q8, k8, v8 = (found[name] for name in "qkv")
    dtype = np.dtype(ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else problem.dtype)
    shape = (problem.batch, problem.heads_q, len(rows), problem.head_dim_v)
    o = np.empty(shape, dtype)
    weight = 0.0 if problem.gate == "pv" else problem.softmax_scale
    for b, h in np.ndindex(problem.batch, problem.heads_q):
        at = np.index_exp[b : b + 1, h : h + 1]
        h_kv = h // (problem.heads_q // problem.heads_kv)
        at_kv = np.index_exp[b : b + 1, h_kv : h_kv + 1]
        scale = weight * float(q8.scale[b, h]) * float(k8.scale[b, h_kv])
        operands = (q8.values[at], k8.values[at_kv], v8.values[at_kv])
        head = reference.naive(
            *(x.astype(dtype) for x in operands),
            softmax_scale=scale,
            causal=problem.causal,
            rows=rows,
        )
        o[at] = (head.astype(np.float32) * v8.scale[b, h_kv]).astype(dtype)
    return o


def _quantizer_faults(
    name: str, inputs: dict[str, Array], found: dict[str, Quantized]
) -> list[str]:
    expected, got = quantize(inputs[name]), found[name]
    faults = []
    if not np.array_equal(expected.scale, got.scale, equal_nan=True):
        faults.append(f"{name}_scale is not max|{name}| / 448")
    pair = [np.ascontiguousarray(x.values) for x in (expected, got)]
    both_nan = np.isnan(pair[0].astype(np.float32)) & np.isnan(pair[1].astype(np.float32))
    wrong = int(((pair[0].view(np.uint8) != pair[1].view(np.uint8)) & ~both_nan).sum())
    if wrong:
        faults.append(f"{wrong} of {pair[0].size} e4m3 values of {name} differ from the reference")
    return faults


def check_plan(plan: Plan, q: Array, k: Array, v: Array, known: Expectation | None = None) -> Check:
    """Check what a launched plan left in its arrays, given its inputs as canonical NumPy arrays.

    ``known`` spares the oracle, for a kernel that does not quantise.
    """
    tile = plan.selection.config.tile.block_m
    faults: list[str] = []
    if plan.selection.kernel.quantizes:
        found = read_quantized(plan)
        expectation, faults = expect_quantized(plan.problem, q, k, v, found, tile=tile)
    else:
        expectation = known or expect(plan.problem, q, k, v, tile=tile)
    written = plan.gate_output() if plan.problem.gate in ("qk", "softmax") else plan.arrays["o"]
    got = on_host(written)
    if plan.problem.gate not in ("qk", "softmax") and plan.problem.layout == "bshd":
        got = got.transpose(0, 2, 1, 3)
    # With all scores 0, the log-sum-exp of gate pv is not that of q and k.
    wants_lse = plan.problem.gate is None and "lse" in plan.arrays
    lse = on_host(plan.arrays["lse"]) if wants_lse else None
    check = expectation.judge(got, lse)
    return replace(check, faults=(*check.faults, *faults))


def _rules(problem: AttentionProblem, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    rules = {
        "softmax_scale": problem.softmax_scale,
        "causal": problem.causal,
        **problem.rules.values,
        "rng": RNG,
        **(given or {}),
    }
    missing = [name for name in problem.rules.names if name not in rules]
    if missing:
        raise ValueError(f"rules: the problem has {', '.join(missing)}; pass what it holds")
    return rules


def score_error(problem: AttentionProblem, q: Array, k: Array, rules: Mapping[str, Any]) -> float:
    """Largest error of an fp32 score: a few roundings of D products, whose sum |q| |k| bounds.

    Each rule rounds again what the score has grown to by then.
    """
    largest = abs(problem.softmax_scale) * _longest(q) * _longest(k)
    bounds = Bounds(largest, largest * (16 + problem.head_dim / 4) * 2.0**-24)
    for rule in RULES:
        if rules.get(rule.name) is not None:
            bounds = rule.bounds(rules[rule.name], bounds, problem.scores)
    return bounds.error


def _longest(x: Array) -> float:
    finite = np.where(np.isfinite(x), x, 0).astype(np.float64)
    return float(np.sqrt(np.square(finite).sum(axis=3)).max(initial=0.0))


def with_limit(comparison: Comparison, allowed: float) -> Comparison:
    """The same comparison against another limit."""
    bad = comparison.nonfinite_mismatches
    ok = bad == 0 and comparison.max_error <= allowed
    where = (
        f"at {comparison.worst_index}: got {comparison.worst_got:.6g}, "
        f"expected {comparison.worst_expected:.6g}"
    )
    reason = f"max error {comparison.max_error:.3g} > allowed {allowed:.3g}, {where}"
    if bad:
        reason = f"{bad} NaN or infinite values misplaced, {where}"
    return replace(comparison, ok=ok, allowed_error=allowed, reason="" if ok else reason)


def _at_real_rows(comparison: Comparison, rows: Rows) -> Comparison:
    """The same comparison with the index in the whole result instead of in the sample."""
    worst = comparison.worst_index
    if worst is None:
        return comparison
    real = (*worst[:2], int(rows[worst[2]]), *worst[3:])
    reason = comparison.reason.replace(f"at {worst}", f"at {real}")
    return replace(comparison, worst_index=real, reason=reason)
