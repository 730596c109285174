"""Arrays of other libraries in, the caller's kind of array out, without a copy either way.

An array on a GPU becomes a CuPy array of the same memory, one on the host a NumPy array: through
DLPack (Python array API standard, ``__dlpack__``), else ``__cuda_array_interface__`` or
``__array_interface__``. Kinds that results are turned back into: torch, JAX and Numba; callers with
anything else get CuPy or NumPy arrays. Nothing is imported for that but CuPy, for a GPU's arrays.

What requires a gradient, or is traced, is not just its memory: ``tracing`` raises for it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from numbers import Number
from typing import Any, Literal

import ml_dtypes
import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.problem.attention_problem import check_dtype
from flashcore_cupy.problem.tracing import check_concrete

Kind = Literal[
    "numpy", "cupy", "torch", "jax", "numba", "other", "masked", "jax tracer", "torch proxy"
]

# What a class is called that makes its instances arrays of a kind; package first, name second.
_CLASSES: dict[tuple[str, str], Kind] = {
    ("numpy", "MaskedArray"): "masked",
    ("numpy", "ndarray"): "numpy",
    ("cupy", "ndarray"): "cupy",
    ("torch", "Tensor"): "torch",
    ("torch", "Proxy"): "torch proxy",
    ("jaxlib", "ArrayImpl"): "jax",
    ("jax", "Tracer"): "jax tracer",
    ("numba", "DeviceNDArrayBase"): "numba",
    ("numba_cuda", "DeviceNDArrayBase"): "numba",
}
# DLPack's device types (dlpack.h): kDLCPU and kDLCUDAHost; kDLCUDA and kDLCUDAManaged.
_HOST_TYPES, _GPU_TYPES = (1, 3), (2, 13)
_READ_ONLY, _COPIED = 1, 2  # DLPACK_FLAG_BITMASK_*
#: Most that a call's arrays have, as torch writes them.
_DTYPES = {
    f"torch.{dtype.name}": dtype
    for dtype in map(np.dtype, ("float16", ml_dtypes.bfloat16, "float32", "bool", "int32"))
}


def taken(name: str, x: Any) -> tuple[Any, Kind]:
    """An array as CuPy or NumPy has it, sharing its memory, and the kind that it came as.

    CuPy and NumPy arrays pass as they are. CuPy's current stream waits for what the producer has
    enqueued: enter device and stream before (``gpu_of`` tells which GPU). Raises ``TypeError`` for
    what is no array, lies on neither a CUDA GPU nor the host, or does not export its memory, and
    what ``check_concrete`` raises.
    """
    kind = _kind_of(x.__class__)
    if kind == "cupy" or kind == "numpy":
        return x, kind
    on_gpu = gpu_of(name, x) is not None
    try:
        if kind == "torch":
            return of_tensor(x), kind
        return (_gpu_view(x) if on_gpu else _host_view(x, kind)), kind
    except (BufferError, NotImplementedError, TypeError, ValueError) as error:
        raise _not_exported(name, x, error) from error
    except RuntimeError as error:  # on a GPU, what CUDA says is left alone
        if on_gpu:
            raise
        raise _not_exported(name, x, error) from error


def of_tensor(x: Any) -> Any:
    """A tensor's memory as CuPy or NumPy has it, for who knows that it is plain.

    Where no stream has to wait, DLPack is left out, which takes three times as long.
    """
    if x.is_cuda and (dtype := _DTYPES.get(str(x.dtype))) is not None:
        import cupy

        size, gpu = dtype.itemsize, x.device.index
        stream = sys.modules["torch"]._C._cuda_getCurrentRawStream(gpu)
        if stream == cupy.cuda.get_current_stream().ptr:
            memory = cupy.cuda.UnownedMemory(x.data_ptr(), x.numel() * size, x, gpu)
            strides = [n * size for n in x.stride()]
            return cupy.ndarray(x.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)
    x = x.detach() if x.requires_grad else x
    return _gpu_view(x) if x.is_cuda else _host_view(x, "torch")


def check_device(name: str, x: Any) -> None:
    """Raise ``ValueError`` for an array on another GPU than the current one, which is q's."""
    gpu = gpu_of(name, x)
    if gpu is None:
        return
    import cupy

    current = cupy.cuda.runtime.getDevice()
    if gpu != current:
        raise ValueError(
            f"{name}: on GPU {gpu}, but q is on GPU {current}; all arrays of a call share one"
        )


