"""What attention should give: the float64 oracle, the same-dtype naive one, and their comparison.

NumPy only, plain formulas, nothing shared with the tiled algorithm but the rules' definitions. All
operands are canonical views with any strides: q (B, Hq, Sq, D), k (B, Hkv, Skv, D) and
v (B, Hkv, Skv, Dv); query head h uses key head h // (Hq // Hkv). `rows`, a 1-D integer array, asks
for these queries only, so that a few rows of a long sequence can be checked; Sq below is then
len(rows). `rules` are the arguments of `numpy_rules.NumpyRules`.

A query that sees no key gives o = 0 and lse = -inf, or the sink. NaN and infinity reach the outputs
that attend to them and no others: a hidden value is left out, not multiplied by 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from flashcore_cupy.cpu.numpy_rules import NumpyRules, causal_offset, sizes_of
from flashcore_cupy.cpu.tiled_attention import sequences, tiled
from flashcore_cupy.problem.attention_problem import EPSILON
from flashcore_cupy.problem.blocks import Array, Block, BoolArray, IntArray

__all__ = [
    "INPUT_KINDS",
    "Comparison",
    "InputKind",
    "causal_offset",
    "compare",
    "gate_probabilities",
    "gate_scores",
    "gate_uniform",
    "make_inputs",
    "naive",
    "naive_varlen",
    "oracle",
    "oracle_varlen",
    "tiled",
]

Float64Array: TypeAlias = NDArray[np.float64]
InputKind: TypeAlias = Literal["normal", "outliers", "large", "constant", "onehot"]
INPUT_KINDS: tuple[InputKind, ...] = get_args(InputKind)

# Elements of one block of scores: 32 MB in float64.
_BLOCK_ELEMENTS = 1 << 22


def oracle(
    q: Array, k: Array, v: Array, *, rows: Array | None = None, **rules: Any
) -> tuple[Float64Array, Float64Array]:
    """Attention in float64 on the given (rounded) inputs: o (B, Hq, Sq, Dv), lse (B, Hq, Sq)."""
    task = Task.of(q, k, v, rows, rules)
    o, lse = np.zeros(task.shape(v.shape[3])), np.empty(task.shape())
    with np.errstate(all="ignore"):
        for part in task.parts():
            p, lse[part.out] = task.softmax(task.scores(part, np.float64), part)
            p = task.dropped(p, part)
            o[part.out] = weighted_sum(p, part.visible, v[part.head_kv].astype(np.float64))
    return o, lse


def naive(q: Array, k: Array, v: Array, *, rows: Array | None = None, **rules: Any) -> Array:
    """Unfused attention in the inputs' dtype: o (B, Hq, Sq, Dv), whose error sets the allowed one.

    As real unfused implementations do it: products of the rounded inputs accumulate in float32, the
    score rules and the softmax are float32, and the normalised P is rounded to the inputs' dtype
    before P V.
    """
    task = Task.of(q, k, v, rows, rules)
    o = np.zeros(task.shape(v.shape[3]), q.dtype)
    with np.errstate(all="ignore"):
        for part in task.parts():
            p, _ = task.softmax(task.scores(part, np.float32), part)
            rounded = task.dropped(p, part).astype(q.dtype).astype(np.float32)
            o[part.out] = weighted_sum(rounded, part.visible, v[part.head_kv].astype(np.float32))
    return o


def oracle_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    **rules: Any,
) -> tuple[Float64Array, Float64Array]:
    """`oracle` of a packed batch: o (total_q, Hq, Dv), lse (Hq, total_q).

    Takes q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv) and the boundaries of the
    sequences, (B + 1,) integers. A sequence's number is the b of its rules.
    """
    o, lse = np.zeros((*q.shape[:2], v.shape[2])), np.full(q.shape[1::-1], -np.inf)
    for number, (*one, at) in enumerate(sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)):
        one_o, one_lse = oracle(*one, **rules, sequence=number)
        o[at], lse[:, at] = one_o[0].swapaxes(0, 1), one_lse[0]
    return o, lse


def naive_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    **rules: Any,
) -> Array:
    """`naive` of a packed batch, with the arguments of `oracle_varlen`: o (total_q, Hq, Dv)."""
    o = np.zeros((*q.shape[:2], v.shape[2]), q.dtype)
    for number, (*one, at) in enumerate(sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)):
        o[at] = naive(*one, **rules, sequence=number)[0].swapaxes(0, 1)
    return o


def gate_scores(
    q: Array, k: Array, v: Array, *, rows: Array | None = None, **rules: Any
) -> Float64Array:
    """What gate "qk" gives: the scores by all rules, -inf where hidden, (B, Hq, Sq, Skv), float64.

    The sink is no score and does not show.
    """
    task = Task.of(q, k, v, rows, rules)
    out = np.empty(task.shape(k.shape[2]))
    with np.errstate(all="ignore"):
        for part in task.parts():
            out[part.out] = np.where(part.visible, task.scores(part, np.float64), -np.inf)
    return out


def gate_probabilities(
    q: Array, k: Array, v: Array, *, rows: Array | None = None, **rules: Any
) -> Float64Array:
    """What gate "softmax" gives: P, 0 where hidden, (B, Hq, Sq, Skv), float64.

    With a sink the probabilities of a row sum to less than 1. Dropout, which comes after the
    softmax, does not show.
    """
    task = Task.of(q, k, v, rows, rules)
    out = np.empty(task.shape(k.shape[2]))
    with np.errstate(all="ignore"):
        for part in task.parts():
            p, _ = task.softmax(task.scores(part, np.float64), part)
            out[part.out] = np.where(part.visible, p, 0.0)
    return out


def gate_uniform(
    q: Array, k: Array, v: Array, *, rows: Array | None = None, **rules: Any
) -> Float64Array:
    """What gate "pv" gives: the mean of the v rows that a query sees, (B, Hq, Sq, Dv), float64.

    All scores count as 0, whatever the score rules, and there is no sink. With dropout: the sum of
    those that are kept, as it changes the mean.
    """
    task = Task.of(q, k, v, rows, rules)
    out = np.zeros(task.shape(v.shape[3]))
    with np.errstate(all="ignore"):
        for part in task.parts():
            p, _ = softmax(np.zeros(part.visible.shape), part.visible, -math.inf)
            p = task.dropped(p, part)
            out[part.out] = weighted_sum(p, part.visible, v[part.head_kv].astype(np.float64))
    return out


class Part(NamedTuple):
    """A block of one head's queries, by all keys."""

    at: Block
    visible: BoolArray  # (queries, Skv)
    head_kv: tuple[int, int]  # into k and v
    out: tuple[int, int, slice]  # into the result


