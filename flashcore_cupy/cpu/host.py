"""Attention on NumPy arrays: the request's rules, handed to the tiled attention on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcore_cupy.cpu import reference, tiled_attention
from flashcore_cupy.problem.array_spec import check_out, usable
from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.request import Request

_POSITION_RULES = ("causal", "window", "mask", "mask_mod", "mod_args")
_RULES = ("softcap", "alibi_slopes", "bias", "sink", "score_mod", *_POSITION_RULES)


def attend(request: Request, q: Any, k: Any, v: Any, out: Any) -> tuple[Any, Any]:
    """Return the output, or what the gate asks for, and the log-sum-exp; None with such a gate."""
    with np.errstate(all="ignore"):  # NaN, infinity and underflow are data here, as on a GPU
        return _attend(request, q, k, v, out)


def _attend(request: Request, q: Any, k: Any, v: Any, out: Any) -> tuple[Any, Any]:
    request = request.taken(cpu=True)
    problem, sequences = request.describe(q, k, v)
    q, k, v = (usable(x, np) for x in (q, k, v))
    if out is None:
        out = np.empty(problem.output_shape, q.dtype)
    else:
        check_out(problem, out, (q, k, v), np)
    if sequences is not None:
        return _packed(request, problem, sequences, q, k, v, out)
    views = [x if problem.layout == "bhsd" else x.transpose(0, 2, 1, 3) for x in (q, k, v, out)]
    rules = _rules(request, problem)
    if request.gate == "qk":
        return reference.gate_scores(*views[:3], **rules).astype(np.float32), None
    if request.gate == "softmax":
        return reference.gate_probabilities(*views[:3], **rules).astype(np.float32), None
    if request.gate == "pv":  # all scores 0, whatever q and k hold and the rules make of them
        views[0], views[1] = np.zeros_like(views[0]), np.zeros_like(views[1])
        rules = {name: rules[name] for name in _POSITION_RULES if name in rules}
    _, lse = reference.tiled(*views[:3], **rules, out=views[3])
    return out, lse


def _packed(
    request: Request,
    problem: AttentionProblem,
    boundaries: tuple[Any, Any],
    q: Any,
    k: Any,
    v: Any,
    out: Any,
) -> tuple[Any, Any]:
    lse = np.empty(problem.lse_shape, np.float32)
    rules = _rules(request, problem)
    for n, (*one, rows) in enumerate(tiled_attention.sequences(q, k, v, *boundaries)):
        target = out[rows].swapaxes(0, 1)[None]
        _, found = reference.tiled(*one, **rules, sequence=n, out=target)
        lse[:, rows] = found[0]
    return out, lse


def _rules(request: Request, problem: AttentionProblem) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in _RULES}
    return {"softmax_scale": problem.softmax_scale, **given}
