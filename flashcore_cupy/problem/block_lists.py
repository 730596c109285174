"""Lists of blocks from grids, sparse rows and intervals. A GPU is not waited for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flashcore_cupy.problem import interop
from flashcore_cupy.problem.listed_blocks import LISTS, blocks_of
from flashcore_cupy.problem.values import shown


class InKernel(NamedTuple):
    """A rule in both of its forms: for kernels, and for NumPy."""

    cuda: str
    python: Callable[..., Any]


_INTERVALS = "fc_intervals"  # among mod_args


class Made(NamedTuple):
    """Lists of mixed and of full blocks, and the rule of the mixed ones."""

    lists: tuple[Any, Any, Any, Any]
    mask_mod: InKernel
    mod_args: Mapping[str, Any]


def module_of(x: Any) -> Any:
    """NumPy or CuPy, whichever an array is of."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def checked(given: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The lists that are given, (B or 1, heads or 1, Qb) and (..., Qb, capacity), without copies.

    Raises ``TypeError`` or ``ValueError`` naming the list.
    """
    if not isinstance(given, Mapping) or not set(given) <= set(LISTS):
        names = shown(sorted(map(str, given)) if isinstance(given, Mapping) else given)
        raise TypeError(f"arrays: got {names}; use a dict of some of {', '.join(LISTS)}")
    found: dict[str, Any] = {}
    for counts, indices in (LISTS[:2], LISTS[2:]):
        pair = {name: x for name in (counts, indices) if (x := given.get(name)) is not None}
        if len(pair) == 1:
            (only,) = pair
            missing = indices if only == counts else counts
            raise ValueError(f"{missing}: got none with {only}; counts and indices go together")
        found |= {name: _list(name, x, 3 if name == counts else 4) for name, x in pair.items()}
        if pair and found[counts].shape != found[indices].shape[:3]:
            raise ValueError(
                f"{indices}: got shape {tuple(found[indices].shape)}; use that of {counts}, "
                f"{tuple(found[counts].shape)}, and an axis of indices"
            )
    _check_places(found)
    if not found:
        raise ValueError("kv_num_blocks: got no lists; pass those of mixed or of full blocks")
    counted = [found[name] for name in LISTS[::2] if name in found]
    for name, x in zip((n for n in LISTS[::2] if n in found), counted, strict=True):
        if x.shape[2] != rows:
            raise ValueError(
                f"{name}: has {x.shape[2]} blocks of queries; these lengths have {rows}"
            )
        if x.shape != counted[0].shape:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}; use that of kv_num_blocks, "
                f"{tuple(counted[0].shape)}"
            )
    return found


def _list(name: str, x: Any, axes: int) -> Any:
    """A list as CuPy or NumPy has it, with all of its axes."""
    array, _ = interop.taken(name, x)
    _check_int32(name, array)
    if not axes - 2 <= array.ndim <= axes:
        raise ValueError(
            f"{name}: got shape {tuple(array.shape)}; use (B or 1, heads or 1, Qb"
            + (")" if axes == 3 else ", capacity)")
        )
    return array[(None,) * (axes - array.ndim)]


def _check_int32(name: str, array: Any) -> None:
    if array.dtype != np.int32:
        got = array.dtype.name if array.dtype.isnative else f"{array.dtype.str}, of other bytes"
        raise TypeError(f"{name}: got dtype {got}; use int32")


def _check_places(arrays: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` unless all are NumPy's, or all are CuPy's."""
    on_host = {name: isinstance(x, np.ndarray) for name, x in arrays.items()}
    if len(set(on_host.values())) == 2:
        gpu = next(name for name, is_there in on_host.items() if not is_there)
        cpu = next(name for name, is_there in on_host.items() if is_there)
        raise TypeError(f"{gpu}: a CuPy array while {cpu} is a NumPy array; put both in one place")


def of_grid(grid: Any, wanted: tuple[int, int]) -> tuple[Any, Any]:
    """Counts and indices of the blocks that are True, (..., Qb, Kb)."""
    array, _ = interop.taken("grid", grid)
    if array.dtype != np.bool_:
        raise TypeError(f"grid: got dtype {array.dtype.name}; use bool, True where a block is full")
    if not 2 <= array.ndim <= 4 or array.shape[-2:] != wanted:
        raise ValueError(
            f"grid: got shape {tuple(array.shape)}; use (B or 1, heads or 1, Qb, Kb) with "
            f"(Qb, Kb) = {wanted}"
        )
    return packed(array, module_of(array))


def packed(grid: Any, xp: Any) -> tuple[Any, Any]:
    """Counts and ascending indices, int32, of what is True along the last axis."""
    *rows, columns = grid.shape
    flat = grid.reshape(math.prod(rows), columns)
    place = xp.cumsum(flat, axis=1, dtype=xp.int64) - 1
    row = xp.arange(len(flat), dtype=xp.int64)[:, None] * columns
    # The last element takes what is False.
    target = xp.where(flat, row + place, flat.size)
    indices = xp.zeros(flat.size + 1, xp.int32)
    indices[target.reshape(-1)] = xp.broadcast_to(
        xp.arange(columns, dtype=xp.int32), flat.shape
    ).reshape(-1)
    counts = flat.sum(axis=1, dtype=xp.int32).reshape(rows)
    return counts, indices[:-1].reshape(*rows, columns)


