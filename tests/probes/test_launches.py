"""ptx/launches.cuh: launches that may overlap; ``tests/gpu/test_launches.py`` lets them."""

from __future__ import annotations

import numpy as np
from probe import Launch, Probes, assert_same_bits

BLOCKS, THREADS = 20, 64


def test_a_launch_alone_waits_for_nobody(probe: Probes) -> None:
    x = np.random.default_rng(0).integers(0, 1000, BLOCKS * THREADS).astype(np.float32)
    (y,) = probe("launches")(Launch("add_one", THREADS, BLOCKS), [x], [np.zeros_like(x)])
    assert_same_bits(y, x + 1)
