"""What debug gates write into arrays of their own, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.gradients import BackwardProblem
from flashcore_cupy.select.config import KernelConfig


def tiles_of(problem: AttentionProblem, config: KernelConfig) -> int:
    """Maxima per row that the gate "softmax" writes.

    The last tile has as many as the others, even if it holds fewer keys.
    """
    tile = config.tile
    return -(-problem.seqlen_kv // tile.block_n) * (tile.block_n // config.softmax_keys)


def allocate(problem: AttentionProblem, config: KernelConfig, xp: Any) -> dict[str, Any]:
    """Arrays by their names in ``AttentionParams``; what is not written means hidden keys.

    ``xp``: the module of the arrays, CuPy or NumPy.
    """
    rows = (problem.batch, problem.heads_q, problem.seqlen_q)
    if problem.gate == "qk":
        return {"gate": xp.full((*rows, problem.seqlen_kv), -np.inf, xp.float32)}
    if problem.gate == "softmax":
        tiles = tiles_of(problem, config)
        return {
            "gate": xp.zeros((*rows, problem.seqlen_kv), xp.float32),
            "gate_tile_max": xp.full((*rows, tiles), -np.inf, xp.float32),
            "gate_row_max": xp.zeros(rows, xp.float32),
            "gate_row_sum": xp.zeros(rows, xp.float32),
        }
    return {}


def allocate_backward(problem: BackwardProblem, xp: Any) -> dict[str, Any]:
    """The same of a backward pass; what is not written is 0, as of hidden keys."""
    if problem.gate is None:
        return {}
    return {"gate": xp.zeros(tuple(problem.attention.scores), xp.float32)}


def output(
    problem: AttentionProblem, config: KernelConfig, arrays: Mapping[str, Any], xp: Any
) -> Any:
    """Scores, or normalised probabilities p~ * exp(m_j - m) / l: fp32 (B, Hq, Sq, Skv).

    Probabilities were written at the maximum m_j that their tile had seen; m is the row's. Both in
    natural units.
    """
    if problem.gate == "qk":
        return arrays["gate"]
    row_max, row_sum = arrays["gate_row_max"][..., None], arrays["gate_row_sum"][..., None]
    with np.errstate(all="ignore"):
        factor = xp.exp(arrays["gate_tile_max"] - row_max) / row_sum
    factor = xp.where(row_sum == 0, xp.float32(0), factor)  # a query without keys
    per_key = xp.repeat(factor, config.softmax_keys, axis=-1)[..., : problem.seqlen_kv]
    return arrays["gate"] * per_key
