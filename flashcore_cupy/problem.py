"""One attention problem: what is asked for, checked once, before anything is built or launched.

Nothing here needs a GPU or CuPy: an array is looked at through ``shape``, ``dtype``, ``strides``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Causal = bool | Literal["top-left"]
Layout = Literal["bhsd", "bshd"]
Gate = Literal["qk", "softmax", "pv"]

DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("bhsd", "bshd")
GATES = (None, "qk", "softmax", "pv")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}

#: Times log2(e) it is still finite in float32.
MAX_SCALE = 1e38
#: Largest head dim of any kernel.
MAX_HEAD_DIM = 256
#: The widest load or store of one thread, bytes.
MAX_ALIGN = 16
#: Positions are 32-bit in the kernels, with room for a tile beyond the last.
MAX_SEQLEN = 2**31 - 2**11


@dataclass(frozen=True)
class Operand:
    """A (B, H, S, D) view of an array: sizes and element strides, the last one being 1."""

    name: str
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int]
    """Elements between batches, heads and rows."""
    align_bytes: int
    """Every row starts and ends on a multiple of this many bytes: 2, 4, 8 or 16."""


@dataclass(frozen=True)
class AttentionProblem:
    """Shapes, types and rules of one call; hashable, so that it can key a cache."""

    dtype: str
    q: Operand
    k: Operand
    v: Operand
    softmax_scale: float
    causal: Causal = False
    gate: Gate | None = None
    layout: Layout = "bhsd"

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0]

    @property
    def heads_q(self) -> int:
        """Hq."""
        return self.q.shape[1]

    @property
    def heads_kv(self) -> int:
        """Hkv, a divisor of Hq."""
        return self.k.shape[1]

    @property
    def seqlen_q(self) -> int:
        """Sq."""
        return self.q.shape[2]

    @property
    def seqlen_kv(self) -> int:
        """Skv."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """D, the columns of q and k."""
        return self.q.shape[3]

    @property
    def head_dim_v(self) -> int:
        """Dv, the columns of v and o."""
        return self.v.shape[3]

    @property
    def causal_offset(self) -> int:
        """Query i sees key j <= i + this, when causal."""
        return 0 if self.causal == "top-left" else self.seqlen_kv - self.seqlen_q

    @property
    def visible_kv(self) -> int:
        """Keys that at least one query sees; the rest is never read."""
        if not self.causal:
            return self.seqlen_kv
        return max(0, min(self.seqlen_kv, self.seqlen_q + self.causal_offset))

    @property
    def align_bytes(self) -> int:
        """Every row of q, k and v starts and ends on a multiple of this."""
        return min(self.q.align_bytes, self.k.align_bytes, self.v.align_bytes)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape of o in the caller's layout."""
        b, h, s, d = self.batch, self.heads_q, self.seqlen_q, self.head_dim_v
        return (b, h, s, d) if self.layout == "bhsd" else (b, s, h, d)

    @property
    def flops(self) -> float:
        """Floating-point operations of the two products, over visible (query, key) pairs."""
        pairs = float(self.seqlen_q) * self.seqlen_kv
        if self.causal:
            pairs = float(self._visible_pairs())
        return 2.0 * self.batch * self.heads_q * pairs * (self.head_dim + self.head_dim_v)

    def _visible_pairs(self) -> int:
        """Sum over queries of the keys that each sees."""
        first = self.causal_offset + 1  # keys of query 0, before clamping to [0, seqlen_kv]
        start = max(0, 1 - first)  # first query that sees any key
        full = min(self.seqlen_q, max(start, self.seqlen_kv - first))  # first that sees all
        partial = (first + start + first + full - 1) * (full - start) // 2
        return partial + (self.seqlen_q - full) * self.seqlen_kv


