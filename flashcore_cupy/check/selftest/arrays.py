"""The arrays of a case of the correctness matrix: cut from buffers that are NaN elsewhere.

They are laid out on the host and copied to the GPU whole, so a kernel that reads beside an array
gets NaN, and one that writes there is seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from flashcore_cupy.check.inputs import inputs
from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.problem.attention_problem import AttentionProblem, describe
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.listed_blocks import Lists
from flashcore_cupy.problem.rules import RULES, describe_rules

#: NaN elements before and after every array. 64 keeps what follows aligned.
_GUARD = 64
#: Elements between the end of a row and the next one.
_PADDING = {"strided": 8, "align8": 4, "align4": 2, "misaligned": 1}


@dataclass(frozen=True)
class Embedded:
    """An array inside a larger buffer that is NaN elsewhere; offset and strides in elements."""

    buffer: Array
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def on_host(self) -> Array:
        """The array as a view of ``buffer``."""
        strides = [s * self.buffer.itemsize for s in self.strides]
        return as_strided(self.buffer[self.offset :], self.shape, strides)

    def on_gpu(self) -> tuple[Any, Any]:
        """Copy the buffer to the GPU; return the copy and the array as a view of it."""
        import cupy

        buffer = cupy.asarray(self.buffer)
        size = self.buffer.itemsize
        view = cupy.ndarray(
            self.shape,
            self.buffer.dtype,
            memptr=buffer.data + self.offset * size,
            strides=tuple(s * size for s in self.strides),
        )
        return buffer, view

    def surroundings_are_nan(self, buffer: Array) -> bool:
        """Whether nothing but the array was written in a copy of the buffer."""
        outside = np.isnan(buffer.astype(np.float32))
        view = as_strided(
            outside[self.offset :], self.shape, [s * outside.itemsize for s in self.strides]
        )
        view[...] = True
        return bool(outside.all())


def embed(shape: tuple[int, ...], dtype: Any, view: str, *, like: Array | None = None) -> Embedded:
    """Lay out an array as a case's ``view`` says, filled from ``like`` or NaN.

    "contiguous": as NumPy would. "strided": rows 8 elements apart, heads a row apart. "align8",
    "align4", "misaligned": rows 4, 2, 1 elements apart, so that fewer bytes are aligned.
    "transposed": the last axis is not the contiguous one.
    """
    offset, strides, size = _lie(shape, view)
    poison = -1 if np.issubdtype(dtype, np.integer) else np.nan
    embedded = Embedded(np.full(size, poison, dtype), offset, shape, strides)
    if like is not None:
        embedded.on_host()[...] = like
    return embedded


def _lie(shape: tuple[int, ...], view: str) -> tuple[int, tuple[int, ...], int]:
    """Offset, strides and size of the buffer of an array in a view, elements."""
    lengths = (*shape[:2], shape[3], shape[2]) if view == "transposed" else shape
    padding = _PADDING.get(view, 0)
    row, rows = lengths[3] + padding, lengths[2] + (padding > 0)
    strides = (lengths[1] * rows * row, rows * row, row, 1)
    if view == "transposed":
        strides = (*strides[:2], 1, row)
    offset = _GUARD + (view == "misaligned")
    return offset, strides, offset + lengths[0] * lengths[1] * rows * row + _GUARD


@dataclass(frozen=True)
class Setup:
    """A case's inputs, canonical and as they will lie on the GPU, and its output's place."""

    host: tuple[Array, Array, Array]
    embedded: tuple[Embedded, Embedded, Embedded]
    out: Embedded
    extras: dict[str, Embedded]
    """The rules' arrays and the boundaries."""


