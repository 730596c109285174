"""What the debug gates "qk" and "softmax" write, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.parameters import gate_tiles


def allocate(problem: AttentionProblem, config: KernelConfig) -> dict[str, Any]:
    """Arrays by their names in ``AttentionParams``; what is not written means hidden keys."""
    import cupy

    rows = (problem.batch, problem.heads_q, problem.seqlen_q)
    if problem.gate == "qk":
        return {"gate": cupy.full((*rows, problem.seqlen_kv), -np.inf, cupy.float32)}
    if problem.gate == "softmax":
        tiles = gate_tiles(problem, config)
        return {
            "gate": cupy.zeros((*rows, problem.seqlen_kv), cupy.float32),
            "gate_tile_max": cupy.full((*rows, tiles), -np.inf, cupy.float32),
            "gate_row_max": cupy.zeros(rows, cupy.float32),
            "gate_row_sum": cupy.zeros(rows, cupy.float32),
        }
    return {}


def output(problem: AttentionProblem, config: KernelConfig, arrays: Mapping[str, Any]) -> Any:
    """Scores, or normalised probabilities p~ * exp(m_j - m) / l: fp32 (B, Hq, Sq, Skv).

    Probabilities were written at the maximum m_j that their tile had seen; m is the row's. Both in
    natural units.
    """
    import cupy

    if problem.gate == "qk":
        return arrays["gate"]
    row_max, row_sum = arrays["gate_row_max"][..., None], arrays["gate_row_sum"][..., None]
    factor = cupy.exp(arrays["gate_tile_max"] - row_max) / row_sum
    factor = cupy.where(row_sum == 0, cupy.float32(0), factor)  # a query without keys
    per_key = cupy.repeat(factor, config.softmax_keys, axis=-1)[..., : problem.seqlen_kv]
    return arrays["gate"] * per_key
