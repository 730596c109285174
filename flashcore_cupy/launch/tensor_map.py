"""Tensor maps: what the unit that copies boxes of an array (TMA) is told of q, k, v and o.

A map holds an array's address and what its ``View`` says. The driver encodes it on the host; the
kernel takes its 128 bytes as they are.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcore_cupy.cuda.driver import binding
from flashcore_cupy.select.tensor_view import TMA_ALIGN, View

if TYPE_CHECKING:
    from flashcore_cupy.launch.parameter_block import ParameterBlock

_MAP_BYTES = 128
_LIMIT = 4096  # maps remembered
_ELSEWHERE = 2**33 + 2**21 + TMA_ALIGN  # bytes on: bits of both halves of an address


def maps_of(views: Sequence[View], arrays: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The maps of CuPy arrays by the views' names."""
    return {
        view.name: encode(_address(arrays[view.name].data.ptr, arrays["q"].data.ptr), view)
        for view in views
    }


def _address(own: int, q: int) -> int:
    """An array without elements may have no address; its map needs one that is never used."""
    return own or q


class Maps:
    """The maps in a launch's parameters, which follow the addresses of q, k, v, o.

    The driver encoded those of the first addresses, and all others are these, moved; a driver whose
    maps are not ``movable`` is asked each time. ``params``: the struct that holds them.
    """

    def __init__(
        self, views: Sequence[View], addresses: Mapping[str, int], params: np.dtype[Any]
    ) -> None:
        self._views = views
        fields: Mapping[str, Any] = params.fields or {}
        # Their first words, in words of 8 bytes.
        self._first_words = tuple(fields[f"{name}_map"][1] // 8 for name in "qkvo")
        offsets = [view.offset for view in views]
        self._offsets = (*offsets, *[0] * (4 - len(offsets)))
        places = [_address(addresses[view.name], addresses["q"]) for view in views]
        self.movable = all(map(movable, places, views))

    def move(self, block: ParameterBlock, q: int, k: int, v: int, o: int) -> None:
        """Write the maps of arrays at these addresses where the parameters have others."""
        if self.movable:
            words, (q_map, k_map, v_map, o_map) = block.words, self._first_words
            offset_q, offset_k, offset_v, offset_o = self._offsets
            words[q_map] = q + offset_q
            words[k_map] = (k or q) + offset_k  # as _address has it
            words[v_map] = (v or q) + offset_v
            words[o_map] = o + offset_o  # which a kernel that stores directly does not look at
        else:
            addresses = (q, _address(k, q), _address(v, q), o)
            each = zip(self._views, self._first_words, addresses, strict=False)
            for view, first, address in each:
                encoded = encode(address, view).view("u1")
                block.bytes[first * 8 : first * 8 + _MAP_BYTES] = encoded


def movable(address: int, view: View) -> bool:
    """Whether the driver's map of another address is this one with the address in its first word.

    What is in a map is the driver's own affair, so two that it encoded are compared. To ask it
    for every new address would cost a call several times what is left of it.
    """
    here, there = (encode(a, view) for a in (address, address + _ELSEWHERE))
    same = here.copy()
    same[0] += np.uint64(_ELSEWHERE)
    return bool(here[0] == address + view.offset and (same == there).all())


@functools.lru_cache(maxsize=_LIMIT)
def encode(address: int, view: View) -> np.ndarray[Any, Any]:
    """The map of an array at an address: 16 numbers, not to be changed.

    Raises ``RuntimeError`` with the driver's code if the driver refuses.
    """
    driver = binding()
    kinds = driver.CUtensorMapDataType
    error, encoded = driver.cuTensorMapEncodeTiled(
        getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{view.dtype.upper()}"),
        len(view.dims),
        address + view.offset,
        [driver.cuuint64_t(n) for n in view.dims],
        [driver.cuuint64_t(n) for n in view.strides],
        [driver.cuuint32_t(n) for n in (*view.box, 1)],
        [driver.cuuint32_t(1)] * len(view.dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{view.swizzle}B"),
        # A row of a box. Twice that, few queries read K and V more slowly: 4.0 of 4.3 TB/s.
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"{view.name}: the driver encodes no tensor map of sizes {view.dims}, strides "
            f"{view.strides} bytes, boxes of {view.box}: {error!r}"
        )
    words = np.frombuffer(ctypes.string_at(encoded.getPtr(), _MAP_BYTES), np.uint64)
    words.flags.writeable = False
    return words