@dataclass(frozen=True)
class Task:
    """What is asked for: some queries of all heads, under the rules."""

    q: Array
    k: Array
    queries: IntArray
    rules: NumpyRules

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, rows: Array | None, rules: Mapping[str, Any]) -> Task:
        """Take the arguments of `oracle`."""
        sizes = sizes_of(q, k, v)
        return cls(q, k, _queries(sizes.seqlen_q, rows), NumpyRules(sizes, **rules))

    def shape(self, *columns: int) -> tuple[int, ...]:
        """(B, Hq, queries, *columns)."""
        return *self.q.shape[:2], len(self.queries), *columns

    def parts(self) -> Iterator[Part]:
        """Yield blocks of queries, one head after the other, small enough for their scores."""
        sizes = self.rules.sizes
        step = max(1, _BLOCK_ELEMENTS // max(1, sizes.seqlen_kv))
        for first in range(0, len(self.queries), step):
            chosen = self.queries[first : first + step]
            extremes = int(chosen.min()), int(chosen.max())
            for b, h in np.ndindex(sizes.batch, sizes.heads_q):
                at = Block(b, h, chosen, *extremes, slice(0, sizes.seqlen_kv))
                out = b, h, slice(first, first + len(chosen))
                yield Part(at, self.rules.visible(at), (b, h // sizes.group), out)

    def scores(self, part: Part, dtype: type[np.floating[Any]]) -> Array:
        """By all rules, (queries, Skv)."""
        queries = self.q[part.out[:2]][part.at.queries].astype(dtype)
        scores: Array = queries @ self.k[part.head_kv].astype(dtype).T
        self.rules.apply(scores, part.at)
        return scores

    def softmax(self, scores: Array, part: Part) -> tuple[Array, Array]:
        """`softmax` of what the queries see, and their head's sink."""
        return softmax(scores, part.visible, self.rules.sink_of(part.at.head))

    def dropped(self, x: Array, part: Part) -> Array:
        """What dropout makes of a part's probabilities, (queries, Skv). A row of NaN stays one."""
        kept = x * x.dtype.type(self.rules.keep_scale)
        self.rules.drop(kept, part.at)
        return np.where(np.isnan(x), x, kept)


def _queries(seqlen_q: int, rows: Array | None) -> IntArray:
    if rows is None:
        return np.arange(seqlen_q)
    queries = np.asarray(rows)
    integral = queries.size == 0 or np.issubdtype(queries.dtype, np.integer)
    inside = bool(np.all((queries >= 0) & (queries < seqlen_q)))
    if queries.ndim != 1 or not integral or not inside:
        raise ValueError(f"rows: got {rows!r}; use a 1-D array of integers in [0, {seqlen_q})")
    return queries.astype(np.int64)


def softmax(scores: Array, visible: BoolArray, sink: float) -> tuple[Array, Array]:
    """Return the probabilities (0 for a row without keys) and the log-sum-exp."""
    scores = np.where(visible, scores, -np.inf).astype(scores.dtype)
    row_max = scores.max(axis=1, initial=sink)
    shift = np.where(np.isneginf(row_max), 0, row_max).astype(scores.dtype)
    p = np.exp(scores - shift[:, None])
    row_sum = p.sum(axis=1) + np.exp(scores.dtype.type(sink) - shift)
    return p / np.where(row_sum == 0, 1, row_sum)[:, None], row_max + np.log(row_sum)


def weighted_sum(p: Array, visible: BoolArray, v: Array) -> Array:
    """Return p @ v, where a row of v that is hidden from a row of p takes no part, NaN or not."""
    if p.size == 0 or np.isfinite(v).all():
        product: Array = p @ v
        return product
    # 0 * NaN is NaN.
    return np.stack([w[seen] @ v[seen] for w, seen in zip(p, visible, strict=True)])


@dataclass(frozen=True)
class Comparison:
    """Outcome of `compare`. Errors are absolute, over the positions finite on both sides."""

    ok: bool
    max_error: float
    mean_error: float
    allowed_error: float
    worst_index: tuple[int, ...] | None
    """Where to look: a wrong NaN or infinity if there is one, else the largest error."""
    worst_got: float
    worst_expected: float
    nonfinite_mismatches: int
    """Positions where one side is NaN or infinite and the other is not the same."""
    reason: str
    """Why it is not ok; empty if it is."""


def compare(got: Array, expected: Array, naive: Array) -> Comparison:
    """Judge an attention's output against `oracle`'s and `naive`'s, all of one shape.

    NaN and infinities must stand in equal places, and elsewhere, with got's dtype,
    max|got - expected| <= 2 max|naive - expected| + 2 max|((expected + 0.3) - 0.3) - expected|,
    the last evaluated in that dtype; or, where ``naive`` happens to be better than a fused kernel,
    which rounds P before it divides by the sum and O after: an epsilon of the largest. For float32
    4, not 2, or 3 x 2^-22 of the largest, and a unit in its last place more: two TF32 parts of p or
    v have 22 bits, and the product of their small parts is left out. ValueError: shapes differ.
    """
    if not got.shape == expected.shape == naive.shape:
        raise ValueError(
            f"naive, expected, got: got shapes {naive.shape}, {expected.shape}, {got.shape}; "
            "use equal ones"
        )
    if got.size == 0:
        return Comparison(True, 0.0, 0.0, 0.0, None, float("nan"), float("nan"), 0, "")
    with np.errstate(all="ignore"):
        x, ref = got.astype(np.float64), expected.astype(np.float64)
        allowed = _allowed_error(got.dtype, ref, naive.astype(np.float64))
        error = np.abs(x - ref)
    finite = np.isfinite(x) & np.isfinite(ref)
    wrong = ~finite & (x != ref) & ~(np.isnan(x) & np.isnan(ref))
    rank = np.where(wrong, np.inf, np.where(finite, error, -1.0))
    worst = tuple(int(i) for i in np.unravel_index(int(rank.argmax()), rank.shape))
    max_error = float(error[finite].max(initial=0.0))
    mean_error = float(error[finite].mean()) if finite.any() else 0.0
    mismatches = int(wrong.sum())
    reason = _reason(mismatches, max_error, allowed, worst, float(x[worst]), float(ref[worst]))
    return Comparison(
        ok=not reason,
        max_error=max_error,
        mean_error=mean_error,
        allowed_error=allowed,
        worst_index=worst,
        worst_got=float(x[worst]),
        worst_expected=float(ref[worst]),
        nonfinite_mismatches=mismatches,
        reason=reason,
    )


def _allowed_error(dtype: np.dtype[Any], ref: Float64Array, naive: Float64Array) -> float:
    rounded = ref.astype(dtype)
    largest = np.abs(rounded[np.isfinite(rounded)]).max(initial=0)
    shift = np.asarray(0.3, dtype)
    noise = np.abs((((rounded + shift) - shift) - rounded).astype(np.float64))
    naive_error = np.abs(naive - ref)
    errors = sum(float(x[np.isfinite(x)].max(initial=0.0)) for x in (naive_error, noise))
    if dtype == np.float32:  # its tensor cores truncate
        return max(4.0 * errors, 3.0 * 2.0**-22 * float(largest)) + float(np.spacing(largest))
    return max(2.0 * errors, EPSILON.get(dtype.name, 0.0) * float(largest))


def _reason(
    mismatches: int,
    max_error: float,
    allowed: float,
    worst: tuple[int, ...],
    got: float,
    expected: float,
) -> str:
    where = f"at {worst}: got {got:.6g}, expected {expected:.6g}"
    if mismatches:
        return f"{mismatches} NaN or infinite values misplaced, {where}"
    if max_error <= allowed:
        return ""
    return f"max error {max_error:.3g} > allowed {allowed:.3g}, {where}"


def make_inputs(
    kind: InputKind,
    *,
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    heads_kv: int | None = None,
    seqlen_kv: int | None = None,
    head_dim_v: int | None = None,
    dtype: DTypeLike = "float16",
    seed: int = 0,
) -> tuple[Array, Array, Array]:
    """Return random q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv), the same per seed.

    Kinds, for the default scale of 1 / sqrt(D):
    "normal": N(0, 1). "outliers": N(0, 1) + N(0, 100) * Bernoulli(0.001), 100 being the variance.
    "large": one column of q and k is large, so that scores are -1.2e4, 0 or 1.2e4, plus N(0, 1):
    weights spread over a third of the keys, and a later key may raise the maximum by 1e4 or more.
    "constant": all keys of a head alike, so all scores of a row are equal and o is the mean of v.
    "onehot": rows of q and k with one element that is not 0, so a query attends, in equal parts, to
    the keys with its element (score 16, the others 0); rows of v with one 1.
    dtype is "float16", "bfloat16" or "float32". Raises ValueError for an unknown kind.
    """
    if kind not in INPUT_KINDS:
        raise ValueError(f"kind: got {kind!r}; choose one of {', '.join(INPUT_KINDS)}")
    heads_kv = heads if heads_kv is None else heads_kv
    seqlen_kv = seqlen if seqlen_kv is None else seqlen_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    rng = np.random.default_rng(seed)
    q = _random(rng, kind, (batch, heads, seqlen, head_dim))
    k = _random(rng, kind, (batch, heads_kv, seqlen_kv, head_dim))
    v = _random(rng, kind, (batch, heads_kv, seqlen_kv, head_dim_v))
    if kind == "large":
        # Large N(0, sigma) would make rows one-hot, and the largest error the luck of one near-tie.
        column = math.sqrt(1.2e4 * math.sqrt(head_dim))
        q[..., 0] = column * rng.choice([-1, 1], q.shape[:3])
        k[..., 0] = column * rng.choice([-1, 0, 1], k.shape[:3])
    if kind == "constant":
        k[:] = k[:, :, :1].copy()
    if kind == "onehot":
        q, k = (x * np.float32(4 * head_dim**0.25) for x in (q, k))
    element = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return q.astype(element), k.astype(element), v.astype(element)


def _random(rng: np.random.Generator, kind: InputKind, shape: tuple[int, ...]) -> Array:
    if kind == "onehot":
        hot = rng.integers(0, shape[-1], shape[:-1])
        return np.asarray(np.arange(shape[-1]) == hot[..., None], np.float32)
    x = rng.standard_normal(shape, dtype=np.float32)
    if kind == "outliers":
        strong = rng.random(shape, dtype=np.float32) < 0.001
        x += 10 * rng.standard_normal(shape, dtype=np.float32) * strong
    return x
