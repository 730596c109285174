"""What a tensor map says of an array, and which arrays it can describe.

The unit that copies boxes of an array (TMA) knows an array by its map: an address, sizes, strides,
and the box that one copy takes. ``launch/tensor_map.py`` has the driver encode it.
"""

from __future__ import annotations

from typing import NamedTuple

from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem, Operand
from flashcore_cupy.select.units import panel_cols, round_up

TMA_ALIGN = 16
"""Bytes that rows which TMA copies start and end on."""
MAX_BOX = 256
"""Rows that it copies at once."""
_MAX_STRIDE = 2**40


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


def view_of(
    operand: Operand, dtype: str, columns: int, box_rows: int, rows: tuple[int, int]
) -> View:
    """Rows from the first to before the last of an operand; a map has at least one row.

    ``columns``: those of the operand's tile.
    """
    size = ITEMSIZE[dtype]
    batch, heads, _, dim = operand.shape
    batch_step, head_step, row_step = (step * size for step in operand.strides)
    first, end = rows
    dims = (dim, max(1, end - first), heads, batch)
    # A stride that leads nowhere may be anything, but has to be legal.
    unused = round_up(dim * size, TMA_ALIGN)
    empty = 0 in operand.shape
    used = [unused if empty or step == 0 else step for step in (row_step, head_step, batch_step)]
    strides = (used[0], used[1], used[2])
    box = (panel_cols(columns), box_rows, 1)
    return View(operand.name, dtype, dims, strides, box, first * row_step)


def clipped_view(view: View, *, stored: bool) -> View:
    """A packed array, for boxes that end where a sequence does.

    Batch b of the map are as many rows of the array as a box has, from row b on: a box of d rows is
    the last d rows of a batch. Boxes of sequences that end in the first rows would need batches
    that begin before the array. They reach behind their sequence instead; where they are stored,
    which must not be, the map begins so many rows before the array. (No row is stored there. Loads
    are different: TMA needs memory at the address of a map that it loads by.)
    """
    columns, total, heads, _ = view.dims
    row, head, _ = view.strides
    if total == 1:  # then the stride leads nowhere, and may be anything
        row = round_up(columns * ITEMSIZE[view.dtype], TMA_ALIGN)
    rows = view.box[1]
    if not stored:
        dims = (columns, min(rows, total), heads, total)
        return view._replace(dims=dims, strides=(row, head, row))
    return view._replace(
        dims=(columns, rows, heads, total + 1),
        strides=(row, head, row),
        offset=view.offset - rows * row,
    )


def check_layout(problem: AttentionProblem) -> None:
    """Raise ``ValueError`` if TMA cannot address q, k or v; it names which."""
    operands = (problem.q, problem.k, problem.v)
    unfit = [op.name for op in operands if not is_addressable(op, problem.dtype)]
    if unfit:
        raise ValueError(
            f"loads by TMA: needs rows that start and end on multiples of {TMA_ALIGN} bytes, and "
            f"positive strides, unlike those of {', '.join(unfit)}"
        )


def is_addressable(operand: Operand, dtype: str) -> bool:
    """Whether a map can describe an array of q, k, v or o."""
    if 0 in operand.shape:
        return True
    size = ITEMSIZE[dtype]
    used = [step * size for n, step in zip(operand.shape, operand.strides, strict=False) if n > 1]
    return operand.align_bytes % TMA_ALIGN == 0 and all(0 < step < _MAX_STRIDE for step in used)
