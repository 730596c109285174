"""Calls that are captured into a CUDA graph: where their memory comes from, and who keeps it.

A graph may run at any time after the call, on any stream, so all that a captured call allocates
belongs to the graph. While the call lasts, CuPy allocates through this module:

- The memory comes from the allocator that the caller has set, on a stream of our own that is not
  captured: a stream-ordered allocator would make it a node of the graph.
- The graph gets a user object (CUDA C++ Programming Guide, "CUDA User Objects") that stands for it.
  When the last of the graph and its executable copies is gone, the driver says so, and the next
  call gives the memory back.
- The thread's capture mode is relaxed meanwhile, for in others nothing may be allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from flashcore_cupy.cuda.driver import binding, checked

_current = threading.local()
_kept: dict[int, list[Any]] = {}
"""What graphs own, by the number of their user object."""
_gone: deque[int] = deque()
"""User objects whose graph is gone."""
_numbers = itertools.count(1)


def is_capturing(stream: int) -> bool:
    """Whether a stream, by its handle, is being captured. The legacy one, 0 or 1, never is."""
    import cupy

    return stream > 1 and bool(cupy.cuda.runtime.streamIsCapturing(stream))


def is_active() -> bool:
    """Whether this thread is inside a captured call."""
    return getattr(_current, "memory", None) is not None


@contextlib.contextmanager
def captured_call() -> Iterator[None]:
    """Around a call: if the current stream is captured, the graph owns what the call allocates."""
    import cupy

    give_back()
    stream = cupy.cuda.get_current_stream().ptr
    if is_active() or not is_capturing(stream):
        yield
        return
    memory: list[Any] = []
    allocate = cupy.cuda.get_allocator()

    def outside(size: int) -> Any:
        with beside():
            memory.append(allocate(size))
        return memory[-1]

    with _relaxed():
        _current.memory = memory
        try:
            with cupy.cuda.using_allocator(outside):
                yield
            if memory:
                keep(stream, memory)
        finally:
            _current.memory = None


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """A stream that is not captured, current; what was enqueued on it is done at the end."""
    import cupy

    stream = _stream_beside(cupy.cuda.runtime.getDevice())
    with stream:
        yield
    stream.synchronize()


def on_gpu(values: Any) -> Any:
    """Copy a NumPy array to the current GPU; a capture finds it there, and gets no copy."""
    import cupy

    if not is_active():
        return cupy.asarray(values)
    with beside():
        return cupy.asarray(values)


def keep(stream: int, objects: Any) -> None:
    """Have the graph that a stream is captured into own objects: they live as long as it does."""
    driver = binding()
    with _relaxed():
        graph = checked(driver.cuStreamGetCaptureInfo(stream), "the capture")[2]
        number = next(_numbers)
        _kept[number] = objects
        destructor = driver.CUhostFn(ctypes.cast(_is_gone, ctypes.c_void_p).value)
        (token,) = checked(
            driver.cuUserObjectCreate(
                number, destructor, 1, driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
            ),
            "a user object",
        )
        move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
        checked(driver.cuGraphRetainUserObject(graph, token, 1, move), "the graph")


def give_back() -> None:
    """Free what graphs that are gone have owned.

    As it was allocated: beside whatever is being captured, be it in this thread or in another.
    """
    if not _gone:
        return
    with _relaxed(), beside():
        while _gone:
            with contextlib.suppress(IndexError):  # another thread was quicker
                _kept.pop(_gone.popleft(), None)


#: The driver calls it, in a thread where nothing of CUDA may be called.
_is_gone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_gone.append)


@contextlib.contextmanager
def _relaxed() -> Iterator[None]:
    """This thread may allocate although a stream is captured, whichever mode that began in."""
    driver = binding()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (before,) = checked(driver.cuThreadExchangeStreamCaptureMode(mode), "the capture mode")
    try:
        yield
    finally:
        checked(driver.cuThreadExchangeStreamCaptureMode(before), "the capture mode")


@functools.cache
def _stream_beside(device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)
