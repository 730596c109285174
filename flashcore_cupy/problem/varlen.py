"""Packed variable-length batches: where their sequences start, checked as far as the host can.

Boundaries on the host are validated and copied to the GPU once; boundaries on the GPU are taken as
they are, for a look at them would wait for the GPU. Kernels clamp them instead.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashcore_cupy.cuda import captures
from flashcore_cupy.cuda.streams import stream_key
from flashcore_cupy.problem.interop import check_device, taken
from flashcore_cupy.problem.values import shown

_NAMES = ("cu_seqlens_q", "cu_seqlens_k")
_MOST_COPIES = 256
_lock = threading.Lock()
_copies: OrderedDict[Any, Any] = OrderedDict()
"""Boundaries on a GPU, by stream and content: one that is forgotten goes back to its own stream."""


def boundaries(
    cu_seqlens_q: Any, cu_seqlens_k: Any, total_q: int, total_k: int
) -> tuple[Any, Any] | None:
    """Check both boundaries, each (B + 1,); None if neither is given.

    Those of the host come back as NumPy int32 arrays, others as CuPy arrays. Raises ``TypeError``
    or ``ValueError`` naming the argument, what it got and what works.
    """
    given = (cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    for name, other, value in zip(_NAMES, reversed(_NAMES), given, strict=True):
        if value is None:
            raise ValueError(f"{name}: missing beside {other}; give both, or neither")
    q, k = (
        _checked(name, value, total)
        for name, value, total in zip(_NAMES, given, (total_q, total_k), strict=True)
    )
    if len(q) != len(k):
        raise ValueError(
            f"cu_seqlens_k: got {len(k)} boundaries, but cu_seqlens_q has {len(q)}; "
            f"B sequences have B + 1 in both"
        )
    return q, k


def on_gpu(cu_seqlens: Any) -> Any:
    """Return the boundaries on the current GPU, ready on the current stream.

    The same array again for the same values and stream; a captured call has its own.
    """
    if not isinstance(cu_seqlens, np.ndarray):
        return cu_seqlens
    if captures.is_active():
        return captures.on_gpu(cu_seqlens)
    key = stream_key(), cu_seqlens.tobytes()
    with _lock:
        known = _copies.get(key)
        if known is None:
            known = _copies[key] = captures.on_gpu(cu_seqlens)
            if len(_copies) > _MOST_COPIES:
                _copies.popitem(last=False)
        _copies.move_to_end(key)
    return known


def _checked(name: str, value: Any, total: int) -> Any:
    if isinstance(value, list | tuple):
        try:
            value = np.asarray(value)
        except Exception as error:  # rows of unequal lengths; arrays in it, for their own reasons
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{name}: got {shown(value)}; use (B + 1,) integers") from error
    check_device(name, value)
    array, _ = taken(name, value)
    if array.ndim != 1 or len(array) < 1:
        raise ValueError(f"{name}: got shape {tuple(array.shape)}; use (B + 1,), starting with 0")
    if isinstance(array, np.ndarray):
        return _checked_on_host(name, array, total)
    if array.dtype.name != "int32" or array.strides != (4,):
        raise TypeError(
            f"{name}: got {array.dtype.name} with strides {array.strides}; on a GPU use contiguous "
            f"int32, for example {name}.astype('int32')"
        )
    return array


def _checked_on_host(name: str, array: NDArray[Any], total: int) -> NDArray[np.int32]:
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: got dtype {array.dtype.name}; use integers")
    if array[0] != 0 or (np.diff(array.astype(np.int64)) < 0).any() or array[-1] != total:
        raise ValueError(
            f"{name}: got {_shown(array)}; it starts with 0, never decreases, and ends with the "
            f"{total} rows that are packed"
        )
    return array.astype(np.int32)


def _shown(array: NDArray[Any]) -> str:
    return np.array2string(array, threshold=8, separator=", ")
