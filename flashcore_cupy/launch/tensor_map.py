"""Tensor maps: what the unit that copies boxes of an array (TMA) is told of q, k, v and o.

A map holds an array's address, sizes, strides, and the box that one copy takes of it. The driver
encodes it on the host; the kernel takes its 128 bytes as they are.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcore_cupy.cuda.driver import binding
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem, Operand
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.params import HOPPER_PARAMS
from flashcore_cupy.select.tile_checks import TMA_ALIGN, panel_cols

if TYPE_CHECKING:
    from flashcore_cupy.launch.parameter_block import ParameterBlock

ROWS_OF_WARPGROUP = 64
"""Rows of q that one copy takes."""
ROWS_OF_WARP = 16
"""Rows of o that one copy brings."""
_MAP_BYTES = 128
_LIMIT = 4096  # maps remembered
_FIELDS: Mapping[str, Any] = HOPPER_PARAMS.fields or {}
# The first words of the maps, in words of 8 bytes.
_Q_MAP, _K_MAP, _V_MAP, _O_MAP = (_FIELDS[f"{name}_map"][1] // 8 for name in "qkvo")
_ELSEWHERE = 2**33 + 2**21 + TMA_ALIGN  # bytes on: bits of both halves of an address


class View(NamedTuple):
    """What a map says of an array besides its address, columns first; sizes in elements."""

    name: str
    dtype: str
    dims: tuple[int, int, int, int]
    """Columns, rows, heads, batch; of q whose groups are packed, heads before rows."""
    strides: tuple[int, int, int]
    """Bytes between those, from the rows on."""
    box: tuple[int, int, int]
    """What one copy takes of all but the batch."""
    offset: int = 0
    """Bytes from the array's first element to the first that the map describes."""

    @property
    def swizzle(self) -> int:
        """Bytes of a row of the box, which are also the span of the swizzle."""
        return self.box[0] * ITEMSIZE[self.dtype]


def views_of(problem: AttentionProblem, config: KernelConfig, output: Operand) -> tuple[View, ...]:
    """How the kernel's maps see q, k and v, and o where it is stored by one.

    k and v end behind the last key that any query sees, and v begins at the first: what lies
    outside comes as zeros, not as what is there, which may be NaN.
    """
    first, end = _first_key(problem), problem.visible_kv
    if first >= end:  # no key is seen, and none is loaded
        first = 0
    block_n = config.tile.block_n
    q = _view(problem.q, problem, config.head_dim, ROWS_OF_WARPGROUP, 0, problem.seqlen_q)
    views = [
        _packed(q, problem) if config.tile.pack_gqa else q,
        _view(problem.k, problem, config.head_dim, block_n, 0, end),
        _view(problem.v, problem, config.head_dim_v, block_n, first, end),
    ]
    if config.staged_cols:
        views += [_view(output, problem, config.staged_cols, ROWS_OF_WARP, 0, problem.seqlen_q)]
    return tuple(views)


def _first_key(problem: AttentionProblem) -> int:
    """The first key that any query sees; of packed batches only the device knows it."""
    left = problem.window[0]
    if left < 0 or problem.packed:
        return 0
    return max(0, problem.causal_offset - left)


def _view(
    operand: Operand, problem: AttentionProblem, columns: int, box_rows: int, first: int, end: int
) -> View:
    """Rows from first to end of an operand; a map has at least one row."""
    size = ITEMSIZE[problem.dtype]
    batch, heads, _, dim = operand.shape
    batch_step, head_step, row_step = (step * size for step in operand.strides)
    dims = (dim, max(1, end - first), heads, batch)
    # A stride that leads nowhere may be anything, but has to be legal.
    unused = -(-dim * size // TMA_ALIGN) * TMA_ALIGN
    empty = 0 in operand.shape
    used = [unused if empty or step == 0 else step for step in (row_step, head_step, batch_step)]
    strides = (used[0], used[1], used[2])
    box = (panel_cols(columns), box_rows, 1)
    return View(operand.name, problem.dtype, dims, strides, box, first * row_step)


def _packed(q: View, problem: AttentionProblem) -> View:
    """Q with heads before rows, so that a copy takes a group's heads of the same rows."""
    columns, rows, heads, batch = q.dims
    row, head, step = q.strides
    group = problem.heads_q // problem.heads_kv
    box = (q.box[0], group, ROWS_OF_WARPGROUP // group)
    return q._replace(dims=(columns, heads, rows, batch), strides=(head, row, step), box=box)


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
    maps are not ``movable`` is asked each time.
    """

    def __init__(self, views: Sequence[View], addresses: Mapping[str, int]) -> None:
        self._views = views
        self._offset_k, self._offset_v = views[1].offset, views[2].offset
        places = [_address(addresses[view.name], addresses["q"]) for view in views]
        self.movable = all(map(movable, places, views))

    def move(self, block: ParameterBlock, q: int, k: int, v: int, o: int) -> None:
        """Write the maps of arrays at these addresses where the parameters have others."""
        if self.movable:
            words = block.words
            words[_Q_MAP] = q
            words[_K_MAP] = (k or q) + self._offset_k  # as _address has it
            words[_V_MAP] = (v or q) + self._offset_v
            words[_O_MAP] = o  # which a kernel that stores directly does not look at
        else:
            addresses = (q, _address(k, q), _address(v, q), o)
            for view, address in zip(self._views, addresses, strict=False):
                first = _FIELDS[f"{view.name}_map"][1]
                block.bytes[first : first + _MAP_BYTES] = encode(address, view).view("u1")


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
