"""Each stage of attention alone on NumPy arrays, and how a kernel's stages are read."""

from __future__ import annotations

import numpy as np
import pytest
from cases_gates import *  # noqa: F403

from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.select import gates, selector


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 300])
def test_probabilities_of_tiles_are_joined(keys: int) -> None:
    """From what a kernel writes, each tile's at the maximum so far; here it is written by NumPy."""
    problem = contiguous_problem(1, 2, 5, 64, seqlen_kv=keys, gate="softmax")
    config = selector.select(problem, "sm_90a", kernel="mma_sm80").config
    arrays = gates.allocate(problem, config, np)
    assert {name: x.dtype for name, x in arrays.items()} == dict.fromkeys(arrays, np.float32)
    scores = np.random.default_rng(keys).standard_normal((1, 2, 5, keys)) * 5
    scores[..., 0, :] = -np.inf  # a query without keys: kernels write nothing for it
    row_max = np.full(scores.shape[:3], -np.inf)
    for tile, first in enumerate(range(0, keys, config.softmax_keys)):
        block = scores[..., first : first + config.softmax_keys]
        row_max = np.maximum(row_max, block.max(-1))
        arrays["gate_tile_max"][..., tile] = row_max
        with np.errstate(invalid="ignore"):
            p = np.nan_to_num(np.exp(block - row_max[..., None]))
        arrays["gate"][..., first : first + config.softmax_keys] = p
    arrays["gate_row_max"][:] = np.where(np.isneginf(row_max), 0, row_max)
    weights = np.exp(scores - arrays["gate_row_max"][..., None])
    arrays["gate_row_sum"][:] = weights.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        got = gates.output(problem, config, arrays, np)
    expected = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_gates_of_scores_start_as_hidden() -> None:
    problem = contiguous_problem(2, 3, 5, 64, seqlen_kv=7, gate="qk")
    config = selector.select(problem, "sm_90a").config
    arrays = gates.allocate(problem, config, np)
    assert list(arrays) == ["gate"] and arrays["gate"].shape == (2, 3, 5, 7)
    assert np.isneginf(arrays["gate"]).all()
    assert gates.output(problem, config, arrays, np) is arrays["gate"]
    assert gates.allocate(contiguous_problem(1, 1, 5, 64, gate="pv"), config, np) == {}
    assert gates.allocate(contiguous_problem(1, 1, 5, 64), config, np) == {}
