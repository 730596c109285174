"""Dropout as its manual says it, one number at a time: what NumPy and kernels are held to."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

UNIT = 2**16
RNG = (2**63 + 5, 9)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, after Salmon et al. 2011."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ low, y % 2**32, (x >> 32) ^ d ^ high, x % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return a, b, c, d


def key_of(seed: int, offset: int) -> int:
    x = (offset ^ offset >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (seed + (x ^ x >> 31)) % 2**64


@functools.lru_cache(maxsize=2**18)
def _words(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    return philox(counter, (key % 2**32, key >> 32))


def number(rng: tuple[int, int], b: int, h: int, i: int, j: int) -> int:
    """The 16 bits that decide about a probability."""
    words = _words((j // 16 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, h, b), key_of(*rng))
    return words[2 * (i // 8 % 2) + j // 8 % 2] >> 16 * (j % 2) & 0xFFFF


def mask(shape: tuple[int, int, int, int], p: float, rng: tuple[int, int] = RNG) -> np.ndarray:
    kept = [number(rng, *at) >= round(p * UNIT) for at in np.ndindex(*shape)]
    return np.array(kept, np.bool_).reshape(shape)


def shown_by_output(
    run: Any, shape: tuple[int, int, int, int], p: float, dtype: Any, columns: int = 64
) -> np.ndarray:
    """The mask that ``run(q, k, v)``, a forward pass, has applied, read off its output.

    All scores are 0, and rows of v have one 1: so an output is 0, or 1 / (Skv (1 - p)).
    """
    batch, heads, seqlen_q, seqlen_kv = shape
    q, k = (np.zeros((batch, heads, n, columns), dtype) for n in (seqlen_q, seqlen_kv))
    found = np.zeros(shape, np.bool_)
    for first in range(0, seqlen_kv, columns):
        v = np.zeros((batch, heads, seqlen_kv, columns), dtype)
        end = min(first + columns, seqlen_kv)
        v[:, :, range(first, end), range(end - first)] = 1
        o = run(q, k, v)[..., : end - first].astype(np.float64)
        found[..., first:end] = o != 0
        expected = found[..., first:end] / (seqlen_kv * (1 - round(p * UNIT) / UNIT))
        np.testing.assert_allclose(o, expected, rtol=2**-7)
    return found
