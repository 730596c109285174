"""The arrays that rules read, as kernels and the NumPy path take them."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.problem import interop
from flashcore_cupy.problem.array_spec import aligned, check_elements


def rule_array(name: str, x: Any, cpu: bool) -> Any:
    """``interop.taken`` for a rule's array, or None; ``TypeError`` if it is not where q is."""
    if x is None:
        return None
    if not cpu:
        interop.check_device(name, x)
    array, _ = interop.taken(name, x)
    if isinstance(array, np.ndarray) != cpu:
        here, there = ("NumPy", "CuPy") if cpu else ("CuPy", "NumPy")
        raise TypeError(f"{name}: a {there} array while q is a {here} array; put both in one place")
    check_elements(name, array)
    return aligned(array)


def few_numbers(name: str, x: Any, cpu: bool) -> Any:
    """Numbers per head, of any real dtype or in a list, as a float32 array where q is; or None.

    They are so few that a cast, or a copy to the GPU, costs next to nothing.
    """
    if isinstance(x, list | tuple):
        values = _listed(name, x)
        return values if cpu else captures.on_gpu(values)
    array = rule_array(name, x, cpu)
    if array is None or array.dtype == np.float32:
        return array
    return _as_float32(name, array)


def _listed(name: str, x: Any) -> Any:
    try:
        array = np.asarray(x)
    except Exception as error:  # of arrays in the list, for whatever reason they have
        raise TypeError(f"{name}: got a {type(x).__name__} that is no array of numbers") from error
    return _as_float32(name, array)


def _as_float32(name: str, array: Any) -> Any:
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: got dtype {array.dtype.name}; use float32")
    with np.errstate(all="ignore"):
        cast = array.astype(np.float32)
    # On a GPU a look would have to wait; there such a number becomes infinity.
    if isinstance(array, np.ndarray) and (np.isinf(cast) & ~np.isinf(array)).any():
        raise ValueError(f"{name}: got numbers beyond float32's largest, 3.4e38")
    return cast
