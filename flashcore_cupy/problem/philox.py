"""Philox4x32-10, a random number generator that has no state; and what dropout makes of it.

Numbers are a function of a key and of a counter (Salmon et al. 2011). Here the key is made of a
call's seed and offset, and the counter of (batch, head, query, key), so every kernel, whatever its
tiles, and NumPy drop the same. A call gives 8 numbers of 16 bits, for 2 queries by 4 keys;
``kernels/flashcore/rules/dropout.cuh`` says which, and why these.

Works on NumPy and on CuPy arrays; CuPy is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Numbers are below this, and dropout_p is a multiple of its inverse.
UNIT = 2**16
_LONG, _WORD, _HALF = 2**64 - 1, 2**32 - 1, 2**16 - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUNDS = 10


def philox(counter: tuple[Any, Any, Any, Any], key: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four words of uint64 arrays for the words of a counter, each below 2**32.

    ``counter``: uint64 arrays that broadcast; ``key``: (1,), uint64.
    """
    a, b, c, d = counter
    low, high = key & _WORD, key >> 32
    for _ in range(_ROUNDS):
        x, y = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (y >> 32) ^ b ^ low, y & _WORD, (x >> 32) ^ d ^ high, x & _WORD
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def key_of(rng: Any) -> Any:
    """The generator's key, (1,), of an array (2,) of a seed and an offset, uint64.

    It is the seed plus the end of SplitMix64 (Steele et al. 2014) of the offset: the seed itself
    where the offset is 0. Offsets with one seed, and seeds with one offset, never share a key.
    """
    x = rng[1:]
    x = (x ^ (x >> 30)) * _MIX[0]
    x = (x ^ (x >> 27)) * _MIX[1]
    return rng[:1] + (x ^ (x >> 31))


def integer_key_of(seed: int, offset: int) -> int:
    """``key_of`` two integers: an array takes longer to make than all else of a repeated call."""
    x = (offset ^ (offset >> 30)) * int(_MIX[0]) & _LONG
    x = (x ^ (x >> 27)) * int(_MIX[1]) & _LONG
    return seed + (x ^ (x >> 31)) & _LONG


@dataclass(frozen=True)
class Dropout:
    """What a call drops."""

    key: Any
    """(1,), uint64, of NumPy or CuPy."""
    threshold: int
    """Smaller numbers are dropped."""
    xp: Any
    """The key's array module."""

    @classmethod
    def of(cls, dropout_p: float, rng: Any, xp: Any = np) -> Dropout:
        """``rng``: what ``check_rng`` returns; ``xp``: the module of the arrays that are wanted."""
        return cls(key_of(xp.asarray(rng, np.uint64)), round(dropout_p * UNIT), xp)

    def kept(self, batch: int, head: int, queries: Any, keys: slice) -> Any:
        """Where probabilities of a head are kept, (M, N), for queries (M,) by consecutive keys."""
        xp = self.xp
        rows = xp.asarray(queries).astype(np.uint64)[:, None]
        first, end = keys.start // 16, -(-keys.stop // 16)
        blocks = xp.arange(4 * first, 4 * end, dtype=np.uint64)[None, :]
        place = (xp.full((1, 1), n, np.uint64) for n in (head, batch))
        words = philox((blocks, rows // 16 * 8 + rows % 8, *place), self.key)
        is_second = rows // 8 % 2 == 1
        numbers = xp.empty((len(rows), end - first, 2, 4, 2), np.uint16)
        for b in range(2):  # the lower and the upper 8 of 16 keys
            word = xp.where(is_second, words[2 + b], words[b]).reshape(len(rows), -1, 4)
            numbers[:, :, b, :, 0], numbers[:, :, b, :, 1] = word & _HALF, word >> 16
        chosen = numbers.reshape(len(rows), -1)
        return chosen[:, keys.start - 16 * first : keys.stop - 16 * first] >= self.threshold
