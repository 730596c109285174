"""Memory that a launch needs beside its arrays: partials of split keys, and counters.

One area per stream, kept and grown: launches on one stream run one after the other. The counters
are zero between launches, because each launch leaves them so. Only the streams that were used last
have an area; the others' goes back to the allocator, which hands memory out in the stream's order.
A launch that is captured into a CUDA graph gets an area that the graph owns.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashcore_cupy.cuda import captures
from flashcore_cupy.cuda.streams import stream_key

if TYPE_CHECKING:
    import cupy

_MOST_AREAS = 16
_lock = threading.Lock()
_areas: OrderedDict[tuple[int, int, int], Workspace] = OrderedDict()
"""The stream that was used last is last."""


@dataclass(frozen=True)
class Workspace:
    """Addresses of both parts, and the arrays that hold them."""

    partials_array: cupy.ndarray
    counter_array: cupy.ndarray

    def holds(self, partials: int, counters: int) -> bool:
        """Whether both parts have so many bytes."""
        return bool(
            self.partials_array.nbytes >= partials and self.counter_array.nbytes >= counters
        )

    @property
    def partials(self) -> int:
        """Address of the partials."""
        return int(self.partials_array.data.ptr)

    @property
    def counters(self) -> int:
        """Address of the counters."""
        return int(self.counter_array.data.ptr)


def workspace(partials: int, counters: int) -> Workspace:
    """Memory of at least so many bytes for the next launch on the current stream."""
    if captures.is_active():
        return allocate(partials, counters)
    key = stream_key()
    with _lock:
        known = _areas.get(key)
        if known is not None and known.holds(partials, counters):
            _areas.move_to_end(key)
            return known
        area = _areas[key] = allocate(_grown(partials), _grown(counters))
        _areas.move_to_end(key)
        if len(_areas) > _MOST_AREAS:
            _areas.popitem(last=False)
    return area


def _grown(size: int) -> int:
    return 1 << max(12, (size - 1).bit_length())


def allocate(partials: int, counters: int) -> Workspace:
    """Memory of so many bytes, for the caller alone; ready on the current stream."""
    import cupy

    if not captures.is_active():
        return Workspace(cupy.empty(partials, cupy.uint8), cupy.zeros(counters, cupy.uint8))
    with captures.beside():  # or the graph would zero the counters in every replay
        return Workspace(cupy.empty(partials, cupy.uint8), cupy.zeros(counters, cupy.uint8))
