"""ptx/global.cuh: what thread blocks tell each other through global memory."""

from __future__ import annotations

import numpy as np
from probe import Launch, Probes, assert_same_bits


def test_the_last_to_arrive_reads_what_all_wrote(probe: Probes) -> None:
    blocks = 300
    x = np.random.default_rng(14).integers(-1000, 1000, (blocks, 256)).astype(np.float32)
    outputs = [
        np.full((blocks, 256), np.nan, np.float32),
        np.full((blocks, 256), -1, np.int32),
        np.zeros(256, np.int32),
        np.full(256, np.nan, np.float32),
    ]
    results = probe("global").each(Launch("last_one_sums", 256, blocks), [x], outputs)
    for machine, (parts, before, arrivals, total) in results.items():
        assert_same_bits(parts, x, machine)
        assert_same_bits(np.sort(before, 0), np.arange(blocks)[:, None], machine)
        assert (arrivals == blocks).all()
        assert_same_bits(total, x.sum(0), machine)


def test_sums_of_many_threads(probe: Probes) -> None:
    x = np.random.default_rng(16).integers(-(2**31), 2**31, (100, 256), np.int32)
    start = np.arange(8, dtype=np.int32)
    (total,) = probe("global")(Launch("sums", 256, 100), [x], [start])
    expected = start + x.reshape(-1, 8).sum(0, dtype=np.int64)
    assert_same_bits(total, expected.astype(np.uint64).astype(np.uint32).view(np.int32))


def test_blocks_take_turns(probe: Probes) -> None:
    blocks = 200
    x = np.random.default_rng(17).integers(0, 2**32, (blocks, 32), np.uint32)
    outputs = [np.zeros(2, np.int32), np.ones(32, np.uint32)]
    counters, y = probe("global")(Launch("turns", 32, blocks, shared=4), [x], outputs)
    expected = np.ones(32, np.uint32)
    for row in x:
        expected = expected * np.uint32(3) + row
    assert_same_bits(counters, [blocks, blocks])
    assert_same_bits(y, expected)


def test_loads(probe: Probes) -> None:
    x = np.random.default_rng(15).standard_normal(128).astype(np.float32)
    (y,) = probe("global")(Launch("loads", 32), [x], [np.full(224, np.nan, np.float32)])
    assert_same_bits(y, np.concatenate([x[:32], x[:64], x]))
