"""Each stage alone, by the debug gates: scores, probabilities, P V; each test runs on both.

Lengths are those at which a stage goes wrong first: one tile, one less, one more, several.
"""

from __future__ import annotations

import numpy as np
from places import EXACT, Place, each, everywhere

from flashcore_cupy.cpu import reference
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.select import selector

every_mask = each("causal", [False, True], emulated=[True])


def lengths_of(on: Place) -> list[tuple[int, int]]:
    """Queries and keys, by the kernel's own tile."""
    if on.is_numpy:
        return [(33, 47), (300, 200)]
    tile = selector.select(contiguous_problem(1, 1, 1, 64), "sm_90a", kernel=on.kernel).config.tile
    m, n = tile.block_m, tile.block_n
    lengths = [(m, n), (m - 1, n - 1), (m + 1, n + 1), (2 * m + 5, 3 * n - 7)]
    return lengths if on.is_emulated else [*lengths, (1, 1), (512, 512)]


def inputs(seqlen_q: int, seqlen_kv: int, dtype: object = np.float16) -> list[np.ndarray]:
    rng = np.random.default_rng(seqlen_q)
    shapes = [(1, 2, s, 64) for s in (seqlen_q, seqlen_kv, seqlen_kv)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def gated(on: Place, gate: str | None, *operands: np.ndarray, causal: bool) -> np.ndarray:
    return on.run(*operands, gate=gate, causal=causal).astype(np.float64)


@everywhere(*EXACT)
@every_mask
def test_qk(on: Place, causal: bool) -> None:
    for lengths in lengths_of(on):
        q, k, v = inputs(*lengths)
        got = gated(on, "qk", q, k, v, causal=causal)
        expected = reference.gate_scores(q, k, v, causal=causal)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
        seen = np.isfinite(expected)
        assert np.abs(got[seen] - expected[seen]).max(initial=0.0) <= 0.002, lengths


@everywhere(*EXACT)
@every_mask
def test_softmax(on: Place, causal: bool) -> None:
    for lengths in lengths_of(on):
        q, k, v = inputs(*lengths)
        got = gated(on, "softmax", q, k, v, causal=causal)
        expected = reference.gate_probabilities(q, k, v, causal=causal)
        # A probability is at most 1, and was rounded to fp16 on its way.
        assert np.abs(got - expected).max(initial=0.0) <= 2.0**-11, lengths
        assert (got[expected == 0] == 0).all(), "hidden keys have no weight at all"


@everywhere(*EXACT)
@every_mask
def test_pv(on: Place, causal: bool) -> None:
    """Every weight alike, so a lost or doubled tile of P V cannot hide behind small weights."""
    for lengths in lengths_of(on):
        q, k, v = inputs(*lengths)
        got = gated(on, "pv", q, k, v, causal=causal)
        expected = reference.gate_uniform(q, k, v, causal=causal)
        assert np.abs(got - expected).max(initial=0.0) <= 2.0**-10 * max(1, np.abs(expected).max())
        q[...] = np.nan  # neither scores nor what they are made of matter
        np.testing.assert_array_equal(got, gated(on, "pv", q, k, v, causal=causal))


@everywhere(*EXACT)
@every_mask
def test_the_whole(on: Place, causal: bool) -> None:
    for lengths in lengths_of(on):
        q, k, v = inputs(*lengths)
        got = gated(on, None, q, k, v, causal=causal)
        expected, _ = reference.oracle(q, k, v, causal=causal)
        assert np.abs(got - expected).max(initial=0.0) <= 0.002, lengths
