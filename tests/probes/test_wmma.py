"""ptx/wmma.cuh: products whose fragments are nobody's business."""

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
SHARED = 2 * 2 * 16 * 24 + 4 * 16 * 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_wmma_of_integers(probe: Probes, dtype: str) -> None:
    rng = np.random.default_rng(4)
    # Small integers: every product and sum is exact, so any slip of layout shows.
    a, b = (rng.integers(-8, 8, (16, 16)).astype(DTYPES[dtype]) for _ in range(2))
    c = rng.integers(-100, 100, (16, 16)).astype(np.float32)
    inputs = [a.view(np.uint16), b.view(np.uint16), c]
    outputs = [np.zeros((16, 16), "f4") for _ in range(3)]
    launch = Launch(f"products_{dtype}", 32, shared=SHARED)
    row, col, direct = probe("wmma")(launch, inputs, outputs)
    a, b = a.astype(np.float32), b.astype(np.float32)
    assert_same_bits(row, a @ b + c)
    assert_same_bits(col, a @ b.T + np.float32(0.5))
    assert_same_bits(direct, col)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPERANDS)
def test_wmma(probe: Probes, dtype: str, kind: str) -> None:
    a, b, c = random_operands(kind, 16, 16, 16, 128)
    a, b, c = a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]), c.astype(np.float32)
    run, inputs = probe("wmma"), [a.view(np.uint16), b.view(np.uint16), c]
    launch = Launch(f"products_{dtype}", 32, 128, shared=SHARED)
    results = run.each(launch, inputs, [np.zeros_like(c) for _ in range(3)])
    of_rows, of_columns = ({name: out[i] for name, out in results.items()} for i in (0, 1))
    check_products(run, of_rows, a, b, c, f"wmma {dtype}, {kind}")
    b = b.transpose(0, 2, 1)
    check_products(run, of_columns, a, b, np.full_like(c, 0.5), f"wmma {dtype}, columns, {kind}")


def test_accumulator_rows(probe: Probes) -> None:
    rng = np.random.default_rng(5)
    c = rng.standard_normal((16, 16)).astype(np.float32)
    factor = rng.standard_normal(16).astype(np.float32)
    launch = Launch("scaled_rows", 32, shared=4 * (16 * 20 + 16))
    (out,) = probe("wmma")(launch, [c, factor], [np.zeros((16, 16), "f4")])
    assert_same_bits(out, c * factor[:, None])
