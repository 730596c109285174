"""What the gradients of attention should be: in float64, and naive in the inputs' dtype.

NumPy only, plain formulas, with the conventions of ``reference``. With s the scaled product of a
query and a key, t that score after its rules, P = softmax(t) and o = P v:

    delta_i = sum over d of do_id o_id, less dlse_i
    dT = P * (do v^T - delta)       dbias = dT       dslope = -sum of dT |i + off - j|
    dS = dT * dt/ds                 dsink = -sum over i of exp(sink - lse_i) delta_i
    dq = scale dS k                 dk = scale dS^T q                 dv = P^T do

With dropout, Z being 1 / (1 - p) where a probability is kept and 0 elsewhere, o = (P Z) v, and so
dT = P * (Z * do v^T - delta) and dv = (P Z)^T do.

What a query does not see gets nothing from it, and gives it nothing, NaN or not. Where P is 0, dT
is. The functions return a dict of those asked for, by their inputs' names: "q", "k", "v", the
rules' arrays, and "mod_args.table" for an array of mod_args; each has its input's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore_cupy.cpu.reference import Part, Task, weighted_sum
from flashcore_cupy.cpu.tiled_attention import sequences
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.mod_elements import MOD_ARGS, mod_args_among
from flashcore_cupy.problem.rule import Rows

Gradients = dict[str, Array]
_OPERANDS = ("q", "k", "v")


def oracle(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    dlse: Array | None = None,
    wrt: Iterable[str] = _OPERANDS,
    **rules: Any,
) -> Gradients:
    """The gradients in float64 on the given (rounded) inputs.

    Takes do (B, Hq, Sq, Dv), the operands of ``reference.oracle``, dlse (B, Hq, Sq), which counts
    as zeros where there is none, and the arguments of ``NumpyRules``.
    """
    return _gradients(_EXACT, do, q, k, v, dlse, wrt, rules)


def naive(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    dlse: Array | None = None,
    wrt: Iterable[str] = _OPERANDS,
    grid: float = 1.0,
    **rules: Any,
) -> Gradients:
    """The gradients in the inputs' dtype, unfused: its error sets the allowed one.

    Products of rounded factors accumulate in float32, and what is between them is float32: o, P and
    dS are rounded to the inputs' dtype before they are factors. Results are not rounded. Another
    ``grid``, as 1.1, has factors fall between other numbers of that dtype: luck of another draw.
    """

    def rounded(x: Array) -> Array:
        on_grid = (x * np.float32(grid)).astype(q.dtype).astype(np.float32)
        return np.asarray(on_grid / np.float32(grid))

    return _gradients(_Way(np.float32, rounded), do, q, k, v, dlse, wrt, rules)


def roundings(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    dlse: Array | None = None,
    wrt: Iterable[str] = _OPERANDS,
    **rules: Any,
) -> Gradients:
    """How far off the gradients may be in float32: the sums of what their terms are rounded by.

    Where terms cancel, an error is small by comparison with these, and not with their sum. Products
    and sums take 2^-22 of a term; a probability exp(t - lse) may take more, 2^-24 of its lse.
    """
    return _gradients(_ROUNDINGS, do, q, k, v, dlse, wrt, rules)


def stage(
    gate: str,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    **rules: Any,
) -> tuple[Array, Array]:
    """What a gate gives, and how large the terms of that are: (B, Hq, Sq, Skv), float64.

    "dp": do v^T. "ds": dS, from o and lse as they are given, whose errors are no stage's. Both are
    0 where a key is hidden.
    """
    task = Task.of(q, k, v, None, rules)
    values, terms = np.zeros((2, *task.shape(k.shape[2])))
    dlse = np.zeros(lse.shape) if dlse is None else dlse
    with np.errstate(all="ignore"):
        for part in task.parts():
            rows = part.out
            inputs = (do[rows], v[part.head_kv], q[rows], k[part.head_kv], o[rows], dlse[rows])
            one_do, one_v, *others = (x.astype(np.float64) for x in inputs)
            found, size = one_do @ one_v.T, np.abs(one_do) @ np.abs(one_v).T
            if gate == "ds":
                found, size = _ds(task, part, one_do, others, lse[rows], found, size)
            values[rows], terms[rows] = (np.where(part.visible, x, 0) for x in (found, size))
    return values, terms


def _ds(
    task: Task, part: Part, do: Array, others: list[Array], lse: Array, dp: Array, size: Array
) -> tuple[Array, Array]:
    """From dP, and how large its terms are, to dS and how large those of that are."""
    q, k, o, dlse = others
    dp, size = (task.dropped(x, part) for x in (dp, size))
    scores = q @ k.T
    derivatives = task.rules.linearize(scores, part.at)
    p = np.where(part.visible, np.exp(scores - lse.astype(np.float64)[:, None]), 0)
    products = np.where(part.visible.any(axis=1, keepdims=True), do * o, 0)
    delta = products.sum(axis=1) - dlse
    size = p * (size + (np.abs(products).sum(axis=1) + np.abs(dlse))[:, None])
    d = np.where(p != 0, p * (dp - delta[:, None]), 0)
    task.rules.pull_back(d, derivatives, {}, part.at)
    slopes = [x.each(np.abs) for x in derivatives]
    task.rules.pull_back(size, slopes, {}, part.at)
    return d, size


def of_packed(
    function: Callable[..., Gradients],
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    dlse: Array | None = None,
    **arguments: Any,
) -> Gradients:
    """One of the above, of a packed batch: of each sequence by itself.

    Takes q (total, Hq, D), do (total, Hq, Dv), dlse (Hq, total), k, v and the boundaries as
    ``reference.oracle_varlen``.
    """
    total: Gradients = {}
    parts = sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)
    for number, (one_q, one_k, one_v, at) in enumerate(parts):
        keys = slice(*cu_seqlens_k[number : number + 2])
        one_do = do[at].swapaxes(0, 1)[None]
        one_dlse = None if dlse is None else dlse[None, :, at]
        found = function(one_do, one_q, one_k, one_v, dlse=one_dlse, sequence=number, **arguments)
        for name, x in found.items():
            if name not in _OPERANDS:
                total[name] = total.get(name, 0) + x
                continue
            like = {"q": q, "k": k, "v": v}[name]
            whole = total.setdefault(name, np.zeros(like.shape, x.dtype))
            whole[at if name == "q" else keys] = x[0].swapaxes(0, 1)
    return total


def _itself(x: Array) -> Array:
    return x


@dataclass(frozen=True)
class _Way:
    """How to compute."""

    dtype: type[np.floating[Any]]
    """Of sums."""
    rounded: Callable[[Array], Array] = _itself
    """Of what becomes a factor."""
    term: Callable[[Array], Array] = _itself
    minus: int = -1
    """With ``term``: magnitudes are added, not subtracted."""
    weight: Callable[[Array], Array] = np.ones_like
    """Of the terms of a row, from its log-sum-exp."""


def _rounded_by(lse: Array) -> Array:
    """What roundings make of a probability exp(s - lse), relatively.

    Four of 2^-24 each, of numbers as large as lse: the score's and the log-sum-exp's own, when both
    are found and when they become powers of 2.
    """
    return 2.0**-22 * np.maximum(1.0, np.where(np.isfinite(lse), np.abs(lse), 0))


_EXACT = _Way(np.float64)
_ROUNDINGS = _Way(np.float64, term=np.abs, minus=1, weight=_rounded_by)


def _gradients(
    way: _Way,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    dlse: Array | None,
    wrt: Iterable[str],
    rules: Mapping[str, Any],
) -> Gradients:
    wrt = tuple(wrt)
    task = Task.of(q, k, v, None, {**rules, "mod_gradients": mod_args_among(wrt)})
    mod_args = rules.get("mod_args") or {}
    given = {"q": q, "k": k, "v": v, **rules}
    given |= {f"{MOD_ARGS}{name}": np.asarray(x) for name, x in mod_args.items()}
    # dq, dk and dv are found in any case.
    found = {name: np.zeros(given[name].shape, way.dtype) for name in (*_OPERANDS, *wrt)}
    dlse = np.zeros(task.shape()) if dlse is None else dlse
    with np.errstate(all="ignore"):
        for part in task.parts():
            rows, keys = part.out, part.head_kv
            inputs = do[rows], dlse[rows], q[rows], k[keys], v[keys]
            _add_part(way, task, part, [x.astype(way.dtype) for x in inputs], found)
    scale = way.term(np.asarray(task.rules.scale, way.dtype))
    found["q"] *= scale
    found["k"] *= scale
    return {name: way.term(found[name]) for name in wrt}


def _add_part(way: _Way, task: Task, part: Part, inputs: list[Array], found: Gradients) -> None:
    """Add what some queries of one head give."""
    do, dlse, q, k, v = inputs
    seen = part.visible
    scores = q @ k.T
    derivatives = task.rules.linearize(scores, part.at)
    p, lse = task.softmax(scores, part)
    p = np.where(seen, p, 0)
    o = way.rounded(weighted_sum(way.rounded(task.dropped(p, part)), seen, v))
    do, dlse, q, k, v, o = (way.term(x) for x in (do, dlse, q, k, v, o))
    terms = np.where(seen.any(axis=1, keepdims=True), do * o, 0)
    delta = terms.sum(axis=1) + way.minus * dlse
    weight = way.weight(lse)
    p *= weight[:, None]
    d = task.dropped(do @ v.T, part) + way.minus * delta[:, None]
    d = np.where(p != 0, p * d, 0)
    task.rules.add_row_gradients(found, Rows(part.at.head, lse, delta * weight))
    slopes = [x.each(way.term) for x in derivatives]
    task.rules.pull_back(d, slopes, found, part.at)
    d = way.rounded(d)
    found["q"][part.out] += weighted_sum(d, seen, k)
    found["k"][part.head_kv] += weighted_sum(d.T, seen.T, q)
    found["v"][part.head_kv] += weighted_sum(way.rounded(task.dropped(p, part)).T, seen.T, do)
