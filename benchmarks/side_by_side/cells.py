"""What is measured side by side: the shapes of each group, their FLOPs and bytes.

All arrays are bfloat16 and stored as (B, S, H, D); torch gets transposed views of the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

#: Every group, with what one of its cells is measured in.
UNITS = {
    "grid": "TFLOP/s",
    "small": "us",
    "decode": "GB/s",
    "variants": "TFLOP/s",
    "percall": "us",
}
GROUPS = tuple(UNITS)
DTYPE = "bfloat16"
_ITEM_BYTES = 2
UNBOUNDED = (-1, -1)


@dataclass(frozen=True)
class Cell:
    """One problem: q (B, Sq, H, D), k and v (B, Skv, Hkv, D), and its rules."""

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

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        """(B, Sq, H, D), of q and of the output."""
        return self.batch, self.seqlen_q, self.heads, self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """(B, Skv, Hkv, D), of k and of v."""
        return self.batch, self.seqlen_kv, self.heads_kv, self.head_dim

    @property
    def rules(self) -> dict[str, Any]:
        """What ``attention`` takes beside the arrays; an unbounded window is left out."""
        window = {} if self.window == UNBOUNDED else {"window": self.window}
        return {"causal": self.causal, **window}

    @property
    def pairs(self) -> float:
        """(query, key) pairs per head: exact for a window, half of all where causal alone."""
        if self.window != UNBOUNDED:
            return float(_visible_pairs(self))
        return self.seqlen_q * self.seqlen_kv / (2 if self.causal else 1)

    @property
    def flops(self) -> float:
        """Operations of both products."""
        return 4.0 * self.batch * self.heads * self.head_dim * self.pairs

    @property
    def kv_bytes(self) -> int:
        """Bytes of k and v, which one query per sequence has to read."""
        return 2 * _ITEM_BYTES * int(np.prod(self.kv_shape))

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
        """Read what ``to_json`` gave. Raises ``KeyError`` where a field is missing."""
        values = {f.name: data[f.name] for f in fields(cls)}
        left, right = values.pop("window")
        return cls(**values, window=(int(left), int(right)))


def cells(group: str) -> list[Cell]:
    """The cells of one group, in the order in which they are shown."""
    makers = {
        "grid": _grid,
        "small": _small,
        "decode": _decode,
        "variants": _variants,
        "percall": _percall,
    }
    return makers[group]()


def _visible_pairs(cell: Cell) -> int:
    """Sum over queries of the keys that causal and window leave, bottom-right aligned."""
    at = np.arange(cell.seqlen_q, dtype=np.int64) + cell.seqlen_kv - cell.seqlen_q
    left, right = cell.window
    first = np.maximum(0, at - left) if left >= 0 else np.zeros_like(at)
    last = at + right if right >= 0 else np.full_like(at, cell.seqlen_kv - 1)
    if cell.causal:
        last = np.minimum(last, at)
    return int(np.maximum(0, np.minimum(last, cell.seqlen_kv - 1) - first + 1).sum())


def _grid() -> list[Cell]:
    """16384 tokens, 2048 columns over all heads."""
    found = []
    for head_dim in (64, 128, 256):
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (False, True):
                name = f"D{head_dim}S{seqlen}c{causal:d}"
                heads = 2048 // head_dim
                sizes = 16384 // seqlen, heads, heads, seqlen, seqlen, head_dim
                found.append(Cell("grid", name, *sizes, causal))
    return found


def _short(group: str, batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> Cell:
    name = f"B{batch}H{heads}S{seqlen}D{head_dim}c{causal:d}"
    return Cell(group, name, batch, heads, heads, seqlen, seqlen, head_dim, causal)


def _small() -> list[Cell]:
    sizes = ((1, 8, 512, 64), (1, 8, 128, 64), (1, 8, 1024, 64), (4, 16, 512, 64), (1, 8, 512, 128))
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
    """Grouped queries, then windows, which torch's function cannot express."""
    sizes = (
        (1, 32, 8, 8192, 128, None),
        (1, 64, 8, 4096, 128, None),
        (2, 64, 8, 8192, 64, 1024),
        (1, 32, 8, 16384, 128, 4096),
    )
    return [
        Cell(
            *("variants", f"B{b}Hq{h}Hk{hk}S{s}D{d}c1w{left}", b, h, hk, s, s, d, True),
            window=UNBOUNDED if left is None else (left, 0),
        )
        for b, h, hk, s, d, left in sizes
    ]


def _percall() -> list[Cell]:
    """The second is so short on the GPU that Python's part shows in full."""
    return [_short("percall", 1, 8, seqlen, 64, False) for seqlen in (512, 128)]
