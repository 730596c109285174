"""Where Hopper's instructions have what they read and write: registers of a matrix, boxes."""

from __future__ import annotations

import re

import numpy as np
from helpers import ROOT

PRODUCTS = re.findall(
    r"^(SS|RS)\((half_t|bfloat16_t), (\d+), (rows|transposed), (\d+)\)$",
    (ROOT / "tests/probes/wgmma.cu").read_text(),
    re.MULTILINE,
)
WARPGROUP_THREADS = 128
MAX_BOX = 256 * 128


def accumulator_places(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of element e of thread t, each (n / 2, 128)."""
    e, t = np.ogrid[: n // 2, :WARPGROUP_THREADS]
    return 16 * (t // 32) + t % 32 // 4 + e // 2 % 2 * 8, e // 4 * 8 + t % 4 * 2 + e % 2


def a_registers(a: np.ndarray) -> np.ndarray:
    """What the threads hold of A: (steps, 4, 128) pairs of its 16-bit values."""
    step, i, t = np.ogrid[: a.shape[1] // 16, :4, :WARPGROUP_THREADS]
    row = 16 * (t // 32) + t % 32 // 4 + i % 2 * 8
    col = 16 * step + t % 4 * 2 + i // 2 * 8
    return np.ascontiguousarray(a[row, col] | a[row, col + 1].astype(np.uint32) << 16)


def as_it_lands(box: np.ndarray, swizzle: int) -> np.ndarray:
    """Shared memory after a box has come: pieces of 16 bytes, permuted every 128 bytes."""
    memory = np.full((MAX_BOX // 16, 16), 0xAB, np.uint8)
    pieces = swizzle // 16
    row, piece = np.divmod(np.arange(len(box) * pieces), pieces)
    place = row * pieces + (piece ^ row * swizzle // 128 % pieces)
    memory[place] = np.ascontiguousarray(box).view(np.uint8).reshape(-1, 16)
    return memory.ravel()
