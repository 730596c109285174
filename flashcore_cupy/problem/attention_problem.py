"""One attention problem: what is asked for, checked once, before anything is built or launched.

Nothing here needs a GPU or CuPy: an array is looked at through ``shape``, ``dtype``, ``strides``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.rules import NO_RULES, Rules
from flashcore_cupy.problem.values import check_flag, check_number, shown

Causal = bool | Literal["top-left"]
Layout = Literal["bhsd", "bshd"]
Gate = Literal["qk", "softmax", "pv"]

DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("bhsd", "bshd")
GATES = (None, "qk", "softmax", "pv")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
#: From 1 to the next number, of 16-bit types; rounding takes up to half of it.
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}

#: Times log2(e) it is still finite in float32.
MAX_SCALE = 1e38
#: Largest head dim of any kernel.
MAX_HEAD_DIM = 512
#: The widest load or store of one thread, bytes.
MAX_ALIGN = 16
#: Positions are 32-bit in the kernels: with room for the sum of a position and a window (below
#: rules.UNBOUNDED_WINDOW), both in a tile that reaches beyond the end.
MAX_SEQLEN = 2**30 - 2**16


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
    rules: Rules = NO_RULES
    sequences: int | None = None
    """Packed batches: how many sequences the rows of q, and of k and v, are made of."""
    batch_invariant: bool = False

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0] if self.sequences is None else self.sequences

    @property
    def packed(self) -> bool:
        """Whether the sequences are packed, their boundaries given by cu_seqlens."""
        return self.sequences is not None

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
        """Sq; packed batches: of all sequences together."""
        return self.q.shape[2]

    @property
    def seqlen_kv(self) -> int:
        """Skv; packed batches: of all sequences together."""
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
        """The key at query 0's own position: query i stands at i + this."""
        return 0 if self.causal == "top-left" else self.seqlen_kv - self.seqlen_q

    @property
    def window(self) -> tuple[int, int]:
        """Keys to the left and right of its position that a query sees; -1 is no bound."""
        left, right = self.rules.window
        return left, 0 if self.causal else right

    @property
    def visible_kv(self) -> int:
        """Keys up to the last that any query sees; later ones are never read."""
        right = self.window[1]
        if right < 0 or self.packed:
            return self.seqlen_kv
        return max(0, min(self.seqlen_kv, self.seqlen_q + self.causal_offset + right))

    @property
    def scores(self) -> ScoreShape:
        """Sizes of its scores."""
        return ScoreShape(self.batch, self.heads_q, self.seqlen_q, self.seqlen_kv)

    @property
    def align_bytes(self) -> int:
        """Every row of q, k and v starts and ends on a multiple of this."""
        return min(self.q.align_bytes, self.k.align_bytes, self.v.align_bytes)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of o in the caller's layout."""
        (b, _, s, _), h, d = self.q.shape, self.heads_q, self.head_dim_v
        if self.packed:
            return s, h, d
        return (b, h, s, d) if self.layout == "bhsd" else (b, s, h, d)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of the log-sum-exp: (B, Hq, Sq), or (Hq, total) of a packed batch."""
        heads = (self.heads_q, self.seqlen_q)
        return heads if self.packed else (self.batch, *heads)

    @property
    def flops(self) -> float:
        """Floating-point operations of the two products, over visible (query, key) pairs."""
        pairs = float(self.visible_pairs)
        return 2.0 * self.batch * self.heads_q * pairs * (self.head_dim + self.head_dim_v)

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, in one head, as far as positions hide keys.

        Not known of a packed batch.
        """
        if self.packed:
            raise ValueError("the lengths of packed sequences are not known")
        left, right = self.window
        pairs = self.seqlen_q * self.seqlen_kv if right < 0 else self._keys_up_to(right)
        return pairs if left < 0 else max(0, pairs - self._keys_up_to(-left - 1))

    def _keys_up_to(self, right: int) -> int:
        """Sum over queries i of the keys j <= i + causal_offset + right."""
        first = self.causal_offset + right + 1  # of query 0, before clamping to [0, seqlen_kv]
        start = min(self.seqlen_q, max(0, 1 - first))  # first query that has any
        full = min(self.seqlen_q, max(start, self.seqlen_kv - first))  # first that has all
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
    sequences: int | None = None,
    batch_invariant: bool = False,
    addresses: Sequence[int] = (0, 0, 0),
) -> AttentionProblem:
    """Check every argument of a call and describe it.

    ``q``, ``k``, ``v`` are arrays in ``layout`` whose last axis is contiguous; ``addresses`` are
    their first elements' addresses, for the alignment. ``sequences``: q, k, v are packed batches
    (total, H, D) of so many. Raises ``TypeError`` or ``ValueError`` naming the argument, what it
    got and what works.
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("gate", gate, GATES)
    if not (isinstance(causal, bool) or (isinstance(causal, str) and causal == "top-left")):
        raise ValueError(
            f"causal: got {shown(causal)}; use False, True (bottom-right) or 'top-left'"
        )
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_dimensions(name, array, layout, packed=sequences is not None)
    if sequences is not None and gate is not None:
        raise ValueError(f"gate: got {gate!r} with cu_seqlens; stop at a stage without packing")
    batch_invariant = check_flag("batch_invariant", batch_invariant)
    _check_dtypes(q, k, v)
    operands = [
        operand(name, array, layout if sequences is None else "packed", address)
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
        sequences=sequences,
        batch_invariant=batch_invariant,
    )


def contiguous_problem(
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    *,
    heads_kv: int | None = None,
    seqlen_kv: int | None = None,
    head_dim_v: int | None = None,
    dtype: str = "float16",
    layout: Layout = "bhsd",
    causal: Causal = False,
    gate: Gate | None = None,
) -> AttentionProblem:
    """The problem of C-contiguous arrays, without any arrays: for compiling ahead."""
    check_choice("dtype", dtype, DTYPES)
    heads_kv = heads if heads_kv is None else heads_kv
    seqlen_kv = seqlen if seqlen_kv is None else seqlen_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    shapes = {
        "q": (batch, heads, seqlen, head_dim),
        "k": (batch, heads_kv, seqlen_kv, head_dim),
        "v": (batch, heads_kv, seqlen_kv, head_dim_v),
    }
    q, k, v = (contiguous_operand(name, x, dtype, layout) for name, x in shapes.items())
    _check_shapes(q, k, v)
    scale = 1.0 / math.sqrt(head_dim)
    return AttentionProblem(
        dtype, q, k, v, softmax_scale=scale, causal=causal, gate=gate, layout=layout
    )


def contiguous_operand(
    name: str, shape: tuple[int, int, int, int], dtype: str, layout: Layout
) -> Operand:
    """The view, of this shape, of a C-contiguous array in a layout."""
    _, h, s, d = shape
    strides = (h * s * d, *((s * d, d) if layout == "bhsd" else (d, h * d)))
    return Operand(name, shape, strides, _align_bytes(0, strides, d, ITEMSIZE[dtype]))


def operand(name: str, array: Any, layout: Layout | Literal["packed"], address: int = 0) -> Operand:
    """The (B, H, S, D) view of an array whose last axis is contiguous; packed: B = 1."""
    itemsize = array.dtype.itemsize
    shape = tuple(int(n) for n in array.shape)
    strides = [int(s) // itemsize for s in array.strides]
    if layout == "packed":
        shape, strides = (1, *shape), [0, *strides]
    if layout != "bhsd":
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
        raise ValueError(f"{name}: got {shown(value)}; choose one of {listed}")


def _align_bytes(address: int, strides: Sequence[int], columns: int, itemsize: int) -> int:
    align = MAX_ALIGN
    for n in (address, columns * itemsize, *(s * itemsize for s in strides)):
        align = math.gcd(align, n)
    return align


def check_dimensions(name: str, array: Any, layout: str, *, packed: bool) -> None:
    """Raise ``ValueError`` unless an array has the axes of its layout, or of a packed batch."""
    axes, what = ("(B, H, S, D)" if layout == "bhsd" else "(B, S, H, D)"), f"layout {layout!r}"
    if packed:
        axes, what = "(total, H, D)", "a packed batch (cu_seqlens)"
    dimensions = axes.count(",") + 1
    if array.ndim != dimensions:
        raise ValueError(
            f"{name}: got {array.ndim} dimensions, shape {tuple(array.shape)}; "
            f"{what} takes {dimensions}: {axes}"
        )


# How to cast, in the words of the library that an array came from.
_CASTS = {
    "torch": "{name}.to(torch.{dtype})",
    "jax": "{name}.astype(jax.numpy.{dtype})",
}


def check_dtype(name: str, dtype: Any, kind: str = "numpy") -> None:
    """Raise ``TypeError`` unless this is a dtype of q, k and v; ``kind``: the array's library."""
    if dtype.name in DTYPES:
        return
    hint = ""
    if dtype.kind in "iuf":
        wanted = "float16" if dtype.kind != "f" else "float32"
        cast = _CASTS.get(kind, "{name}.astype('{dtype}')").format(name=name, dtype=wanted)
        hint = f", for example {cast}"
    raise TypeError(f"{name}: got dtype {dtype.name}; use one of {', '.join(DTYPES)}{hint}")


def dtype_beside(dtype: Any, other: Any) -> str:
    """What tells a dtype from another one: its name, or its byte order."""
    return str(dtype.str if dtype.name == other.name else dtype.name)


def _check_dtypes(q: Any, k: Any, v: Any) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, array.dtype)
        if array.dtype != q.dtype:
            own, wanted = array.dtype, q.dtype
            raise TypeError(
                f"{name}: got dtype {dtype_beside(own, wanted)}, but q is "
                f"{dtype_beside(wanted, own)}; q, k and v take the same dtype"
                + (" in the same byte order" if own.name == wanted.name else "")
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
    scale = check_number("softmax_scale", softmax_scale, "None for 1/sqrt(head dim)")
    if not abs(scale) <= MAX_SCALE:  # so written that NaN fails
        raise ValueError(
            f"softmax_scale: got {shown(scale)}; use a finite number, at most {MAX_SCALE:g}"
        )
    return float(scale)
