"""ptx/thread.cuh: numbers of threads and blocks, the launch's shared memory."""

from __future__ import annotations

import numpy as np
from probe import Launch, Probes, assert_same_bits

BLOCKS, THREADS = 3, 64
N = BLOCKS * THREADS


def test_threads_and_blocks(probe: Probes) -> None:
    launch = Launch("numbers", THREADS, BLOCKS)
    outputs = [np.full(N, -1, "i4") for _ in range(5)]
    for machine, (thread, anew, block, grid, arch) in (
        probe("thread").each(launch, [], outputs).items()
    ):
        assert_same_bits(thread, np.arange(N) % THREADS)
        assert_same_bits(anew, np.arange(N) % THREADS)
        assert_same_bits(block, np.arange(N) // THREADS)
        assert (grid == BLOCKS).all()
        assert (arch == 10 * probe("thread").capability(machine)).all()


def test_shared_memory_of_the_launch(probe: Probes) -> None:
    x = np.random.default_rng(0).integers(-(2**31), 2**31, N, np.int32)
    launch = Launch("through_shared", THREADS, BLOCKS, shared=4 * THREADS)
    y, misplaced = probe("thread")(launch, [x], [np.zeros(N, "i4"), np.full(N, -1, "i4")])
    assert_same_bits(y, x[np.arange(N) ^ 31])
    assert not misplaced.any()


def test_a_kept_pointer_is_the_same(probe: Probes) -> None:
    launch = Launch("kept", THREADS, BLOCKS)
    (kept,) = probe("thread")(launch, [], [np.full(N, -1, "i4")])
    assert_same_bits(kept, np.arange(N) % THREADS)
