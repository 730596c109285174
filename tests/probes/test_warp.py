"""ptx/warp.cuh: exchanges, votes, and barriers inside a warp and a block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from probe import Launch, Probes, assert_same_bits

LANES = np.arange(32)
PAIRS = Launch("", 960, shared=4 * 960)  # fifteen, of warps


def test_shuffles(probe: Probes) -> None:
    rng = np.random.default_rng(12)
    x = rng.standard_normal(32).astype(np.float32)
    words = rng.integers(0, 2**32, 32, np.uint32)
    numbers = rng.integers(-(2**31), 2**31, 32, np.int32)
    masks, sources = LANES[:, None], np.arange(64)[:, None]
    expected = [
        *(x[LANES ^ masks], words[LANES ^ masks]),
        *(y[sources % 32 + LANES * 0] for y in (x, words, numbers)),
    ]
    outputs = [np.zeros_like(y) for y in expected]
    got = probe("warp")(Launch("shuffles", 32), [x, words, numbers], outputs)
    for y, right in zip(got, expected, strict=True):
        assert_same_bits(y, right)


def test_groups_of_lanes(probe: Probes) -> None:
    """Sums are added in the order of a butterfly, so they are rounded the same everywhere."""
    x = np.random.default_rng(2).standard_normal(32).astype(np.float32)
    largest, total = probe("warp")(Launch("groups", 32), [x], [np.zeros((6, 32), "f4")] * 2)
    for index in range(6):
        width = 2**index
        assert_same_bits(largest[index], np.repeat(x.reshape(-1, width).max(1), width))
        sums = x
        for step in range(index, 0, -1):
            sums = sums + sums[LANES ^ 2 ** (step - 1)]
        assert_same_bits(total[index], sums)


def test_votes(probe: Probes) -> None:
    single = np.uint32(1) << np.arange(32, dtype=np.uint32)
    mixed = np.random.default_rng(3).integers(0, 2**32, 62, np.uint32)
    words = np.concatenate([single, ~single, mixed, [0, 2**32 - 1]]).astype(np.uint32)
    outputs = [np.full((words.size, 32), -1, "i4")] * 3
    launch = Launch("votes", 32)
    found, count, leading = probe("warp")(launch, [words, np.int32(words.size)], outputs)
    ones = np.unpackbits(words.view(np.uint8)).reshape(-1, 32).sum(1, dtype=np.int32)
    assert_same_bits(count, np.repeat(ones[:, None], 32, 1))
    assert_same_bits(found, np.repeat(ones[:, None] > 0, 32, 1))
    bits = words[:, None] >> np.arange(32, dtype=np.uint32) & 1
    run = np.cumprod(bits, 1).sum(1).astype(np.int32)
    assert_same_bits(leading, np.repeat(run[:, None], 32, 1))


def test_transposed_quads(probe: Probes) -> None:
    x = np.random.default_rng(15).integers(0, 2**32, (8, 4, 4), np.uint32)  # quads, lanes, words
    (y,) = probe("warp")(Launch("transposed_quads", 32), [x], [np.zeros_like(x)])
    assert_same_bits(y, x.transpose(0, 2, 1))


def test_barriers_of_a_block_and_a_warp(probe: Probes) -> None:
    x = np.random.default_rng(4).standard_normal(256).astype(np.float32)
    launch = Launch("syncs", 256, shared=2 * 4 * 256)
    block, warp = probe("warp")(launch, [x], [np.zeros(256, "f4")] * 2)
    assert_same_bits(block, x[::-1])
    assert_same_bits(warp, x[np.arange(256) ^ 31])


def test_named_barriers(probe: Probes) -> None:
    x = np.random.default_rng(13).integers(-1000, 1000, 960).astype(np.float32)
    launch = replace(PAIRS, kernel="pairs_of_warps")
    (y,) = probe("warp")(launch, [x], [np.zeros(960, "f4")])
    threads = np.arange(960)
    laps = threads // 64 % 5 + 1
    assert_same_bits(y, x[np.where(laps % 2, threads ^ 32, threads)] + laps.astype(np.float32))
