"""The caller's stream, and the GPU of a call, current while it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flashcore_cupy.cuda import captures
from flashcore_cupy.cuda.driver import binding, checked, enter_context
from flashcore_cupy.problem.values import shown

_DEFAULT_STREAMS = 2  # the handles 0, 1 and 2: default, legacy, per thread


@contextlib.contextmanager
def entered(gpu: int, stream: Any) -> Iterator[None]:
    """A GPU and the caller's stream, current."""
    import cupy

    with cupy.cuda.Device(gpu):
        enter_context()
        if stream is None:
            yield
            return
        with _taken_stream(stream, gpu):
            yield


def _taken_stream(stream: Any, gpu: int) -> Any:
    """A stream as CuPy has it; ``TypeError`` or ``ValueError`` for what is none of this GPU's."""
    import cupy

    own = getattr(stream, "device_index", None)  # torch's streams say it themselves
    if not isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream):
        handle = getattr(stream, "__cuda_stream__", None)
        if handle is None and not hasattr(stream, "cuda_stream"):  # torch's before 2.8
            raise TypeError(
                f"stream: got {shown(stream)}; use a CuPy stream or an object with __cuda_stream__"
            )
        from_external = getattr(cupy.cuda.Stream, "from_external", None)
        if handle is None or from_external is None:  # CuPy before 14.1
            stream = cupy.cuda.ExternalStream(handle()[1] if handle else stream.cuda_stream)
        else:
            stream = from_external(stream)
    own = _gpu_of_stream(stream) if own is None else own
    if own not in (None, gpu):
        raise ValueError(f"stream: of GPU {own}, but q is on GPU {gpu}; use a stream of that one")
    return stream


def _gpu_of_stream(stream: Any) -> int | None:
    """The GPU that a CuPy stream belongs to; None for default streams, which every GPU has."""
    if stream.ptr <= _DEFAULT_STREAMS:
        return None
    if stream.device_id >= 0:
        return int(stream.device_id)
    if captures.is_capturing(stream.ptr):  # which the question might end
        return None
    try:
        (gpu,) = checked(binding().cuStreamGetDevice(stream.ptr), "stream")
    except (AttributeError, RuntimeError):  # cuda-bindings or a driver before 12.8, or none
        return None
    return int(gpu)
