"""Memory that a launch needs beside its arrays: what the parts of split rows leave for each other.

One area per stream, kept and grown: launches on one stream run one after the other. The counters
of arrivals are zero between launches, each launch leaving them so. Only the streams that were used
last have one; what others had goes back to the allocator, which hands memory out in the stream's
order. A launch that is captured into a CUDA graph gets an area that the graph owns.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashcore_cupy import captures
from flashcore_cupy.config import WARP_SIZE, KernelConfig

if TYPE_CHECKING:
    import cupy

_MOST_AREAS = 16
_lock = threading.Lock()
_areas: OrderedDict[tuple[int, int, int], Workspace] = OrderedDict()
"""The stream that was used last is last."""


@dataclass(frozen=True)
class Workspace:
    """Addresses of both parts, and the arrays that hold them."""

    partial_array: cupy.ndarray
    arrivals_array: cupy.ndarray

    def holds(self, partial: int, arrivals: int) -> bool:
        """Whether both parts have so many bytes."""
        return bool(self.partial_array.nbytes >= partial and self.arrivals_array.nbytes >= arrivals)

    @property
    def partial(self) -> int:
        """Address of the partial results."""
        return int(self.partial_array.data.ptr)

    @property
    def arrivals(self) -> int:
        """Address of the counters."""
        return int(self.arrivals_array.data.ptr)


def split_bytes(config: KernelConfig, blocks: int, splits: int) -> tuple[int, int]:
    """Bytes of partial results and of counters for a grid of ``blocks`` times ``splits``."""
    t = config.tile
    if config.uses_tma:  # SplitRows in split_combine.cuh; the first counter is of blocks taken
        part = t.block_m * (config.head_dim_v + 2) * 4
        return (blocks * splits * part, 4 + blocks * 4) if splits > 1 else (0, 4)
    fragments = t.block_m // t.warps_m // 16
    values = fragments * 2 * (2 + config.head_dim_v // 8 * 2)  # WarpRows::VALUES in warp_rows.cuh
    return blocks * splits * t.warps_m * values * WARP_SIZE * 4, blocks * 4


def workspace(partial: int, arrivals: int) -> Workspace:
    """Memory of at least so many bytes for the next launch on the current stream."""
    if captures.is_active():
        return allocate(partial, arrivals)
    key = stream_key()
    with _lock:
        known = _areas.get(key)
        if known is not None and known.holds(partial, arrivals):
            _areas.move_to_end(key)
            return known
        area = _areas[key] = allocate(_grown(partial), _grown(arrivals))
        _areas.move_to_end(key)
        if len(_areas) > _MOST_AREAS:
            _areas.popitem(last=False)
    return area


def stream_key() -> tuple[int, int, int]:
    """What tells the current stream from others: its GPU, its handle and, maybe, its thread."""
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    # The default stream of each thread is another one under the same handle.
    thread = threading.get_ident() if stream == cupy.cuda.runtime.streamPerThread else 0
    return cupy.cuda.runtime.getDevice(), stream, thread


def _grown(size: int) -> int:
    return 1 << max(12, (size - 1).bit_length())


def allocate(partial: int, arrivals: int) -> Workspace:
    """Memory of so many bytes, for the caller alone; ready on the current stream."""
    import cupy

    if not captures.is_active():
        return Workspace(cupy.empty(partial, cupy.uint8), cupy.zeros(arrivals, cupy.uint8))
    with captures.beside():  # or the graph would zero the counters in every replay
        return Workspace(cupy.empty(partial, cupy.uint8), cupy.zeros(arrivals, cupy.uint8))