def of_csr(indptr: Any, indices: Any, wanted: tuple[int, int]) -> tuple[Any, Any]:
    """Counts and indices of rows of a sparse matrix."""
    starts, _ = interop.taken("indptr", indptr)
    values, _ = interop.taken("indices", indices)
    for name, x in (("indptr", starts), ("indices", values)):
        _check_int32(name, x)
    _check_places({"indptr": starts, "indices": values})
    if not 1 <= starts.ndim <= 3 or starts.shape[-1] != wanted[0] + 1:
        raise ValueError(
            f"indptr: got shape {tuple(starts.shape)}; use (B or 1, heads or 1, Qb + 1) with "
            f"Qb + 1 = {wanted[0] + 1}"
        )
    if values.ndim != 1:
        raise ValueError(f"indices: got shape {tuple(values.shape)}; use (nnz,)")
    xp = module_of(starts)
    begin, end = (x.astype(xp.int64) for x in (starts[..., :-1], starts[..., 1:]))
    begin, end = xp.clip(begin, 0, len(values)), xp.clip(end, 0, len(values))
    capacity = min(wanted[1], len(values))
    counts = xp.clip(end - begin, 0, capacity).astype(xp.int32)
    place = begin[..., None] + xp.arange(capacity)
    found = values[xp.minimum(place, max(0, len(values) - 1))] if capacity else None
    empty = xp.zeros((*begin.shape, 0), xp.int32)
    return counts, empty if found is None else xp.ascontiguousarray(found)


def of_intervals(
    intervals: Any, seqlens: tuple[int, int], block: tuple[int, int], queries: int
) -> Made:
    """Mixed and full blocks of intervals (..., rows, n, 2), and the rule that they are.

    ``queries``: how many blocks of them there are.
    """
    array, _ = interop.taken("intervals", intervals)
    _check_int32("intervals", array)
    has_axes = 3 <= array.ndim <= 5 and array.shape[-1] == 2
    if not has_axes or array.shape[-3] not in (seqlens[0], queries):
        raise ValueError(
            f"intervals: got shape {tuple(array.shape)}; use (B or 1, heads or 1, rows, n, 2) with "
            f"rows = {seqlens[0]}, one for each query, or {queries}, one for each block of them"
        )
    xp = module_of(array)
    array = xp.ascontiguousarray(array[(None,) * (5 - array.ndim)])
    per = 1 if array.shape[2] == seqlens[0] else block[0]
    some, every = _covered(array, seqlens, block, per, xp)
    lists = (*packed(some & ~every, xp), *packed(every, xp))
    rule = _rule_of(array.shape, per)
    return Made(lists, rule, {_INTERVALS: array} if array.size else {})


def _covered(
    intervals: Any, seqlens: tuple[int, int], block: tuple[int, int], per: int, xp: Any
) -> tuple[Any, Any]:
    """Which blocks some query sees a key of, and in which each sees all: (..., Qb, Kb)."""
    begin = xp.arange(blocks_of(seqlens[1], block[1])) * block[1]
    end = xp.minimum(begin + block[1], seqlens[1])
    low, high = (intervals[..., side][..., None] for side in (0, 1))
    some = ((low < end) & (high > begin) & (low < high)).any(axis=-2)  # (..., rows, Kb)
    every = ((low <= begin) & (high >= end)).any(axis=-2)
    if per > 1:
        return some, every
    rows = blocks_of(seqlens[0], block[0])
    shape = (*some.shape[:2], rows * block[0], some.shape[-1])
    by_row = (*some.shape[:2], rows, block[0], some.shape[-1])
    all_some, all_every = xp.zeros(shape, xp.bool_), xp.ones(shape, xp.bool_)
    all_some[:, :, : seqlens[0]], all_every[:, :, : seqlens[0]] = some, every
    return all_some.reshape(by_row).any(axis=3), all_every.reshape(by_row).all(axis=3)


@dataclass(frozen=True)
class _Inside:
    """Whether a key lies in an interval of its query, by NumPy; unlike a closure it is pickled."""

    batches: int
    heads: int
    per: int
    """Queries that share intervals."""

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any, **arrays: Any) -> Any:
        seen = np.zeros((len(q_idx), kv_idx.shape[1]), np.bool_)
        if _INTERVALS not in arrays:  # there are none
            return seen
        of_head = arrays[_INTERVALS][b if self.batches > 1 else 0, h if self.heads > 1 else 0]
        own = of_head[q_idx[:, 0] // self.per]
        for i in range(own.shape[1]):
            seen |= (kv_idx >= own[:, i, :1]) & (kv_idx < own[:, i, 1:])
        return seen


def _rule_of(shape: tuple[int, ...], per: int) -> InKernel:
    batches, heads, rows, n, _ = shape
    b = "b" if batches > 1 else "0"
    h = "h" if heads > 1 else "0"
    first = f"((({b}) * {heads} + {h}) * {rows}ll + q_idx / {per}) * {2 * n}"
    inside = (
        f"(kv_idx >= {_INTERVALS}[{first} + {2 * i}] && "
        f"kv_idx < {_INTERVALS}[{first} + {2 * i + 1}])"
        for i in range(n)
    )
    some = " || ".join(inside) if math.prod(shape) else "false"
    return InKernel(some, _Inside(batches, heads, per))