def taken_together(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, Kind]:
    """``taken`` for q, k and v, and the kind that a result gets: q's.

    On a GPU: with q's device current. Kinds may differ, but ``TypeError`` is raised where some are
    on a GPU and others on the CPU, and for a dtype that is none of attention's; ``ValueError``
    where they are on several GPUs.
    """
    if gpu_of("q", q) is not None:
        check_device("k", k)
        check_device("v", v)
    (q, kind), (k, kind_k), (v, kind_v) = taken("q", q), taken("k", k), taken("v", v)
    for name, x, own in (("q", q, kind), ("k", k, kind_k), ("v", v, kind_v)):
        check_dtype(name, x.dtype, own)
    on_host = isinstance(q, np.ndarray) + isinstance(k, np.ndarray) + isinstance(v, np.ndarray)
    if 0 < on_host < 3:
        host = [name for name, x in zip("qkv", (q, k, v), strict=True) if isinstance(x, np.ndarray)]
        raise TypeError(
            f"{', '.join(host)}: on the CPU while the others are on a GPU; move it there, as "
            f"cupy.asarray does, or the others to the CPU, as cupy.asnumpy does"
        )
    return q, k, v, kind


def in_autocast(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """q, k and v; where torch's autocast is on, in its dtype, as torch's own attention has them."""
    if _kind_of(q.__class__) != "torch":
        return q, k, v
    torch = sys.modules["torch"]
    dtype_of = getattr(torch, "get_autocast_dtype", None)  # since torch 2.4
    if dtype_of is None or not torch.is_autocast_enabled(where := q.device.type):
        return q, k, v
    dtype, own = dtype_of(where), (torch.float32, torch.float16, torch.bfloat16)
    given = [(x, _kind_of(x.__class__) == "torch" and x.dtype in own) for x in (q, k, v)]
    q, k, v = (x.to(dtype) if is_cast else x for x, is_cast in given)
    return q, k, v


def taken_out(out: Any, name: str = "out") -> tuple[Any, Kind]:
    """``taken`` for an array to be written; ``TypeError`` or ``ValueError`` if it must not be.

    What was written is the caller's only after ``returned(array, kind, out)``.
    """
    if _kind_of(out.__class__) == "jax":
        raise TypeError(
            f"{name}: got a JAX array, which is immutable; leave it out, use the result"
        )
    check_device(name, out)
    array, kind = taken(name, out)
    if kind in ("numpy", "cupy"):
        return array, kind
    flags = 0 if isinstance(array, np.ndarray) else _gpu_export_flags(out)
    if flags & _READ_ONLY or (isinstance(array, np.ndarray) and not array.flags.writeable):
        raise ValueError(
            f"{name}: this {type(out).__name__} exports its memory as read-only; "
            f"use an array of your own"
        )
    if flags & _COPIED:
        raise ValueError(f"{name}: this {type(out).__name__} exports a copy; use a CuPy array")
    return array, kind


def returned(array: Any, kind: Kind, out: Any = None) -> Any:
    """Our result as the caller's kind of array, sharing its memory but for JAX on the CPU.

    Call it with the stream current that the work was enqueued on: torch's current stream then
    waits for it, for JAX and Numba the host does. With ``out``, the caller's object that ``array``
    is a view of (``kind`` being its kind), just that is done and ``out`` itself returned.
    """
    convert = _CONVERTERS.get(kind)
    result = array if convert is None else convert(array)
    if out is None:
        return result
    if kind == "torch" and not out.is_inference():  # a backward pass that saved it has to know
        sys.modules["torch"].autograd.graph.increment_version(out)
    return out


def gpu_of(name: str, x: Any) -> int | None:
    """Number of the GPU that holds ``x``, None for the host; nothing is exported, no stream waits.

    Raises ``TypeError`` for what is no array or lies elsewhere, and what ``check_concrete`` raises.
    """
    kind = _kind_of(x.__class__)
    if kind == "cupy":
        return int(x.device.id)
    if kind == "numpy":
        return None
    check_concrete(name, x, kind)
    if isinstance(x, type):
        raise _no_array(name, x)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        try:
            device_type, number = (int(part) for part in x.__dlpack_device__())
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise _not_exported(name, x, error) from error
        if device_type in _HOST_TYPES:
            return None
        if device_type in _GPU_TYPES:
            return number
        raise TypeError(
            f"{name}: this {type(x).__name__} lies on a device of DLPack type {device_type}; "
            f"move it to a CUDA GPU or to the CPU"
        )
    if hasattr(x, "__cuda_array_interface__"):
        return int(_gpu_view(x).device.id)
    if hasattr(x, "__array_interface__"):
        return None
    raise _no_array(name, x)


def stream_of(x: Any) -> Any:
    """Torch's current stream, for a tensor of torch's where CuPy is on its default stream, or None.

    So that torch's own way of naming a stream, or of capturing one, holds for a call on tensors.
    """
    if _kind_of(x.__class__) != "torch":
        return None
    import cupy

    if cupy.cuda.get_current_stream().ptr:
        return None
    stream = sys.modules["torch"].cuda.current_stream(x.device)
    return stream if stream.cuda_stream else None


def plain_number(name: str, x: Any) -> Any:
    """Return the number that a 0-d array or a NumPy scalar holds; anything else as it is.

    One on a GPU is waited for.
    """
    if isinstance(x, int | float) or getattr(x, "ndim", None) != 0:
        return x
    kind = _kind_of(x.__class__)
    if kind not in ("numpy", "cupy"):
        check_concrete(name, x, kind)
    if captures.is_active() and kind != "numpy" and gpu_of(name, x) is not None:
        raise ValueError(
            f"{name}: a number on a GPU, which a captured call cannot wait for; pass float({name})"
        )
    try:
        value = x.item()
    except Exception as error:  # of another library, about one without a value
        raise TypeError(f"{name}: got {type(x).__name__} without a value: {error}") from error
    # NumPy has no Python number for some dtypes of others, such as float8.
    return float(value) if isinstance(value, np.generic) and value.dtype.kind == "V" else value


@functools.cache
def _kind_of(cls: Any) -> Kind:
    """By name, for the library need not be there; the first base class of a known kind decides."""
    for base in cls.__mro__:
        kind = _CLASSES.get((base.__module__.partition(".")[0], base.__name__))
        if kind is not None:
            return kind
    return "other"


def _gpu_view(x: Any) -> Any:
    import cupy

    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return cupy.from_dlpack(x)  # which hands CuPy's current stream to the producer
    return cupy.asarray(x)


def _host_view(x: Any, kind: Kind) -> Any:
    """A NumPy array of the same memory; NumPy's DLPack knows no bfloat16, so torch's own views."""
    if kind == "torch":
        torch = sys.modules["torch"]
        if x.dtype == torch.bfloat16:
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()
    if kind == "jax" or hasattr(x, "__array_interface__"):
        return np.asarray(x)
    return np.from_dlpack(x)


def _no_array(name: str, x: Any) -> TypeError:
    converts = isinstance(x, list | tuple | Number) or (
        hasattr(x, "__array__") and not isinstance(x, type)
    )
    hint = f", for example cupy.asarray({name}) or numpy.asarray({name})"
    return TypeError(
        f"{name}: got {type(x).__name__}; use a CuPy array (GPU) or a NumPy array (CPU), or one "
        f"with __dlpack__ or __cuda_array_interface__{hint if converts else ''}"
    )


def _not_exported(name: str, x: Any, error: Exception) -> TypeError:
    reason = str(error).partition("\n")[0]
    dtype = getattr(x, "dtype", None)
    what = type(x).__name__ if dtype is None else f"{type(x).__name__} of {dtype}"
    return TypeError(f"{name}: this {what} does not export its memory: {reason}")


class _VersionedTensor(ctypes.Structure):
    """The head of DLPack's ``DLManagedTensorVersioned``, as far as its flags."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


def _gpu_export_flags(x: Any) -> int:
    """DLPack's flags of an export from a GPU, which CuPy does not look at."""
    if not hasattr(x, "__dlpack__"):
        is_read_only = x.__cuda_array_interface__["data"][1]
        return _READ_ONLY if is_read_only else 0
    try:
        capsule = x.__dlpack__(stream=-1, max_version=(1, 0))  # -1: for a look, no stream waits
    except TypeError:
        return 0  # a producer from before DLPack 1.0, which had no flags
    tensor = _versioned(capsule)
    return 0 if tensor is None else int(tensor.flags)


def _versioned(capsule: Any) -> _VersionedTensor | None:
    """What a capsule holds, as long as that lives; None if it is older than DLPack 1.0."""
    api, name = ctypes.pythonapi, b"dltensor_versioned"
    arguments = (ctypes.py_object, ctypes.c_char_p)
    is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, *arguments)(("PyCapsule_IsValid", api))
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, *arguments)(("PyCapsule_GetPointer", api))
    if not is_valid(capsule, name):
        return None
    return _VersionedTensor.from_address(pointer(capsule, name))


def _as_torch(array: Any) -> Any:
    torch = sys.modules["torch"]
    if isinstance(array, np.ndarray) and array.dtype == ml_dtypes.bfloat16:
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def _as_jax(array: Any) -> Any:
    jax = sys.modules["jax"]
    if isinstance(array, np.ndarray):
        return jax.device_put(array, jax.local_devices(backend="cpu")[0])
    import cupy

    # JAX gives the memory of a deleted input to its next operation, not knowing of our stream.
    cupy.cuda.get_current_stream().synchronize()
    return jax.numpy.from_dlpack(array)


def _as_numba(array: Any) -> Any:
    return sys.modules["numba.cuda"].as_cuda_array(array)


_CONVERTERS: dict[Kind, Callable[[Any], Any]] = {
    "torch": _as_torch,
    "jax": _as_jax,
    "numba": _as_numba,
}
