"""What Hopper's instructions are judged by: places in registers and in shared memory."""

from __future__ import annotations

import numpy as np
from cases_ptx_sm90 import (
    PRODUCTS,
    a_registers,
    accumulator_places,
    as_it_lands,
)


def test_every_width_has_a_probe() -> None:
    widths = {int(n) for form, *_, n in PRODUCTS if form == "SS"}
    assert widths == set(range(16, 257, 16))
    assert {swizzle for _, _, swizzle, *_ in PRODUCTS} == {"128", "64", "32"}


def test_fragments_cover_the_matrix() -> None:
    """The maps that the products are judged by name each place once."""
    for n in (16, 256):
        rows, cols = accumulator_places(n)
        assert np.array_equal(np.sort((rows * n + cols).ravel()), np.arange(64 * n))
    a = np.arange(64 * 32, dtype=np.uint16).reshape(64, 32)
    halves = a_registers(a).astype("<u4").view(np.uint16)
    assert np.array_equal(np.sort(halves.ravel()), np.arange(64 * 32))


def test_boxes_land_without_bank_conflicts() -> None:
    """What the copies are judged by: the same 16 bytes of eight rows fall into different banks."""
    numbered = np.arange(64, dtype=np.uint16).repeat(8).reshape(8, 64)  # row * 8 + piece
    landed = as_it_lands(numbered, 128)[:1024].view(np.uint16).reshape(8, 8, 8)[:, :, 0]
    for piece in range(8):
        rows, slots = np.nonzero(landed % 8 == piece)
        assert sorted(rows) == sorted(slots) == list(range(8))
        assert np.array_equal(landed[rows, slots], rows * 8 + piece)
