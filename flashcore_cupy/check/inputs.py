"""Random inputs of a problem, on the host."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from flashcore_cupy.cpu import reference
from flashcore_cupy.cpu.reference import InputKind
from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.blocks import Array


def inputs(
    problem: AttentionProblem, seed: int, kind: InputKind = "normal"
) -> tuple[Array, Array, Array]:
    """Random q, k, v for a problem as canonical NumPy arrays; the same for the same seed."""
    return reference.make_inputs(
        kind,
        batch=problem.batch,
        heads=problem.heads_q,
        heads_kv=problem.heads_kv,
        seqlen=problem.seqlen_q,
        seqlen_kv=problem.seqlen_kv,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        dtype=problem.dtype,
        seed=seed,
    )


def output_gradient(problem: AttentionProblem, seed: int) -> Array:
    """A random gradient of the output, (B, Hq, Sq, Dv) in q's dtype; the same for the same seed."""
    dtype = ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else problem.dtype
    shape = (*problem.q.shape[:3], problem.head_dim_v)
    rng = np.random.default_rng((seed, 2))
    return np.asarray(rng.standard_normal(shape, np.float32).astype(dtype))
