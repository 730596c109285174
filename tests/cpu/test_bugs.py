"""Bugs that no kernel's text shows: bank conflicts of shared rows, alignment of vector loads."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import ROOT

from flashcore_cupy.problem.attention_problem import operand
from flashcore_cupy.select import ladder, table

# ---- shared rows against bank conflicts ----------------------------------------------------------


def conflicts(row_bytes: int) -> int:
    """How many of 8 rows, 16 bytes each, meet in one bank: one phase of WMMA's load."""
    banks = [((row * row_bytes // 4) + word) % 32 for row in range(8) for word in range(4)]
    return max(banks.count(bank) for bank in range(32))


@pytest.mark.parametrize("head_dim", table.WMMA_HEAD_DIMS)
def test_shared_rows_do_not_conflict(head_dim: int) -> None:
    row = ladder.padded_row(head_dim)
    assert row % 8 == 0, "WMMA takes row lengths that are a multiple of 8"
    assert conflicts(2 * row) == 1


def test_the_conflict_arithmetic_sees_conflicts() -> None:
    assert conflicts(2 * 64) == 8, "an unpadded row of 64: all eight rows in the same banks"
    assert conflicts(2 * 80) == 2, "a row of 64 padded to 80"


def test_kernels_and_launcher_pad_alike() -> None:
    """Only the sum of all sizes is asserted when compiling; the pad itself is one number."""
    text = (ROOT / "kernels" / "ladder" / "tile_load.cuh").read_text()
    assert "int padded_row(int cols) { return cols + 8; }" in text
    assert ladder.padded_row(64) == 72


def _softmax_banks(access_bytes: int, row_bytes: int, lanes: int, block_n: int) -> int:
    """Most lanes of a phase of the warp-owned softmax that meet in one bank (piece_col)."""
    pieces = block_n // 8
    worst = 0
    for first in range(0, 32, lanes):
        for i in range(pieces):
            banks: list[int] = []
            for lane in range(first, first + lanes):
                row, half = lane % 16, lane // 16
                swap = (row >> 2 ^ row >> 3) & 1
                piece = half * pieces + (i ^ swap)
                start = row * row_bytes + piece * access_bytes
                banks += [(start // 4 + word) % 32 for word in range(access_bytes // 4)]
            worst = max(worst, *(banks.count(bank) for bank in range(32)))
    return worst


@pytest.mark.parametrize("block_n", [32, 64])
def test_warp_softmax_does_not_conflict(block_n: int) -> None:
    row = ladder.padded_row(block_n)
    assert _softmax_banks(16, 4 * row, 8, block_n) == 1, "reading four scores"
    assert _softmax_banks(8, 2 * row, 16, block_n) == 1, "writing four probabilities"


# ---- vector loads where rows are aligned for them, and only there --------------------------------


@pytest.mark.parametrize(
    ("dtype", "columns", "first", "stride", "align"),
    [
        ("float16", 64, 0, 64, 16),
        ("float16", 64, 0, 192, 16),  # q of a packed q, k, v
        ("float16", 64, 1, 72, 2),  # a view that starts one element late
        ("float16", 64, 4, 72, 8),
        ("float16", 64, 0, 66, 4),  # rows drift against 16 bytes
        ("float16", 36, 0, 36, 8),  # D % 8 != 0
        ("float16", 37, 0, 37, 2),
        ("float16", 37, 0, 40, 2),  # rows are aligned, their ends are not
        ("float32", 33, 0, 33, 4),
    ],
)
def test_alignment_of_rows(dtype: str, columns: int, first: int, stride: int, align: int) -> None:
    base = np.zeros((1, 2, 16, stride + first), dtype)
    view = np.lib.stride_tricks.as_strided(
        base[..., first:],
        shape=(1, 2, 4, columns),
        strides=tuple(base.itemsize * n for n in (8 * stride, 4 * stride, stride, 1)),
    )
    address = 4096 + first * base.itemsize
    assert operand("q", view, "bhsd", address).align_bytes == align
