"""What kernels need to know of an array, CuPy's or NumPy's: addresses, strides, overlaps.

Nothing here reads an element, or imports CuPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flashcore_cupy.problem.attention_problem import MAX_ALIGN, AttentionProblem, dtype_beside

# NumPy 1.25 moved it.
_TooHardError = getattr(np, "exceptions", np).TooHardError


class ArraySpec(NamedTuple):
    """An array without its data: what ``problem.describe`` looks at, and a key for caches."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    address: int
    """Modulo the widest load: all that matters of it is the alignment."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


def spec_of(x: Any) -> ArraySpec:
    """Describe an array."""
    return ArraySpec(x.shape, x.strides, x.dtype, address_of(x) % MAX_ALIGN)


def address_of(x: Any) -> int:
    """Return the address of the first element, on the host or on the GPU."""
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def spec_of_copy(x: Any) -> ArraySpec:
    """Describe a C-contiguous copy of ``x`` that has not been made."""
    strides = [x.dtype.itemsize]
    for n in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * n)
    return ArraySpec(x.shape, tuple(strides), x.dtype, 0)


def check_elements(name: str, x: Any) -> None:
    """Raise ``ValueError`` for GPU elements that lie where no load of an element may go.

    NumPy copies such an array; CuPy's own kernels fault on it.
    """
    if not isinstance(x, np.ndarray) and _is_misaligned(x):
        raise ValueError(
            f"{name}: its elements do not lie on multiples of their {x.dtype.itemsize} bytes; "
            f"copy its bytes into an array of its own first"
        )


def aligned(x: Any) -> Any:
    """Return ``x``, or a copy of a NumPy array whose elements lie where no load of one may go."""
    return x.copy() if isinstance(x, np.ndarray) and _is_misaligned(x) else x


def _is_misaligned(x: Any) -> bool:
    size = x.dtype.itemsize
    return address_of(x) % size != 0 or any(s % size for s in x.strides)


def why_copied(x: Any) -> str:
    """Say why kernels cannot address ``x`` as it is; empty if they can."""
    if 0 in x.shape:
        return ""
    if x.ndim and x.shape[-1] > 1 and x.strides[-1] != x.dtype.itemsize:
        return f"its last axis is not contiguous (strides {x.strides} bytes)"
    if _is_misaligned(x):
        return f"its elements do not lie on multiples of their {x.dtype.itemsize} bytes"
    return ""


def usable(x: Any, xp: Any) -> Any:
    """Return ``x``, or a copy of it that kernels can address; ``xp`` is its array module."""
    # Not ascontiguousarray, which returns a misaligned array as it is.
    return xp.array(x, order="C", copy=True) if why_copied(x) else x


def check_out(problem: AttentionProblem, out: Any, inputs: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``out`` can take the output of q, k and v."""
    q = inputs["q"]
    check_place("out", out, problem.output_shape, q)
    if out.dtype != q.dtype:
        own, wanted = dtype_beside(out.dtype, q.dtype), dtype_beside(q.dtype, out.dtype)
        raise TypeError(f"out: got dtype {own}; q's is {wanted}")
    check_written("out", out, inputs)


def check_place(name: str, x: Any, shape: tuple[int, ...], q: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a result has this shape and is where q is."""
    on_host = isinstance(q, np.ndarray)
    if isinstance(x, np.ndarray) != on_host:
        got = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
        raise TypeError(f"{name}: got {got}; use a {'numpy' if on_host else 'cupy'} array like q")
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {x.shape}; this problem's is {shape}")
    if not on_host and x.device != q.device:
        raise ValueError(f"{name}: on GPU {x.device.id}, but q is on GPU {q.device.id}")


def check_written(name: str, x: Any, inputs: Mapping[str, Any], *, dense: bool = False) -> None:
    """Raise ``ValueError`` unless a kernel can write ``x``, and no input changes with it.

    ``dense``: as a C-contiguous array.
    """
    reason = why_copied(x)
    if dense and not reason and not x.flags.c_contiguous:
        reason = f"it is not C-contiguous (strides {x.strides} bytes)"
    if reason:
        raise ValueError(f"{name}: {reason}; use a contiguous array")
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name}: is read-only; use an array of your own")
    if _overlaps_itself(x):
        raise ValueError(
            f"{name}: its elements share memory, as a broadcast view's; use a real array"
        )
    # What is copied before is read no more.
    check_overlaps(name, x, {n: other for n, other in inputs.items() if not why_copied(other)})


def check_overlaps(name: str, x: Any, arrays: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a result shares memory with one of these, given by their names."""
    for other, y in arrays.items():
        if _share_memory(x, y):
            raise ValueError(f"{name}: overlaps {other} in memory; use another array")


def _overlaps_itself(x: Any) -> bool:
    """Whether some axis steps inside what the axes of smaller steps cover."""
    if 0 in x.shape:
        return False
    covered = x.dtype.itemsize
    for step, n in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if step < covered:
            return True
        covered += step * (n - 1)
    return False


def _share_memory(x: Any, y: Any) -> bool:
    """Whether two arrays, on the host or on one GPU, have a byte in common."""
    (x_first, x_end), (y_first, y_end) = (span_of(z, address_of(z)) for z in (x, y))
    if x_end <= y_first or y_end <= x_first:
        return False
    a, b = np.asarray(_Addresses(x)), np.asarray(_Addresses(y))
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except _TooHardError:
        return True  # strides that take long to tell apart are not worth the risk


def span_of(x: Any, address: int) -> tuple[int, int]:
    """First byte of an array that starts at ``address``, and the one after its last."""
    first = last = address
    for n, step in zip(x.shape, x.strides, strict=True):
        if n == 0:
            return first, first
        first += min(0, step * (n - 1))
        last += max(0, step * (n - 1))
    return first, last + x.dtype.itemsize


class _Addresses:
    """A stand-in for an array that NumPy may reason about, but not read."""

    def __init__(self, x: Any) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": x.shape,
            "strides": x.strides,
            "typestr": f"|V{x.dtype.itemsize}",
            "data": (address_of(x), True),
        }
