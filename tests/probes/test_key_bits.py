"""rules/key_bits.cuh: the bits of the keys that lanes hold."""

from __future__ import annotations

import numpy as np
import pytest
from probe import Launch, Probes, assert_same_bits


@pytest.mark.parametrize("pairs", [2, 4, 6, 8, 10, 16])
def test_bits_of_keys(probe: Probes, pairs: int) -> None:
    """Lane l has keys 8 n + 2 (l % 4) and the next of row l / 4; any byte but 0 is true."""
    keys = pairs * 8
    rng = np.random.default_rng(pairs)
    mask = rng.choice(np.array([0, 0, 1, 2, 0x80, 0xFF], np.uint8), (8, keys))
    outputs = [
        *(np.zeros((8, keys), np.uint8), np.zeros((8, keys // 2), np.uint32)),
        *(np.zeros((8, keys), np.float32), np.zeros((8, keys), np.uint8)),
        np.zeros((8, keys), np.uint8),
    ]
    launch = Launch(f"pairs_{pairs}", 32)
    seen, values, singles, kept, together = probe("key_bits")(launch, [mask], outputs)
    expected = mask != 0
    assert_same_bits(seen, expected)
    halves = expected.reshape(8, -1, 2) * np.array([0x8765, 0x43210000], np.uint32)
    assert_same_bits(values, halves.sum(-1, dtype=np.uint32))
    assert_same_bits(singles.view(np.uint32), np.where(expected, 0x7FC00000, 0))
    inside = (np.arange(keys) >= 5) & (np.arange(keys) < keys - 3)
    assert_same_bits(kept, expected & inside)
    assert_same_bits(together, np.broadcast_to(expected.any(0), (8, keys)))
