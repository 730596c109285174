"""The problems of the command line: of contiguous arrays, with rules that are plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flashcore_cupy.check.verify import RNG
from flashcore_cupy.problem.attention_problem import AttentionProblem, contiguous_problem
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.rules import NO_RULES, describe_rules


def problem_json(problem: AttentionProblem) -> dict[str, Any]:
    """Return the sizes and rules of a problem under the command line's names."""
    return {
        "B": problem.batch,
        "H": problem.heads_q,
        "Hkv": problem.heads_kv,
        "S": problem.seqlen_q,
        "Skv": problem.seqlen_kv,
        "D": problem.head_dim,
        "Dv": problem.head_dim_v,
        "dtype": problem.dtype,
        "layout": problem.layout,
        "causal": problem.causal,
        **problem.rules.values,
        "gate": problem.gate,
    }


def problem_of(
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    **others: Any,
) -> AttentionProblem:
    """``contiguous_problem`` with rules that are values; ``ValueError`` says what is wrong."""
    given = {name: others.pop(name, None) for name in NO_RULES.values}
    problem = contiguous_problem(batch, heads, seqlen, head_dim, **others)
    given = {name: value for name, value in given.items() if value is not None}
    return replace(problem, rules=describe_rules(problem.scores, problem.dtype, **given))


def elements_of(problem: AttentionProblem) -> tuple[int, int, int, int]:
    """How many elements q, k, v and the output have."""
    rows = problem.batch * problem.heads_q * problem.seqlen_q
    keys = problem.batch * problem.heads_kv * problem.seqlen_kv
    d, d_v = problem.head_dim, problem.head_dim_v
    return rows * d, keys * d, keys * d_v, rows * d_v


def rules_of(problem: AttentionProblem) -> dict[str, Any]:
    """The arguments, of either pass, that make this problem of arrays ``in_layout``."""
    given = {"layout": problem.layout, "causal": problem.causal, **problem.rules.values}
    return given | ({"rng": RNG} if problem.rules.dropout_p else {})


def in_layout(problem: AttentionProblem, *canonical: Array) -> list[Array]:
    """Arrays (B, H, S, D) as contiguous ones in the problem's layout."""
    if problem.layout == "bhsd":
        return list(canonical)
    return [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in canonical]


def canonical(problem: AttentionProblem, x: Array) -> Array:
    """An array in the problem's layout as (B, H, S, D), a view."""
    return x if problem.layout == "bhsd" else x.transpose(0, 2, 1, 3)


def to_gpu(arrays: Sequence[Array]) -> list[Any]:
    """Copy NumPy arrays to the current device."""
    import cupy

    return [cupy.asarray(x) for x in arrays]