def describe(
    q: Any,
    k: Any,
    v: Any,
    *,
    softmax_scale: float | None = None,
    causal: Causal = False,
    gate: Gate | None = None,
    layout: Layout = "bhsd",
    addresses: Sequence[int] = (0, 0, 0),
) -> AttentionProblem:
    """Check every argument of a call and describe it.

    ``q``, ``k``, ``v`` are arrays in ``layout`` whose last axis is contiguous; ``addresses`` are
    their first elements' addresses, for the alignment. Raises ``TypeError`` or ``ValueError``
    naming the argument, what it got and what works.
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("gate", gate, GATES)
    if not (isinstance(causal, bool) or (isinstance(causal, str) and causal == "top-left")):
        raise ValueError(f"causal: got {causal!r}; use False, True (bottom-right) or 'top-left'")
    for name, array in (("q", q), ("k", k), ("v", v)):
        _check_array(name, array, layout)
    _check_dtypes(q, k, v)
    operands = [
        operand(name, array, layout, address)
        for (name, array), address in zip((("q", q), ("k", k), ("v", v)), addresses, strict=True)
    ]
    _check_shapes(*operands)
    return AttentionProblem(
        dtype=str(q.dtype.name),
        q=operands[0],
        k=operands[1],
        v=operands[2],
        softmax_scale=_check_scale(softmax_scale, operands[0].shape[3]),
        causal=causal,
        gate=gate,
        layout=layout,
    )


def contiguous_problem(
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    *,
    heads_kv: int | None = None,
    seqlen_kv: int | None = None,
    dtype: str = "float16",
    causal: Causal = False,
    gate: Gate | None = None,
) -> AttentionProblem:
    """The problem of C-contiguous (B, H, S, D) arrays, without any arrays: for compiling ahead."""
    check_choice("dtype", dtype, DTYPES)
    heads_kv = heads if heads_kv is None else heads_kv
    seqlen_kv = seqlen if seqlen_kv is None else seqlen_kv

    def dense(name: str, h: int, s: int) -> Operand:
        strides = (h * s * head_dim, s * head_dim, head_dim)
        align = _align_bytes(0, strides, head_dim, ITEMSIZE[dtype])
        return Operand(name, (batch, h, s, head_dim), strides, align)

    operands = (
        dense("q", heads, seqlen),
        dense("k", heads_kv, seqlen_kv),
        dense("v", heads_kv, seqlen_kv),
    )
    _check_shapes(*operands)
    scale = 1.0 / math.sqrt(head_dim)
    return AttentionProblem(dtype, *operands, softmax_scale=scale, causal=causal, gate=gate)


def operand(name: str, array: Any, layout: Layout, address: int = 0) -> Operand:
    """The (B, H, S, D) view of an array whose last axis is contiguous."""
    itemsize = array.dtype.itemsize
    shape = tuple(int(n) for n in array.shape)
    strides = [int(s) // itemsize for s in array.strides]
    if layout == "bshd":
        shape = (shape[0], shape[2], shape[1], shape[3])
        strides = [strides[0], strides[2], strides[1], strides[3]]
    # The stride of an axis of length 1 is never used, and may be anything.
    used = tuple(0 if n == 1 else s for n, s in zip(shape[:3], strides[:3], strict=True))
    align = _align_bytes(address, used, shape[3], itemsize)
    return Operand(name, shape, used, align)  # type: ignore[arg-type]


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless ``value``, a string or None, is one of ``choices``."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: got {value!r}; choose one of {listed}")


def _align_bytes(address: int, strides: Sequence[int], columns: int, itemsize: int) -> int:
    align = MAX_ALIGN
    for n in (address, columns * itemsize, *(s * itemsize for s in strides)):
        align = math.gcd(align, n)
    return align


def _check_array(name: str, array: Any, layout: str) -> None:
    axes = "(B, H, S, D)" if layout == "bhsd" else "(B, S, H, D)"
    if array.ndim != 4:
        raise ValueError(
            f"{name}: got {array.ndim} dimensions, shape {tuple(array.shape)}; "
            f"layout {layout!r} takes 4: {axes}"
        )
    if array.dtype.name not in DTYPES:
        raise TypeError(
            f"{name}: got dtype {array.dtype.name}; use one of {', '.join(DTYPES)}, "
            f"for example {name}.astype('float16')"
        )


def _check_dtypes(q: Any, k: Any, v: Any) -> None:
    for name, array in (("k", k), ("v", v)):
        if array.dtype != q.dtype:
            raise TypeError(
                f"{name}: got dtype {array.dtype.name}, but q is {q.dtype.name}; "
                f"q, k and v take the same dtype"
            )


def _check_shapes(q: Operand, k: Operand, v: Operand) -> None:
    batch, heads_q, _, head_dim = q.shape
    if k.shape[0] != batch:
        raise ValueError(f"k: got batch {k.shape[0]}, but q has {batch}; they are equal")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: got (B, H, S) = {v.shape[:3]}, but k has {k.shape[:3]}; they are equal"
        )
    if k.shape[3] != head_dim:
        raise ValueError(f"k: got head dim {k.shape[3]}, but q has {head_dim}; they are equal")
    if heads_q == 0 or k.shape[1] == 0:
        raise ValueError(f"q and k: got {heads_q} and {k.shape[1]} heads; at least 1 of each")
    if heads_q % k.shape[1]:
        raise ValueError(
            f"k: got {k.shape[1]} heads for q's {heads_q}; "
            f"the heads of q are a multiple of those of k and v"
        )
    for op in (q, v):
        if not 1 <= op.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{op.name}: got head dim {op.shape[3]}; kernels take 1 to {MAX_HEAD_DIM}"
            )
    for op in (q, k):
        if op.shape[2] > MAX_SEQLEN:
            raise ValueError(f"{op.name}: got sequence length {op.shape[2]}; at most {MAX_SEQLEN}")


def _check_scale(softmax_scale: object, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float | np.floating):
        raise TypeError(
            f"softmax_scale: got {type(softmax_scale).__name__}; use a number, "
            f"or None for 1/sqrt(head dim)"
        )
    if not abs(softmax_scale) <= MAX_SCALE:  # so written that NaN fails
        raise ValueError(f"softmax_scale: got {softmax_scale}; use a finite number, at most 1e38")
    return float(softmax_scale)
