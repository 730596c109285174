"""Each stage of each kernel alone, by the debug gates: scores, probabilities, P V.

Lengths are those at which a stage goes wrong first: one tile, one less, one more, several.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers import runs_here

import flashcore_cupy
from flashcore_cupy.check import verify
from flashcore_cupy.cpu import reference
from flashcore_cupy.launch import gates
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.select import registry, selector

EXACT_KERNELS = [name for name, kernel in registry.KERNELS.items() if not kernel.quantizes]


def _lengths(kernel: str) -> list[tuple[int, int]]:
    tile = selector.select(contiguous_problem(1, 1, 1, 64), "sm_90a", kernel=kernel).config.tile
    m, n = tile.block_m, tile.block_n
    return [(m, n), (m - 1, n - 1), (m + 1, n + 1), (1, 1), (2 * m + 5, 3 * n - 7), (512, 512)]


def _inputs(seqlen_q: int, seqlen_kv: int, dtype: object = np.float16) -> list[np.ndarray]:
    rng = np.random.default_rng(seqlen_q)
    shapes = [(1, 2, s, 64) for s in (seqlen_q, seqlen_kv, seqlen_kv)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _gated(kernel: str, gate: str | None, q, k, v, **rules: object) -> np.ndarray:
    if kernel == "numpy":
        got = flashcore_cupy.attention(q, k, v, gate=gate, **rules)
        return np.asarray(got, np.float64)
    import cupy

    arrays = [cupy.asarray(x) for x in (q, k, v)]
    got = flashcore_cupy.attention(*arrays, kernel=kernel, gate=gate, **rules)
    return cupy.asnumpy(got).astype(np.float64)


Case = tuple[str, int, int]


def _cases(on: str) -> list[Case]:
    """(kernel, Sq, Skv): every kernel at its own lengths, or NumPy."""
    if on == "numpy":
        return [("numpy", 33, 47), ("numpy", 300, 200)]
    return [
        (kernel, *lengths)
        for kernel in filter(runs_here, EXACT_KERNELS)
        for lengths in _lengths(kernel)
    ]


ON = ["numpy", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("causal", [False, True])
def test_qk(on: str, causal: bool) -> None:
    for kernel, seqlen_q, seqlen_kv in _cases(on):
        q, k, v = _inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, "qk", q, k, v, causal=causal)
        expected = reference.gate_scores(q, k, v, causal=causal)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
        seen = np.isfinite(expected)
        assert np.abs(got[seen] - expected[seen]).max(initial=0.0) <= 0.002, (
            kernel,
            seqlen_q,
            seqlen_kv,
        )


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("causal", [False, True])
def test_softmax(on: str, causal: bool) -> None:
    for kernel, seqlen_q, seqlen_kv in _cases(on):
        q, k, v = _inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, "softmax", q, k, v, causal=causal)
        expected = reference.gate_probabilities(q, k, v, causal=causal)
        # A probability is at most 1, and was rounded to fp16 on its way.
        assert np.abs(got - expected).max(initial=0.0) <= 2.0**-11, (kernel, seqlen_q, seqlen_kv)
        assert (got[expected == 0] == 0).all(), "hidden keys have no weight at all"


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("causal", [False, True])
def test_pv(on: str, causal: bool) -> None:
    """Every weight alike, so a lost or doubled tile of P V cannot hide behind small weights."""
    for kernel, seqlen_q, seqlen_kv in _cases(on):
        q, k, v = _inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, "pv", q, k, v, causal=causal)
        expected = reference.gate_uniform(q, k, v, causal=causal)
        assert np.abs(got - expected).max(initial=0.0) <= 2.0**-10 * max(1, np.abs(expected).max())
        q[...] = np.nan  # neither scores nor what they are made of matter
        np.testing.assert_array_equal(got, _gated(kernel, "pv", q, k, v, causal=causal))


@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("causal", [False, True])
def test_the_whole(on: str, causal: bool) -> None:
    for kernel, seqlen_q, seqlen_kv in _cases(on):
        q, k, v = _inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, None, q, k, v, causal=causal)
        expected, _ = reference.oracle(q, k, v, causal=causal)
        assert np.abs(got - expected).max(initial=0.0) <= 0.002, (kernel, seqlen_q, seqlen_kv)


@pytest.mark.gpu
def test_gates_of_fp8_are_those_of_the_quantised_inputs() -> None:
    from flashcore_cupy.attention import plan
    from flashcore_cupy.measure.job import to_gpu

    for gate in ("qk", "softmax", "pv", None):
        q, k, v = _inputs(100, 130)
        bound = plan(*to_gpu(q, k, v), kernel="fp8_wmma", gate=gate)
        bound.launch()
        result = verify.check_plan(bound, q, k, v)
        assert result.ok, f"{gate}: {result.reason}"


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 300])
def test_probabilities_of_tiles_are_joined(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what a kernel writes, each tile's at the maximum so far; here it is written by NumPy."""
    monkeypatch.setitem(sys.modules, "cupy", np)
    problem = contiguous_problem(1, 2, 5, 64, seqlen_kv=keys, gate="softmax")
    config = selector.select(problem, "sm_90a", kernel="mma_sm80").config
    arrays = gates.allocate(problem, config)
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
        got = gates.output(problem, config, arrays)
    expected = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_gates_of_scores_start_as_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", np)
    problem = contiguous_problem(2, 3, 5, 64, seqlen_kv=7, gate="qk")
    config = selector.select(problem, "sm_90a").config
    arrays = gates.allocate(problem, config)
    assert list(arrays) == ["gate"] and arrays["gate"].shape == (2, 3, 5, 7)
    assert np.isneginf(arrays["gate"]).all()
    assert gates.output(problem, config, arrays) is arrays["gate"]
    assert gates.allocate(contiguous_problem(1, 1, 5, 64, gate="pv"), config) == {}
    assert gates.allocate(contiguous_problem(1, 1, 5, 64), config) == {}
