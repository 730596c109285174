"""What a problem and a configuration fix of a kernel's parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand
from flashcore_cupy.problem.rules import Rules
from flashcore_cupy.select import gates, grids
from flashcore_cupy.select.config import KernelConfig

_LOG2_E = math.log2(math.e)


def fixed_params(
    problem: AttentionProblem,
    config: KernelConfig,
    output: Operand,
    resident: int,
    multiprocessors: int,
) -> np.ndarray[Any, Any]:
    """The struct that a kernel takes, with all addresses 0.

    ``resident``: the thread blocks that run side by side on the whole GPU.
    """
    params = np.zeros((), config.params)
    for operand in (problem.q, problem.k, problem.v, output):
        params[f"{operand.name}_strides"] = operand.strides
    params["batch"], params["heads_q"] = problem.batch, problem.heads_q
    params["heads_kv"] = problem.heads_kv
    params["group"] = problem.heads_q // problem.heads_kv
    params["seqlen_q"], params["seqlen_kv"] = problem.seqlen_q, problem.visible_kv
    params["causal_offset"] = problem.causal_offset
    params["top_left"] = problem.causal == "top-left"
    left, right = problem.window
    params["window_left"], params["window_right"] = max(left, 0), max(right, 0)
    heads = problem.heads_q * problem.seqlen_q
    params["lse_strides"] = (0 if problem.packed else heads, problem.seqlen_q)
    params["gate_row"] = problem.seqlen_kv
    params["gate_tiles"] = gates.tiles_of(problem, config)
    params["m_blocks"] = grids.blocks_per_head(problem, config)
    params["splits"] = config.splits(problem, resident)
    params["section"] = config.section(problem, multiprocessors)
    _set_rules(params, problem.rules)
    params["softmax_scale"] = problem.softmax_scale
    params["scale_log2"] = problem.softmax_scale * _LOG2_E
    return params


def _set_rules(params: np.ndarray[Any, Any], rules: Rules) -> None:
    for rule, described in rules.given:
        for name, value in rule.params(described).items():
            params[name] = value
