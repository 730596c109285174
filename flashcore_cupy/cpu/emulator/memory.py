"""The global memory that a checking build lets a kernel touch, byte by byte."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from flashcore_cupy.problem.blocks import Array

_UNWRITTEN, _WRITTEN, _BETWEEN = 0, 1, 2


@dataclass(frozen=True)
class Memory:
    """An array from its first byte to its last, and what is known of each byte.

    That is 0 where nobody has written a value, 1 where there is one, and 2 between the elements:
    kernels must not touch those. Launches write a 1 where they write.
    """

    name: str
    begin: int
    """The address of the first byte."""
    state: Array
    """uint8."""
    elements: Array
    """The state of the array's elements: its shape and one axis more, the bytes of an element."""
    is_writable: bool

    @classmethod
    def of(cls, name: str, array: Array, *, has_values: bool, is_writable: bool) -> Memory:
        """Describe an array that is not empty."""
        steps = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
        before = -sum(step for step in steps if step < 0)
        size = before + sum(step for step in steps if step > 0) + array.itemsize
        state = np.full(size, _BETWEEN, np.uint8)
        elements = as_strided(
            state[before:], (*array.shape, array.itemsize), (*array.strides, 1), writeable=True
        )
        elements[...] = _WRITTEN if has_values else _UNWRITTEN
        return cls(name, array.ctypes.data - before, state, elements, is_writable)

    def missing(self) -> str | None:
        """Say which element, of how many, has not been written; None if all have been."""
        missing = (self.elements == _UNWRITTEN).any(axis=-1)
        if not missing.any():
            return None
        index = tuple(map(int, np.argwhere(missing)[0]))
        return f"{self.name}{list(index)} and {int(missing.sum()) - 1} others"


def memory_of(
    arrays: Mapping[str, Array], inputs: Collection[str], defined: Collection[str]
) -> tuple[Memory, ...]:
    """Describe a launch's arrays. All but the inputs are written.

    The inputs and the ``defined`` ones have values; a launch writes the rest before it reads it.
    """
    return tuple(
        Memory.of(
            name, x, has_values=name in inputs or name in defined, is_writable=name not in inputs
        )
        for name, x in arrays.items()
        if x.size
    )
