"""ptx/mma.cuh: products of 16-bit matrices, and the loads that fill their fragments."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from probe import (
    OPERANDS,
    Launch,
    Probes,
    assert_same_bits,
    check_products,
    random_operands,
)

DTYPES = {"half": np.float16, "bfloat16": ml_dtypes.bfloat16}
LANES = np.arange(32)


@pytest.mark.parametrize("order", ["in order", "apart", "any", "one row"])
def test_ldmatrix(probe: Probes, order: str) -> None:
    """Rows of 16 bytes, wherever they are."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, 2048, np.uint8)
    place = {
        "in order": LANES,
        "apart": LANES * 4 + 3,
        "any": rng.permutation(128)[:32],
        "one row": LANES * 0 + 77,
    }[order]
    inputs = [x, place.astype(np.int32)]
    outputs = [np.zeros((32, 4), dtype) for dtype in ("u4", "u4", "f4")]
    launch = Launch("matrices", 32, shared=x.size)
    plain, transposed, floats = probe("mma")(launch, inputs, outputs)
    blocks = x.reshape(-1, 16)[place].view(np.uint16).reshape(4, 8, 8)
    assert_same_bits(plain, _pairs(blocks))
    assert_same_bits(transposed, _pairs(blocks.transpose(0, 2, 1)))
    assert_same_bits(floats, plain.view(np.float32))


def _pairs(blocks: np.ndarray) -> np.ndarray:
    """What lane l holds of each block: columns 2 (l % 4) and the next of row l / 4."""
    words = np.ascontiguousarray(blocks).view(np.uint32)
    return words[:, LANES // 4, LANES % 4].T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 96, 128])
def test_mma_of_tiles(probe: Probes, dtype: str, columns: int) -> None:
    rng = np.random.default_rng(6)
    # Small integers: every product and sum is exact, so any slip of layout shows.
    a, b = (rng.integers(-8, 8, (16, 16)).astype(DTYPES[dtype]) for _ in range(2))
    c = rng.integers(-100, 100, (16, 16)).astype(np.float32)
    inputs = [np.array([columns], np.int32), a.view(np.uint16), b.view(np.uint16), c]
    launch = Launch(f"products_{dtype}", 32, shared=2 * 2 * 16 * (columns + 8))
    row, col = probe("mma")(launch, inputs, [np.zeros((16, 16), "f4") for _ in range(2)])
    a, b = a.astype(np.float32), b.astype(np.float32)
    assert_same_bits(row, a @ b + c)
    assert_same_bits(col, a @ b.T + c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPERANDS)
def test_mma(probe: Probes, dtype: str, kind: str) -> None:
    a, b, c = random_operands(kind, 16, 8, 16, 256)
    a, b, c = a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]), c.astype(np.float32)
    run, inputs = probe("mma"), [a.view(np.uint16), b.view(np.uint16), c]
    results = run.each(Launch(f"one_{dtype}", 32, 256), inputs, [np.zeros_like(c)])
    got = {machine: d for machine, (d,) in results.items()}
    check_products(run, got, a, b, c, f"mma {dtype}, {kind}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_of_what_is_not_finite(probe: Probes, dtype: str) -> None:
    """Infinities and NaN come out where they go in, subnormal numbers count."""
    rng = np.random.default_rng(8)
    a, b = (rng.integers(1, 8, (4, *s)).astype(DTYPES[dtype]) for s in ((16, 16), (16, 8)))
    c = np.ones((4, 16, 8), np.float32)
    a[0, 3, 5], b[0, 7, 2], c[0, 9, 4] = np.inf, -np.inf, np.nan
    a[1, 3, 5], b[1, 5, 2] = np.inf, 0
    c[2, 1, 1], a[2, 1] = -np.inf, np.inf
    smallest = np.array(1, np.uint16).view(DTYPES[dtype])
    a[3], b[3], c[3] = 0, 0, 0
    a[3, 2, 6], b[3, 6, 3] = smallest, 4
    run, inputs = probe("mma"), [a.view(np.uint16), b.view(np.uint16), c]
    results = run.each(Launch(f"one_{dtype}", 32, 4), inputs, [np.zeros_like(c)])
    with np.errstate(invalid="ignore"):
        expected = c + a.astype(np.float32) @ b.astype(np.float32)
    assert expected[3, 2, 3] == 4 * float(smallest) > 0
    for machine, (d,) in results.items():
        np.testing.assert_array_equal(d, expected, machine)
