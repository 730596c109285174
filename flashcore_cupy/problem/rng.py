"""Where dropout's random numbers come from: a call's ``rng``, and the mask that it makes."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.array_spec import address_of, aligned
from flashcore_cupy.problem.dropout import rounded_dropout
from flashcore_cupy.problem.philox import Dropout, integer_key_of
from flashcore_cupy.problem.values import shown

_USE = "pass rng=(seed, offset), two integers from 0 to 2**64 - 1, or an array (2,) of 64 bits each"


def check_rng(rng: Any, *, on_gpu: bool) -> Any:
    """Return a seed and an offset: as a tuple of integers, or as an array where q is, (2,).

    An array stays one where a kernel can read it, so that a graph that was captured draws with what
    the array holds by then. Raises ``TypeError`` or ``ValueError`` for anything else.
    """
    if rng is None:
        return None
    if isinstance(rng, tuple | list):
        return _integers(rng)
    if on_gpu:
        interop.check_device("rng", rng)
    array, _ = interop.taken("rng", rng)
    on_host = isinstance(array, np.ndarray)
    if not on_host and not on_gpu:
        raise TypeError(f"rng: a CuPy array while q is a NumPy array; {_USE}")
    words = {"uint64": 2, "int64": 2, "uint32": 4, "int32": 4}.get(array.dtype.name)
    if tuple(array.shape) != (words,):
        raise TypeError(f"rng: got {array.dtype.name} of shape {tuple(array.shape)}; {_USE}")
    if on_host:  # in any byte order
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        array = aligned(array.view(np.uint64))
        return tuple(map(int, array)) if on_gpu else array
    if array.strides != (array.itemsize,) or address_of(array) % 8:
        raise ValueError(
            "rng: is not contiguous, on a multiple of 8 bytes; use an array of its own"
        )
    return array.view(np.uint64)


def _integers(rng: Any) -> tuple[int, int]:
    numbers = []
    for x in rng:
        try:
            numbers.append(x.__index__())
        except Exception:  # of what is no integer, or an array of another library
            raise TypeError(f"rng: got {shown(rng)}; {_USE}") from None
    if len(numbers) != 2 or not all(0 <= n < 2**64 for n in numbers):
        raise ValueError(f"rng: got {shown(rng)}; {_USE}")
    return numbers[0], numbers[1]


def missing_rng(dropout_p: float) -> ValueError:
    """The error of a call that drops, and does not say what is to be drawn."""
    return ValueError(f"rng: got none with dropout_p={dropout_p:g}; {_USE}")


def integer_key(rng: Any) -> int:
    """The generator's key of a tuple of two integers; 0 for none."""
    return 0 if rng is None else integer_key_of(*rng)


def dropout_mask(
    shape: tuple[int, int, int, int], dropout_p: float, rng: Any, *, like: Any = None
) -> Any:
    """Where ``attention`` with this ``dropout_p`` and ``rng`` keeps a probability.

    So with P the softmax, ``attention(..., dropout_p=p, rng=rng)`` is
    ``(P * mask / (1 - p)) @ v``, with p rounded to a multiple of 2**-16.

    Parameters
    ----------
    shape : (B, Hq, Sq, Skv)
        Of the scores. Of a packed batch: B sequences of at most so many queries and keys; what lies
        behind a sequence's own is to be left out.
    dropout_p, rng
        As ``attention`` takes them.
    like : array, optional
        The mask's kind and place are those of this array; by default of rng, or NumPy's.

    Returns
    -------
    mask : array of bool, (B, Hq, Sq, Skv)
        All True for dropout_p = 0. An element depends on its own place alone, not on ``shape``.

    Raises
    ------
    TypeError, ValueError
        As ``attention``.
    """
    p = rounded_dropout(interop.plain_number("dropout_p", dropout_p))
    if p > 0 and rng is None:
        raise missing_rng(p)
    place = rng if like is None and rng is not None and not isinstance(rng, tuple | list) else like
    gpu = None if place is None else interop.gpu_of("like" if like is not None else "rng", place)
    sizes = _sizes(shape)
    if gpu is None:
        kind = "numpy" if place is None else interop.taken("like", place)[1]
        return interop.returned(_mask(sizes, p, check_rng(rng, on_gpu=False), np), kind)
    import cupy

    with cupy.cuda.Device(gpu), captures.captured_call():
        _, kind = interop.taken("like", place)
        return interop.returned(_mask(sizes, p, check_rng(rng, on_gpu=True), cupy), kind)


def _sizes(shape: Any) -> tuple[int, int, int, int]:
    wrong = f"shape: got {shown(shape)}; use (B, Hq, Sq, Skv)"
    try:
        sizes = tuple(n.__index__() for n in shape)
    except Exception:  # of no sequence, or of no integers
        raise TypeError(wrong) from None
    if len(sizes) != 4 or min(sizes) < 0:
        raise ValueError(wrong)
    return sizes


def _mask(sizes: tuple[int, int, int, int], p: float, rng: Any, xp: Any) -> Any:
    batch, heads, seqlen_q, seqlen_kv = sizes
    mask = xp.ones(sizes, np.bool_)
    if p == 0 or mask.size == 0:
        return mask
    dropout = Dropout.of(p, rng, xp)
    for b, h in np.ndindex(batch, heads):
        mask[b, h] = dropout.kept(b, h, xp.arange(seqlen_q), slice(0, seqlen_kv))
    return mask
