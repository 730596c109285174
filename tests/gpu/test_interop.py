"""Arrays of other libraries on a GPU: taken without a copy, in the order of their streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import three_arrays

import flashcore_cupy
from flashcore_cupy.problem import interop

DTYPES = ("float16", "bfloat16", "float32")


class CudaArrayInterface:
    """Speaks Numba's protocol, for a CuPy array."""

    def __init__(self, array: Any, read_only: bool = False) -> None:
        self.array = array
        self.__cuda_array_interface__ = dict(array.__cuda_array_interface__)
        self.__cuda_array_interface__["data"] = (array.data.ptr, read_only)


class GpuDLPack:
    """Speaks DLPack, for a CuPy array; writes down which stream was to wait."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.streams: list[object] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None, **kwargs: Any) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream, **kwargs)


def _gpu_arrays(dtype: str = "float16", shape: tuple[int, ...] = (1, 2, 64, 64)) -> list[Any]:
    import cupy

    return [cupy.asarray(x) for x in three_arrays(dtype, shape)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exporter", [CudaArrayInterface, GpuDLPack])
def test_gpu_exporters_share_memory(exporter: type, dtype: str) -> None:
    import cupy

    if exporter is CudaArrayInterface and dtype == "bfloat16":
        pytest.skip("__cuda_array_interface__ has no bfloat16")
    base = _gpu_arrays(dtype)[0]
    for x in (base, base.swapaxes(1, 2), base[:, ::-1, 1:7], base[:, :0]):
        got, kind = interop.taken("q", exporter(x))
        assert isinstance(got, cupy.ndarray) and got.dtype == x.dtype and kind == "other"
        assert got.shape == x.shape
        assert x.size == 0 or (got.data.ptr == x.data.ptr and got.strides == x.strides)
        assert interop.returned(got, kind) is got
        assert interop.gpu_of("q", exporter(base)) == base.device.id


@pytest.mark.parametrize("exporter", [CudaArrayInterface, GpuDLPack])
def test_attention_takes_gpu_exporters(exporter: type) -> None:
    import cupy

    q, k, v = _gpu_arrays()
    wanted = flashcore_cupy.attention(q, k, v)
    o = flashcore_cupy.attention(*map(exporter, (q, k, v)))
    assert isinstance(o, cupy.ndarray)
    cupy.testing.assert_array_equal(o.view("u2"), wanted.view("u2"))
    memory = cupy.empty_like(q)
    out = exporter(memory)
    assert flashcore_cupy.attention(q, k, v, out=out) is out
    cupy.testing.assert_array_equal(memory.view("u2"), wanted.view("u2"))


def test_the_producer_is_told_the_stream_that_the_kernel_runs_on() -> None:
    import cupy

    arrays = [GpuDLPack(x) for x in _gpu_arrays()]
    flashcore_cupy.attention(*arrays)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        flashcore_cupy.attention(*arrays)
    flashcore_cupy.attention(*arrays, stream=stream)
    stream.synchronize()
    for x in arrays:
        assert x.streams == [1, stream.ptr, stream.ptr]  # DLPack's 1 is CUDA's default stream


def test_a_read_only_out_on_a_gpu_is_an_error() -> None:
    x = _gpu_arrays()[0]
    assert interop.taken_out(CudaArrayInterface(x))[0].data.ptr == x.data.ptr
    assert interop.taken_out(GpuDLPack(x))[0].data.ptr == x.data.ptr
    with pytest.raises(ValueError, match=r"out: this CudaArrayInterface .* read-only"):
        interop.taken_out(CudaArrayInterface(x, read_only=True))

    class Frozen(GpuDLPack):
        def __dlpack__(self, **kwargs: Any) -> Any:
            capsule = super().__dlpack__(**kwargs)
            pointer = interop._versioned(capsule)
            assert pointer is not None
            pointer.flags |= interop._READ_ONLY
            return capsule

    with pytest.raises(ValueError, match="out: this Frozen exports its memory as read-only"):
        interop.taken_out(Frozen(x))


def _cuda_torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return torch


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_on_a_gpu(dtype: str) -> None:
    torch = _cuda_torch()
    import cupy

    arrays = _gpu_arrays(dtype)
    wanted, wanted_lse = flashcore_cupy.attention(*arrays, causal=True, return_lse=True)
    q, k, v = (torch.from_dlpack(x) for x in arrays)
    assert interop.taken("q", q)[0].data.ptr == q.data_ptr()
    with torch.no_grad():
        o, lse = flashcore_cupy.attention(q.requires_grad_(), k, v, causal=True, return_lse=True)
    assert o.is_cuda and o.dtype == q.dtype and not o.requires_grad
    bits = [cupy.from_dlpack(x).view(f"u{x.element_size()}") for x in (o, lse)]
    for got, expected in zip(bits, (wanted, wanted_lse), strict=True):
        cupy.testing.assert_array_equal(got, expected.view(got.dtype))
    q = q.detach()
    out = torch.empty_like(o)
    assert flashcore_cupy.attention(q, k, v, causal=True, out=out) is out
    assert torch.equal(out, o)
    assert flashcore_cupy.attention(q[:, :, :0], k, v).shape == (1, 2, 0, 64)
    mixed = flashcore_cupy.attention(arrays[0], k, v, causal=True)
    assert isinstance(mixed, cupy.ndarray)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_torch_streams_wait_for_each_other(in_place: bool, explicit: bool) -> None:
    """Inputs made, and the output read, on a torch stream that CUDA does not order by itself."""
    torch = _cuda_torch()
    if explicit and not hasattr(torch.cuda.Stream, "__cuda_stream__"):
        pytest.skip("the streams of this torch are for torch alone")
    shape = (1, 8, 1024, 64)
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    wanted = flashcore_cupy.attention(x, x, x) + 1
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(10):
        q = torch.full_like(x, torch.nan)
        out = torch.full_like(x, torch.nan) if in_place else None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # 10 ms in which nobody may look at q
            q.copy_(x)
            chosen = {"stream": stream} if explicit else {}
            o = flashcore_cupy.attention(q, q, q, out=out, **chosen)
            q.fill_(torch.nan)  # only once the kernel has read it
            got = o + 1
        stream.synchronize()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_on_a_gpu(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    try:
        gpu = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("this JAX sees no GPU")
    host = three_arrays(dtype, (1, 2, 64, 64))
    q, k, v = (jax.device_put(x, gpu) for x in host)
    assert interop.taken("q", q)[0].data.ptr == q.unsafe_buffer_pointer()
    o = flashcore_cupy.attention(q, k, v)
    assert isinstance(o, jax.Array) and o.devices() == {gpu} and o.dtype == q.dtype
    wanted = flashcore_cupy.attention(*_gpu_arrays(dtype)).get()
    np.testing.assert_array_equal(np.asarray(o), wanted)


def test_numba_on_a_gpu() -> None:
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("this Numba sees no GPU")
    host = three_arrays("float32", (1, 2, 64, 64))
    q, k, v = (cuda.to_device(x) for x in host)
    o = flashcore_cupy.attention(q, k, v)
    assert type(o) is type(q)
    wanted = flashcore_cupy.attention(*_gpu_arrays("float32")).get()
    np.testing.assert_array_equal(o.copy_to_host(), wanted)
    out = cuda.device_array_like(q)
    assert flashcore_cupy.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out.copy_to_host(), wanted)
