"""ptx/cp_async.cuh: copies that finish later, filled up with zeros."""

from __future__ import annotations

import numpy as np
from probe import Launch, Probes, assert_same_bits

THREADS = 64


def test_copies_are_filled_up_with_zeros(probe: Probes) -> None:
    """Every number of bytes that may be valid, of each size of a copy."""
    x = np.random.default_rng(3).integers(1, 255, (3, THREADS, 16)).astype(np.uint8)
    sizes = np.array([[16], [8], [4]], np.int32)
    valid = (np.arange(THREADS) * 5 % (sizes + 1)).astype(np.int32)
    launch = Launch("copies", THREADS, shared=x.size)
    (y,) = probe("cp_async")(launch, [x, valid], [np.zeros_like(x)])
    byte = np.arange(16)
    copied = np.where(byte < valid[:, :, None], x, 0)
    assert_same_bits(y, np.where(byte < sizes[:, None], copied, 0xFF).astype(np.uint8))


def test_copies_are_counted(probe: Probes) -> None:
    """A barrier that every thread's copies arrive at is over when all of them are there."""
    rounds = 11
    x = np.random.default_rng(5).integers(0, 256, (rounds, THREADS, 16), np.uint8)
    launch = Launch("counted", THREADS, shared=2 * 16 * THREADS + 4 * 8)
    (y,) = probe("cp_async")(launch, [x, np.int32(rounds)], [np.zeros_like(x)])
    assert_same_bits(y, np.roll(x, -1, axis=1))
