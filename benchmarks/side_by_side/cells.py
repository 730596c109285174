"""What is measured side by side: the shapes of each group, their FLOPs and bytes.

All arrays are bfloat16 and stored as (B, S, H, D), packed sequences as (total, H, D). Where torch
wants its heads first, it gets transposed views of the same memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import product
from typing import Any

import numpy as np

from side_by_side import patterns

#: Every group, with what one of its cells is measured in.
UNITS = {
    "grid": "TFLOP/s",
    "small": "us",
    "decode": "GB/s",
    "variants": "TFLOP/s",
    "varlen": "TFLOP/s",
    "blocks": "TFLOP/s",
    "backward": "TFLOP/s",
    "percall": "us",
}
GROUPS = tuple(UNITS)
DTYPE = "bfloat16"
_ITEM_BYTES = 2
UNBOUNDED = (-1, -1)
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Cell:
    """One problem: q (B, Sq, H, D), k (B, Skv, Hkv, D), v (B, Skv, Hkv, Dv), and its rules.

    Of packed sequences, B is their number, and Sq and Skv are the longest one's.
    """

    group: str
    name: str
    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    causal: bool = False
    window: tuple[int, int] = UNBOUNDED
    """(left, right); a window of (w, 0) has w + 1 keys per row."""
    lengths: tuple[int, ...] = ()
    """Packed sequences: queries of each, which are as many as its keys."""
    head_dim_v: int = 0
    """Columns of v where they are not as many as k's; 0: they are."""
    pattern: str = ""
    """Of block masks: a name in ``patterns.PATTERNS``; Sq = Skv."""

    @property
    def is_backward(self) -> bool:
        """Whether what is measured are the gradients of q, k and v."""
        return self.group == "backward"

    @property
    def q_shape(self) -> tuple[int, ...]:
        """(B, Sq, H, D) or (total, H, D)."""
        return *self._rows(self.seqlen_q), self.heads, self.head_dim

    @property
    def k_shape(self) -> tuple[int, ...]:
        """(B, Skv, Hkv, D) or (total, Hkv, D)."""
        return *self._rows(self.seqlen_kv), self.heads_kv, self.head_dim

    @property
    def v_shape(self) -> tuple[int, ...]:
        """(B, Skv, Hkv, Dv) or (total, Hkv, Dv)."""
        return *self.k_shape[:-1], self.head_dim_v or self.head_dim

    @property
    def o_shape(self) -> tuple[int, ...]:
        """(B, Sq, H, Dv) or (total, H, Dv), of the output and of its gradient."""
        return *self.q_shape[:-1], self.v_shape[-1]

    def _rows(self, seqlen: int) -> tuple[int, ...]:
        return (sum(self.lengths),) if self.lengths else (self.batch, seqlen)

    def sequence(self, b: int) -> int | slice:
        """Sequence b of arrays that begin as ``q_shape`` does: what to index them with."""
        if not self.lengths:
            return b
        start = sum(self.lengths[:b])
        return slice(start, start + self.lengths[b])

    @property
    def rules(self) -> dict[str, Any]:
        """What ``attention`` takes beside the arrays; an unbounded window is left out."""
        window = {} if self.window == UNBOUNDED else {"window": self.window}
        return {"causal": self.causal, **window}

    @property
    def pairs(self) -> float:
        """(query, key) pairs per head, of all sequences.

        Exact for packed sequences, block masks and a window; half of all where causal alone.
        """
        if self.pattern:
            return float(self.batch * patterns.pairs(self.pattern, self.seqlen_q))
        if self.lengths:
            return float(sum(self._visible_pairs(n, n) for n in self.lengths))
        if self.window != UNBOUNDED:
            return float(self.batch * self._visible_pairs(self.seqlen_q, self.seqlen_kv))
        return self.batch * self.seqlen_q * self.seqlen_kv / (2 if self.causal else 1)

    def _visible_pairs(self, seqlen_q: int, seqlen_kv: int) -> int:
        """Sum over queries of the keys that causal and window leave, bottom-right aligned."""
        at = np.arange(seqlen_q, dtype=np.int64) + seqlen_kv - seqlen_q
        left, right = self.window
        first = np.maximum(0, at - left) if left >= 0 else np.zeros_like(at)
        last = at + right if right >= 0 else np.full_like(at, seqlen_kv - 1)
        if self.causal:
            last = np.minimum(last, at)
        return int(np.maximum(0, np.minimum(last, seqlen_kv - 1) - first + 1).sum())

    @property
    def flops(self) -> float:
        """Operations of both products; backward 2.5 times as many, by the usual count."""
        forward = 2.0 * self.heads * (self.head_dim + self.v_shape[-1]) * self.pairs
        return 2.5 * forward if self.is_backward else forward

    @property
    def kv_bytes(self) -> int:
        """Bytes of k and v, which one query per sequence has to read."""
        return _ITEM_BYTES * int(np.prod(self.k_shape) + np.prod(self.v_shape))

    @property
    def unit(self) -> str:
        """What ``figure`` is in."""
        return UNITS[self.group]

    def figure(self, us: float) -> float:
        """The figure to show for a time: a rate, or the time itself in groups of short calls."""
        if self.unit == "us":
            return us
        return self.kv_bytes / us / 1e3 if self.unit == "GB/s" else self.flops / us / 1e6

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with the FLOPs and bytes that rates are computed from."""
        return {**asdict(self), "dtype": DTYPE, "flops": self.flops, "kv_bytes": self.kv_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """Read what ``to_json`` gave, fields of later versions or not.

        Raises ``KeyError`` where a field is missing.
        """
        known = [f.name for f in fields(cls) if f.name in data or f.default is MISSING]
        values = {name: data[name] for name in known}
        for name in {"window", "lengths"} & values.keys():
            values[name] = tuple(map(int, values[name]))
        return cls(**values)


def cells(group: str) -> list[Cell]:
    """The cells of one group, in the order in which they are shown."""
    makers = {
        "grid": _grid,
        "small": _small,
        "decode": _decode,
        "variants": _variants,
        "varlen": _varlen,
        "blocks": _blocks,
        "backward": _backward,
        "percall": _percall,
    }
    return makers[group]()


def _grid() -> list[Cell]:
    """All lengths of three head dims."""
    return [cell for head_dim in (64, 128, 256) for cell in _tokens("grid", head_dim, _LENGTHS)]


def _tokens(
    group: str, head_dim: int, lengths: Iterable[int], head_dim_v: int = 0
) -> Iterator[Cell]:
    """16384 tokens, 2048 columns of the output over all heads; causal and not."""
    dims, heads = f"{head_dim}", 2048 // (head_dim_v or head_dim)
    if head_dim_v:
        dims += f"-{head_dim_v}"
    for seqlen, causal in product(lengths, (False, True)):
        sizes = 16384 // seqlen, heads, heads, seqlen, seqlen, head_dim
        name = f"D{dims}S{seqlen}c{causal:d}"
        yield Cell(group, name, *sizes, causal, head_dim_v=head_dim_v)


def _short(group: str, batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> Cell:
    name = f"B{batch}H{heads}S{seqlen}D{head_dim}c{causal:d}"
    return Cell(group, name, batch, heads, heads, seqlen, seqlen, head_dim, causal)


def _small() -> list[Cell]:
    sizes = (
        *((1, 8, 512, 64), (1, 8, 128, 64), (1, 8, 1024, 64), (4, 16, 512, 64), (1, 8, 512, 128)),
        *((2, 8, 256, 64), (1, 16, 256, 128)),
    )
    return [_short("small", *each, causal) for each in sizes for causal in (False, True)]


def _decode() -> list[Cell]:
    """One query per sequence."""
    lengths = {1: (1024, 8192, 65536), 16: (1024, 8192, 65536), 128: (1024, 8192)}
    return [
        Cell("decode", f"B{batch}Skv{length}Hq32Hk8D128", batch, 32, 8, 1, length, 128)
        for batch, row in lengths.items()
        for length in row
    ]


def _variants() -> list[Cell]:
    """Grouped queries, windows, which torch's function cannot express, and other head dims."""
    sizes = (
        (1, 32, 8, 8192, 128, True, None),
        (1, 64, 8, 4096, 128, True, None),
        (2, 64, 8, 8192, 64, True, 1024),
        (1, 32, 8, 16384, 128, True, 4096),
        (1, 32, 8, 8192, 128, False, None),
        (4, 16, 2, 3000, 128, True, None),
        (2, 16, 16, 6000, 96, False, None),
        (2, 16, 16, 6000, 96, True, None),
        (4, 16, 16, 4096, 80, True, None),
        (4, 8, 8, 4096, 192, True, None),
    )
    return [
        Cell(
            *("variants", f"B{b}Hq{h}Hk{hk}S{s}D{d}c{causal:d}w{left}", b, h, hk, s, s, d, causal),
            window=UNBOUNDED if left is None else (left, 0),
        )
        for b, h, hk, s, d, causal, left in sizes
    ]


