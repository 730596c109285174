"""ptx/cluster.cuh: blocks that reach each other's shared memory."""

from __future__ import annotations

import numpy as np
import pytest
from probe import Launch, Probes, assert_same_bits

BLOCKS, SIZE, THREADS = 12, 4, 64


@pytest.mark.parametrize("late", range(-1, SIZE))
def test_clusters_read_each_others_memory(probe: Probes, late: int) -> None:
    """Whoever of four is late; two rounds in the same place, and a warp that has ended."""
    x = np.random.default_rng(late + 1).integers(0, 999, (BLOCKS, THREADS)).astype(np.float32)
    rank = np.full(BLOCKS, -1, "i4")
    four = np.full((2, BLOCKS, SIZE, THREADS, 4), np.nan, "f4")
    two = np.full((2, BLOCKS, SIZE, THREADS, 2), np.nan, "f4")
    launch = Launch("leave_and_read", THREADS, BLOCKS, shared=THREADS * 24, cluster=SIZE)
    rank, four, two = probe("cluster")(launch, [x, np.int32(late)], [rank, four, two])
    assert_same_bits(rank, np.arange(BLOCKS) % SIZE)
    for number in range(2):
        for block in range(BLOCKS):
            peers = x[block // SIZE * SIZE :][:SIZE, :, None] + np.float32(1000 * number)
            assert_same_bits(four[number, block], peers + np.arange(4, dtype=np.float32) / 4)
            assert_same_bits(two[number, block], peers * np.array([-1, 1], np.float32))


@pytest.mark.parametrize("late", range(-1, 2))
def test_peers_give_without_waiting(probe: Probes, late: int) -> None:
    """Whoever of two is late."""
    x = np.random.default_rng(late + 1).standard_normal((BLOCKS, THREADS, 4)).astype(np.float32)
    launch = Launch("give", THREADS, BLOCKS, shared=THREADS * 16 + 8, cluster=2)
    (y,) = probe("cluster")(launch, [x, np.int32(late)], [np.full_like(x, np.nan)])
    assert_same_bits(y, x[np.arange(BLOCKS) ^ 1])
