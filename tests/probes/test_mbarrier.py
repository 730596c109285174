"""ptx/mbarrier.cuh: barriers with phases, named barriers, in the roles that kernels have them."""

from __future__ import annotations

import numpy as np
import pytest
from probe import Emulator, Launch, Probes, assert_same_bits, needs_emulator

from flashcore_cupy.cpu.emulator.run import KernelError, Schedule
from flashcore_cupy.cuda.targets import HOPPER

WARPGROUP_THREADS = 128
ROUNDS = 10


@pytest.mark.parametrize("count", [1, 2, 3, 32])
def test_phases(probe: Probes, count: int) -> None:
    """Of each phase: both parities, twice, and its own parity while one or more are missing."""
    passed = np.full((5, count + 3), -1, "i4")
    (passed,) = probe("mbarrier")(Launch("phases", 1, shared=8), [np.int32(count)], [passed])
    expected = np.zeros_like(passed)
    expected[0::2, [1, 3]] = expected[1::2, [0, 2]] = 1
    assert_same_bits(passed, expected)


@needs_emulator
def test_whoever_asks_in_vain_is_told() -> None:
    with pytest.raises(KernelError, match=r"(?s)deadlock.*thread.* 0.*mbarrier\.try_wait"):
        Emulator("mbarrier", HOPPER, Schedule()).run(Launch("asks_in_vain", 1, shared=8), [])


def test_hand_over(probe: Probes) -> None:
    x = np.random.default_rng(2).integers(1, 2**31, ROUNDS, np.int32)
    launch = Launch("hand_over", WARPGROUP_THREADS + 32, shared=40)
    outputs = [np.zeros((ROUNDS, WARPGROUP_THREADS), "i4")]
    (y,) = probe("mbarrier")(launch, [x, np.int32(ROUNDS)], outputs)
    assert_same_bits(y, np.repeat(x[:, None], WARPGROUP_THREADS, 1))


def test_named_barriers_take_turns(probe: Probes) -> None:
    launch = Launch("turns", 2 * WARPGROUP_THREADS, shared=4)
    outputs = [np.full(2 * ROUNDS, -1, "i4")]
    (order,) = probe("mbarrier")(launch, [np.int32(ROUNDS)], outputs)
    assert_same_bits(order, [0, 1] * ROUNDS)
