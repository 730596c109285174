"""ptx/wgmma.cuh: products of operands in swizzled shared memory, registers that change hands."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases_ptx_sm90 import PRODUCTS, WARPGROUP_THREADS, a_registers, accumulator_places
from probe import (
    OPERANDS,
    Launch,
    Probe,
    Probes,
    assert_same_bits,
    check_products,
    random_operands,
)

DTYPES = {"half_t": np.float16, "bfloat16_t": ml_dtypes.bfloat16}
SHARED = 64 * 128 * 2 + 256 * 128 * 2
"""Bytes for any product: a, and b 128 deep."""
DEPTHS = {128: (64, 128), 64: (32, 96), 32: (16, 80)}


def cases() -> list:
    """(form, type, swizzle, how b is stored, N, depth): SS over one panel, and over several."""
    return [
        (form, dtype, int(swizzle), way, int(n), depth)
        for form, dtype, swizzle, way, n in PRODUCTS
        for depth in (DEPTHS[int(swizzle)] if form == "SS" else (64,))
    ]


def multiply(
    run: Probe, case: tuple, a: np.ndarray, b: np.ndarray, c: np.ndarray | None
) -> dict[str, np.ndarray]:
    """A B^T, or C + A B^T, on each machine. a: (64, depth), b: (n, depth)."""
    form, dtype, swizzle, way, n, depth = case
    bits_a, bits_b = (x.astype(DTYPES[dtype]).view(np.uint16) for x in (a, b))
    given_a = bits_a if form == "SS" else a_registers(bits_a)
    given_b = np.ascontiguousarray(bits_b if way == "rows" else bits_b.T)
    rows, cols = accumulator_places(n)
    before = np.full((64, n), np.nan, np.float32) if c is None else c
    numbers = [np.int32(c is not None)]
    if form == "SS":
        numbers.insert(0, np.int32(depth))
    kernel = f"{form.lower()}_{dtype}_{swizzle}_{way}_{n}"
    launch = Launch(kernel, WARPGROUP_THREADS, shared=SHARED)
    got = {}
    for machine, (d,) in run.each(
        launch, [given_a, given_b, *numbers], [before[rows, cols]]
    ).items():
        got[machine] = np.full((64, n), np.nan, np.float32)
        got[machine][rows, cols] = d
    return got


@pytest.mark.parametrize(("form", "dtype", "swizzle", "way", "n", "depth"), cases())
def test_wgmma_of_integers(
    probe: Probes, form: str, dtype: str, swizzle: int, way: str, n: int, depth: int
) -> None:
    rng = np.random.default_rng([swizzle, n, depth])
    # Small integers: every product and sum is exact, so any slip of layout shows.
    a, b = (rng.integers(-8, 9, (rows, depth)).astype("f4") for rows in (64, n))
    c = rng.integers(-100, 101, (64, n)).astype(np.float32)
    for before in (None, c):
        expected = a @ b.T + (0 if before is None else c)
        got = multiply(probe("wgmma"), (form, dtype, swizzle, way, n, depth), a, b, before)
        for machine, d in got.items():
            assert_same_bits(d, expected, machine)


#: Of each form, a few: those of one instruction, and chains of four.
SEVERAL = [
    *(case for case in cases() if case[-1] == 16),
    ("RS", "half_t", 128, "transposed", 64, 64),
    ("RS", "half_t", 128, "rows", 112, 64),
    ("RS", "bfloat16_t", 128, "transposed", 176, 64),
]


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize(("form", "dtype", "swizzle", "way", "n", "depth"), SEVERAL)
def test_wgmma(
    probe: Probes, form: str, dtype: str, swizzle: int, way: str, n: int, depth: int, kind: str
) -> None:
    a, b, c = (x[0] for x in random_operands(kind, 64, n, depth, 1))
    a, b, c = a.astype(DTYPES[dtype]), b.astype(DTYPES[dtype]), c.astype(np.float32)
    run, case = probe("wgmma"), (form, dtype, swizzle, way, n, depth)
    what = f"wgmma {form} {dtype}, n = {n}, {depth} deep, {kind}"
    check_products(run, multiply(run, case, a, b.T, c), a, b, c, what)


def test_registers_change_hands(probe: Probes) -> None:
    x = np.random.default_rng(1).integers(-100, 101, 384).astype(np.float32)
    (y,) = probe("wgmma")(Launch("shared_out", 384), [x], [np.full(384, np.nan, "f4")])
    assert_same_bits(y, 8128 * x)
