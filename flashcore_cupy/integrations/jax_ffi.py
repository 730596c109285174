"""Handlers that XLA calls while it runs a program of JAX: Python functions, by ctypes.

XLA's foreign function interface hands a handler one struct: the arrays' addresses and shapes, and
the attributes of the call. Its layout is that of ``xla/ffi/api/c_api.h``, version 0.1, which XLA is
told when it asks. No compiler is needed.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import POINTER, c_char, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import jax
import ml_dtypes
import numpy as np

from flashcore_cupy.problem.stream import entered

#: A handler, in Python: attributes, arrays, and results to be written.
Compute = Callable[[dict[str, str], list[Any], list[Any]], None]

_VERSION = (0, 1)
_METADATA = 1  # XLA_FFI_Extension_Metadata
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL
#: By XLA_FFI_DataType.
_DTYPES = {
    1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.uint8, 7: np.uint16,
    8: np.uint32, 9: np.uint64, 10: np.float16, 11: np.float32, 12: np.float64,
    16: ml_dtypes.bfloat16,
}  # fmt: skip


#: What most structs begin with.
_HEAD = (("struct_size", c_size_t), ("extension", c_void_p))


class _Span(ctypes.Structure):
    _fields_ = (("start", c_void_p), ("length", c_size_t))


class _Buffer(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("count", c_int64),
        ("types", c_void_p),
        ("items", POINTER(POINTER(_Buffer))),
    )


class _Attributes(ctypes.Structure):
    """All of ours are strings."""

    _fields_ = (
        *_HEAD,
        ("count", c_int64),
        ("types", c_void_p),
        ("names", POINTER(POINTER(_Span))),
        ("items", POINTER(POINTER(_Span))),
    )


class _Version(ctypes.Structure):
    _fields_ = (*_HEAD, ("major", c_int), ("minor", c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    )


class _ErrorCreate(ctypes.Structure):
    _fields_ = (*_HEAD, ("message", ctypes.c_char_p), ("code", c_int))


class _StreamGet(ctypes.Structure):
    _fields_ = (*_HEAD, ("context", c_void_p), ("stream", c_void_p))


_CREATE_ERROR = ctypes.CFUNCTYPE(c_void_p, POINTER(_ErrorCreate))
_GET_STREAM = ctypes.CFUNCTYPE(c_void_p, POINTER(_StreamGet))


class _Api(ctypes.Structure):
    """As far as ours are: the others lie between."""

    _fields_ = (
        *_HEAD,
        ("version", _Version),
        ("internal", c_void_p),
        ("create_error", _CREATE_ERROR),
        ("others", c_void_p * 3),
        ("get_stream", _GET_STREAM),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int32),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_HANDLER = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
_handlers: list[Any] = []  # which XLA may call as long as the process lives


def register(name: str, compute: Compute) -> None:
    """Have XLA call ``compute`` for a target, on the CPU with NumPy arrays, on CUDA with CuPy's."""
    for platform, answer in (("cpu", _on_cpu), ("CUDA", _on_cuda)):
        handler = _HANDLER(_handler(compute, answer))
        _handlers.append(handler)
        address = ctypes.cast(handler, c_void_p).value
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform=platform)


def _handler(compute: Compute, answer: Callable[[Compute, _Frame], None]) -> Callable[[Any], Any]:
    def handle(pointer: Any) -> int | None:
        """Return None, or the address of an error: XLA knows of no exceptions."""
        frame = pointer.contents
        try:
            if not _told_version(frame):
                answer(compute, frame)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".encode()
            arguments = _ErrorCreate(ctypes.sizeof(_ErrorCreate), None, message, _INTERNAL)
            return frame.api.contents.create_error(arguments)  # type: ignore[no-any-return]
        return None

    return handle


def _told_version(frame: _Frame) -> bool:
    """Whether this is just the question which version a handler is for; that is answered."""
    if not frame.extension:
        return False
    extension = _Extension.from_address(frame.extension)
    if extension.type != _METADATA:
        return False
    metadata = extension.metadata.contents
    metadata.version.major, metadata.version.minor = _VERSION
    return True


def _on_cpu(compute: Compute, frame: _Frame) -> None:
    compute(
        _strings(frame.attributes),
        [_on_host(x) for x in _buffers(frame.arguments)],
        [_on_host(x) for x in _buffers(frame.results)],
    )


def _on_cuda(compute: Compute, frame: _Frame) -> None:
    stream = _StreamGet(ctypes.sizeof(_StreamGet), None, frame.context, None)
    frame.api.contents.get_stream(stream)
    arguments, results = (
        [_on_gpu(x) for x in _buffers(y)] for y in (frame.arguments, frame.results)
    )
    with entered(arguments[0].device.id, _Stream(stream.stream or 0)):
        compute(_strings(frame.attributes), arguments, results)


class _Stream:
    """XLA's stream, as ``entered`` takes it."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


def _buffers(buffers: _Buffers) -> list[_Buffer]:
    return [buffers.items[n].contents for n in range(buffers.count)]


def _strings(attributes: _Attributes) -> dict[str, str]:
    spans = (attributes.names, attributes.items)
    return dict(
        (_string(x[n].contents) for x in spans)  # type: ignore[misc]
        for n in range(attributes.count)
    )


def _string(span: _Span) -> str:
    return ctypes.string_at(span.start, span.length).decode()


def _form(buffer: _Buffer) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and bytes."""
    shape, dtype = tuple(buffer.dims[: buffer.rank]), np.dtype(_DTYPES[buffer.dtype])
    return shape, dtype, math.prod(shape) * dtype.itemsize


def _on_host(buffer: _Buffer) -> Any:
    shape, dtype, size = _form(buffer)
    if not size:
        return np.empty(shape, dtype)
    memory: Any = (c_char * size).from_address(buffer.data)
    return np.frombuffer(memory, dtype).reshape(shape)


def _on_gpu(buffer: _Buffer) -> Any:
    import cupy

    shape, dtype, size = _form(buffer)
    if not size:
        return cupy.empty(shape, dtype)
    memory = cupy.cuda.UnownedMemory(buffer.data, size, None)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))