def set_up(case: Case) -> Setup:
    """Draw a case's arrays and lay them out."""
    host = inputs(case.problem(), case.seed, case.kind)
    dtype = host[0].dtype

    def laid_out(x: Array) -> Embedded:
        y = x if case.layout == "bhsd" else x.transpose(0, 2, 1, 3)
        return embed(y.shape, dtype, case.view, like=y)

    q, k, v = (laid_out(x) for x in host)
    out_view = "contiguous" if case.view == "transposed" else case.view
    out = embed(case.shape_of("o"), dtype, out_view)
    extras = {}
    for name, x in case.rule_arrays().items():
        four = (1,) * (4 - x.ndim) + x.shape
        extras[name] = embed(four, x.dtype, _view_of(case, name), like=x.reshape(four))
    return Setup(host, (q, k, v), out, extras)


def _view_of(case: Case, name: str) -> str:
    """How a rule's array lies: the broadcast ones as q, k and v do, the others contiguous."""
    broadcast = [rule.name for rule in RULES if rule.takes == "array"]
    return case.view if name in broadcast else "contiguous"


@dataclass(frozen=True)
class Placed:
    """A case's arrays where it runs, and ``attention``'s arguments of its rules."""

    inputs: tuple[Any, Any, Any]
    out: Any
    """None where the case's gate stops before the output."""
    out_buffer: Any
    arguments: dict[str, Any]

    @classmethod
    def of(cls, case: Case, setup: Setup, *, on_gpu: bool, in_kernel: bool = False) -> Placed:
        """Lay out on the GPU, or as NumPy arrays that share the setup's buffers.

        ``in_kernel``: mods are expressions there, too, for a kernel that is emulated.
        """

        def place(embedded: Embedded) -> tuple[Any, Any]:
            return embedded.on_gpu() if on_gpu else (embedded.buffer, embedded.on_host())

        shapes = {name: x.shape for name, x in case.rule_arrays().items()}
        extras = {}
        for name, embedded in setup.extras.items():
            stays = name.startswith("cu_seqlens") and case.boundaries == "host"
            view = embedded.on_host() if stays else place(embedded)[1]
            extras[name] = view[(0,) * (4 - len(shapes[name]))]
        arguments = case.arguments(extras, cuda=on_gpu or in_kernel)
        out_buffer, out = place(setup.out)
        q, k, v = (place(embedded)[1] for embedded in setup.embedded)
        if case.lengths:  # (1, total, H, D)
            q, k, v, out = q[0], k[0], v[0], out[0]
        stops = case.gate in ("qk", "softmax")
        return cls((q, k, v), None if stops else out, out_buffer, arguments)

    def refill_out(self, content: Array) -> None:
        """Have the output's buffer hold this."""
        if isinstance(self.out_buffer, np.ndarray):
            self.out_buffer[...] = content
        else:
            self.out_buffer.set(content)


def described(case: Case) -> AttentionProblem:
    """The problem with its strides and alignment, from arrays that are never filled."""
    view = "contiguous" if case.view == "transposed" else case.view  # launched as a copy
    specs = [_Spec.of(case.shape_of(name), case.numpy_dtype(), view) for name in "qkv"]
    if case.lengths:
        specs = [spec.last(3) for spec in specs]
    problem = describe(
        *specs,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        gate=case.gate,  # type: ignore[arg-type]
        layout=case.layout,
        sequences=len(case.lengths) or None,
        batch_invariant=case.batch_invariant,
        addresses=[spec.address for spec in specs],
    )
    extras = {}
    for name, x in case.rule_arrays().items():
        four = (1,) * (4 - x.ndim) + x.shape
        extras[name] = _Spec.of(four, x.dtype, _view_of(case, name)).last(x.ndim)
    rules = case.rules(extras, cuda=True, blocks=Lists)
    described = describe_rules(problem.scores, case.dtype, packed=problem.packed, **rules)
    return replace(problem, rules=described)


@dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    address: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any, view: str) -> _Spec:
        offset, strides, _ = _lie(shape, view)
        size = dtype.itemsize
        return cls(shape, tuple(s * size for s in strides), dtype, offset * size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def last(self, ndim: int) -> _Spec:
        """Without the first axes, which have one element."""
        cut = 4 - ndim
        return replace(self, shape=self.shape[cut:], strides=self.strides[cut:])
