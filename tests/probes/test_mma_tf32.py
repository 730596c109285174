"""The tf32 instruction of ptx/mma.cuh, and products of fp32 by tile/mma_tf32_tile.cuh."""

from __future__ import annotations

import numpy as np
import pytest
from cases_ptx import lane_offsets_f32
from probe import (
    OPERANDS,
    Launch,
    Probes,
    assert_same_bits,
    check_products,
    random_operands,
)

ROWS, KEYS = 32, 32


def test_mma_tf32_of_integers(probe: Probes) -> None:
    rng = np.random.default_rng(8)
    a, b, c = (rng.integers(-8, 8, (n, 8)).astype(np.float32) for n in (16, 8, 16))
    launch = Launch("product_tf32", 32, shared=4 * (16 + 8) * 8)
    (d,) = probe("mma_tf32")(launch, [a, b, c], [np.zeros((16, 8), "f4")])
    assert_same_bits(d, a @ b + c)


@pytest.mark.parametrize("kind", OPERANDS)
def test_mma_tf32(probe: Probes, kind: str) -> None:
    """Of fp32 the instruction reads 10 fraction bits."""
    a, b, c = (x.astype(np.float32) for x in random_operands(kind, 16, 8, 8, 256))
    run = probe("mma_tf32")
    launch = Launch("product_tf32", 32, 256, shared=4 * (16 + 8) * 8)
    results = run.each(launch, [a, b, c], [np.zeros_like(c)])
    got = {machine: d for machine, (d,) in results.items()}
    a, b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
    check_products(run, got, a, b, c, f"mma tf32, {kind}", depth=8)


def products(probe: Probes, q: np.ndarray, k: np.ndarray, p: np.ndarray, v: np.ndarray) -> list:
    """S = Q K^T and O = P V by the tiles of mma_tf32_tile.cuh, on each machine."""
    depth = q.shape[1]
    inputs = [q, k, p, v, np.array([len(k)], np.int32)]
    outputs = [np.zeros((ROWS, len(k)), "f4"), np.zeros(q.shape, "f4")]
    launch = Launch(f"products_{depth}", 32, shared=4 * (ROWS + 2 * KEYS) * (depth + 4))
    return list(probe("mma_tf32").each(launch, inputs, outputs).items())


def assert_fp32_accurate(x: np.ndarray, a: np.ndarray, b: np.ndarray, what: str) -> None:
    """An entry of a b may err in the last bits of the sum of its terms' magnitudes."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    error = np.max(np.abs(x - a @ b) / (np.abs(a) @ np.abs(b)))
    print(f"figure: {what}: relative error {error:.2e}")
    assert error < 1e-6


@pytest.mark.parametrize("depth", [48, 64])
@pytest.mark.parametrize("keys", [96, 4096])
def test_products_of_fp32(probe: Probes, depth: int, keys: int) -> None:
    """Over many keys of one sign, truncated sums would drift by 1e-5."""
    rng = np.random.default_rng(9)
    q, k, v = (rng.standard_normal((n, depth), np.float32) for n in (ROWS, keys, keys))
    p = rng.random((ROWS, keys), np.float32)
    if keys > 96:
        q, k, v = np.abs(q), np.abs(k), np.abs(v)
    for machine, (s, o) in products(probe, q, k, p, v):
        assert_fp32_accurate(s, q, k.T, f"q k^T of fp32, {depth} deep, {machine}")
        assert_fp32_accurate(o, p, v, f"p v of fp32, {keys} keys, {machine}")


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_products_of_what_is_not_finite(probe: Probes, value: float) -> None:
    rng = np.random.default_rng(10)
    q, k, v = (rng.standard_normal((n, 64), np.float32) for n in (ROWS, KEYS, KEYS))
    p = rng.random((ROWS, KEYS), np.float32)
    q[5, 3] = k[17, 40] = v[30, 9] = value
    with np.errstate(invalid="ignore"):
        expected = q @ k.T, p @ v
    for _, results in products(probe, q, k, p, v):
        for got, right in zip(results, expected, strict=True):
            bad = ~np.isfinite(right)
            assert bad.any() and not bad.all()
            np.testing.assert_array_equal(np.where(bad, got, 0), np.where(bad, right, 0))
            np.testing.assert_allclose(got[~bad], right[~bad], atol=2e-5)


def test_lane_offsets_of_fp32(probe: Probes) -> None:
    outputs = [np.zeros(32, "u4") for _ in range(3)]
    got = probe("mma_tf32")(Launch("offsets_64", 32), [], outputs)
    for offsets, expected in zip(got, lane_offsets_f32(64 + 4), strict=True):
        assert_same_bits(offsets, expected)