def _varlen(group: str = "varlen") -> list[Cell]:
    """Packed sequences, 2048 columns over all heads: many short ones, one long one, all alike."""
    short, middle = drawn(128, 8, 510), drawn(32, 512, 2048)
    few = drawn(6, 64, 2048)
    long_one = (*few[:3], 8192, *few[3:])
    return [
        _packed(group, name, lengths, head_dim, causal)
        for name, lengths, head_dim in (
            ("N128S8-510", short, 64),
            ("N7S64-8192", long_one, 128),
            ("N32S512-2048", middle, 128),
        )
        for causal in (False, True)
    ]


def drawn(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths of packed sequences, evenly distributed, the same for the same arguments."""
    pick = random.Random(0)
    return tuple(pick.randint(shortest, longest) for _ in range(count))


def _packed(group: str, name: str, lengths: Sequence[int], head_dim: int, causal: bool) -> Cell:
    heads, longest = 2048 // head_dim, max(lengths)
    sizes = len(lengths), heads, heads, longest, longest, head_dim
    return Cell(group, f"{name}D{head_dim}c{causal:d}", *sizes, causal, lengths=tuple(lengths))


def _blocks() -> list[Cell]:
    """Each pattern at two lengths, 2048 columns over all heads."""
    return [
        Cell(
            *("blocks", f"{name}D{head_dim}S{seqlen}", 2, 2048 // head_dim, 2048 // head_dim),
            *(seqlen, seqlen, head_dim),
            pattern=name,
        )
        for head_dim in (64, 128)
        for seqlen in (8192, 32768)
        for name in patterns.PATTERNS
    ]


def _backward() -> list[Cell]:
    """All lengths of two head dims, other dims, grouped queries, packed sequences."""
    grouped = [
        Cell("backward", f"B{b}Hq{h}Hk8S4096D128c{causal:d}", b, h, 8, 4096, 4096, 128, causal)
        for b, h in ((2, 32), (1, 64))
        for causal in (False, True)
    ]
    return [
        *_tokens("backward", 64, _LENGTHS),
        *_tokens("backward", 128, _LENGTHS),
        *_tokens("backward", 256, (2048, 8192)),
        *_tokens("backward", 192, (2048, 8192), head_dim_v=128),
        *grouped,
        *_varlen("backward"),
    ]


def _percall() -> list[Cell]:
    """The second is so short on the GPU that Python's part shows in full."""
    return [_short("percall", 1, 8, seqlen, 64, False) for seqlen in (512, 128)]
