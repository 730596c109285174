"""Each stage alone, by the debug gates: scores, probabilities, P V; each test runs on both.

Lengths are those at which a stage goes wrong first: one tile, one less, one more, several.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers import runs_here

import flashcore_cupy
from flashcore_cupy.cpu import reference
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.select import registry, selector

EXACT_KERNELS = [name for name, kernel in registry.KERNELS.items() if not kernel.quantizes]


def _lengths(kernel: str) -> list[tuple[int, int]]:
    tile = selector.select(contiguous_problem(1, 1, 1, 64), "sm_90a", kernel=kernel).config.tile
    m, n = tile.block_m, tile.block_n
    return [(m, n), (m - 1, n - 1), (m + 1, n + 1), (1, 1), (2 * m + 5, 3 * n - 7), (512, 512)]


def inputs(seqlen_q: int, seqlen_kv: int, dtype: object = np.float16) -> list[np.ndarray]:
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


def cases_of(on: str) -> list[Case]:
    """(kernel, Sq, Skv): every kernel at its own lengths, or NumPy."""
    if on == "numpy":
        return [("numpy", 33, 47), ("numpy", 300, 200)]
    return [
        (kernel, *lengths)
        for kernel in filter(runs_here, EXACT_KERNELS)
        for lengths in _lengths(kernel)
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_qk(on: str, causal: bool) -> None:
    for kernel, seqlen_q, seqlen_kv in cases_of(on):
        q, k, v = inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, "qk", q, k, v, causal=causal)
        expected = reference.gate_scores(q, k, v, causal=causal)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
        seen = np.isfinite(expected)
        assert np.abs(got[seen] - expected[seen]).max(initial=0.0) <= 0.002, (
            kernel,
            seqlen_q,
            seqlen_kv,
        )


@pytest.mark.parametrize("causal", [False, True])
def test_softmax(on: str, causal: bool) -> None:
    for kernel, seqlen_q, seqlen_kv in cases_of(on):
        q, k, v = inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, "softmax", q, k, v, causal=causal)
        expected = reference.gate_probabilities(q, k, v, causal=causal)
        # A probability is at most 1, and was rounded to fp16 on its way.
        assert np.abs(got - expected).max(initial=0.0) <= 2.0**-11, (kernel, seqlen_q, seqlen_kv)
        assert (got[expected == 0] == 0).all(), "hidden keys have no weight at all"


@pytest.mark.parametrize("causal", [False, True])
def test_pv(on: str, causal: bool) -> None:
    """Every weight alike, so a lost or doubled tile of P V cannot hide behind small weights."""
    for kernel, seqlen_q, seqlen_kv in cases_of(on):
        q, k, v = inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, "pv", q, k, v, causal=causal)
        expected = reference.gate_uniform(q, k, v, causal=causal)
        assert np.abs(got - expected).max(initial=0.0) <= 2.0**-10 * max(1, np.abs(expected).max())
        q[...] = np.nan  # neither scores nor what they are made of matter
        np.testing.assert_array_equal(got, _gated(kernel, "pv", q, k, v, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_the_whole(on: str, causal: bool) -> None:
    for kernel, seqlen_q, seqlen_kv in cases_of(on):
        q, k, v = inputs(seqlen_q, seqlen_kv)
        got = _gated(kernel, None, q, k, v, causal=causal)
        expected, _ = reference.oracle(q, k, v, causal=causal)
        assert np.abs(got - expected).max(initial=0.0) <= 0.002, (kernel, seqlen_q, seqlen_kv)
