"""Tensor maps that were moved are those that the driver encodes."""

from __future__ import annotations

import numpy as np
import pytest
from cases_launch import HOPPER, config_of, moved, output_of, ruled

from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import tensor_map
from flashcore_cupy.problem.attention_problem import (
    contiguous_problem,
)


@pytest.mark.parametrize("window", [(-1, -1), (100, 0)])
def test_moved_maps_are_those_that_the_driver_encodes(window: tuple[int, int]) -> None:
    if compiler.device_arch() != HOPPER:
        pytest.skip(f"needs {HOPPER}")
    problem = contiguous_problem(2, 8, 300, 96, heads_kv=2, seqlen_kv=700, head_dim_v=64)
    problem = ruled(problem, window=window)
    chosen = config_of(problem)
    views = chosen.views(problem, output_of(problem))
    assert len(views) == 4
    for found, place in moved(problem, chosen):
        expected = [tensor_map.encode(n, view) for n, view in zip(place, views, strict=True)]
        assert (found == np.concatenate(expected)).all()
