"""Arrays of other libraries: taken without a copy, results as the caller's kind.

The exporters here have one protocol each and nothing else.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import three_arrays

import flashcore_cupy
from flashcore_cupy.problem import interop

DTYPES = ("float16", "bfloat16", "float32")


class HostDLPack:
    """Speaks DLPack, for an array on the host."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)


class OldHostDLPack(HostDLPack):
    """The protocol as it was before DLPack 1.0, which could not say what may be written."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.array.__dlpack__()


class ArrayInterface:
    """Speaks NumPy's own protocol."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps the memory
        self.__array_interface__ = array.__array_interface__


class Elsewhere:
    """Says where it lies, and would not export anything."""

    def __init__(self, device: tuple[int, int]) -> None:
        self.device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **kwargs: Any) -> Any:
        raise AssertionError("nobody asks a device that cannot serve")


def _same_memory(x: np.ndarray, y: np.ndarray) -> bool:
    return x.ctypes.data == y.ctypes.data and x.shape == y.shape and x.strides == y.strides


def test_numpy_arrays_pass_as_they_are() -> None:
    x = three_arrays()[0]
    mapped = np.frombuffer(mmap.mmap(-1, 64), np.float16)
    for array in (x, x[:, ::2, ::-1], mapped, x.view(type("Mine", (np.ndarray,), {}))):
        got, kind = interop.taken("q", array)
        assert got is array and kind == "numpy"
        assert interop.returned(array, kind) is array
        assert interop.gpu_of("q", array) is None
        assert interop.taken_out(array)[0] is array


def test_cupy_arrays_pass_as_they_are_without_importing_cupy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only CuPy, with a GPU, knows which one is current.
    monkeypatch.setattr(interop, "check_device", lambda name, x: None)
    cls = type("ndarray", (), {"__module__": "cupy"})
    for array in (cls(), type("mine", (cls,), {"__module__": "elsewhere"})()):
        got, kind = interop.taken("q", array)
        assert got is array and kind == "cupy"
        assert interop.returned(array, kind) is array
        assert interop.taken_out(array)[0] is array


def test_hosts_do_not_import_cupy() -> None:
    lines = (
        "import sys, numpy",
        "from flashcore_cupy.problem import interop",
        "x = numpy.zeros(4)",
        "interop.taken('q', x)",
        "class Fake: __array_interface__ = x.__array_interface__",
        "interop.returned(*interop.taken('q', Fake()))",
        "assert not {'cupy', 'torch', 'jax', 'numba'} & set(sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)


@pytest.mark.parametrize("exporter", [HostDLPack, OldHostDLPack, ArrayInterface])
def test_host_exporters_share_memory(exporter: type) -> None:
    base = three_arrays()[0]
    for x in (base, base[:, ::-1, 1:7, ::2], base[:, :0]):
        got, kind = interop.taken("q", exporter(x))
        assert isinstance(got, np.ndarray) and got.dtype == x.dtype and kind == "other"
        assert _same_memory(got, x) or x.size == 0
        assert got.shape == x.shape
        np.testing.assert_array_equal(got, x)
        assert interop.returned(got, kind) is got
        assert interop.gpu_of("q", exporter(x)) is None


@pytest.mark.parametrize("exporter", [HostDLPack, OldHostDLPack, ArrayInterface])
def test_attention_takes_host_exporters(exporter: type) -> None:
    q, k, v = three_arrays()
    o, lse = flashcore_cupy.attention(*map(exporter, (q, k, v)), causal=True, return_lse=True)
    wanted, wanted_lse = flashcore_cupy.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(o, np.ndarray)
    np.testing.assert_array_equal(o, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)


def test_out_of_a_host_exporter_is_written_in_place() -> None:
    q, k, v = three_arrays()
    memory = np.empty_like(q)
    out = ArrayInterface(memory)
    assert flashcore_cupy.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(memory, flashcore_cupy.attention(q, k, v))


@pytest.mark.parametrize(
    "x", [[1.0], (1.0,), 1.0, None, "q", b"q", {}, memoryview(b"q"), bytearray(4), object()]
)
def test_what_is_no_array_is_named(x: object) -> None:
    for call in (interop.taken, interop.gpu_of):
        with pytest.raises(TypeError) as caught:
            call("k", x)
        assert f"k: got {type(x).__name__}; use a CuPy array" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_gpus_are_told_from_other_devices() -> None:
    assert interop.gpu_of("q", Elsewhere((2, 3))) == 3
    assert interop.gpu_of("q", Elsewhere((13, 0))) == 0
    assert interop.gpu_of("q", Elsewhere((3, 0))) is None
    for call in (interop.taken, interop.gpu_of):
        with pytest.raises(TypeError, match="q: this Elsewhere lies on a device of DLPack type 8"):
            call("q", Elsewhere((8, 0)))


def test_what_does_not_export_says_why() -> None:
    class Refuses(HostDLPack):
        def __dlpack__(self, **kwargs: Any) -> Any:
            raise BufferError("the moon is full\nand more")

    class Nowhere(HostDLPack):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise ValueError("nowhere to be found")

    x = three_arrays()[0]
    with pytest.raises(TypeError, match=r"v: this Refuses does not export .*: the moon is full$"):
        interop.taken("v", Refuses(x))
    with pytest.raises(TypeError, match="v: this Nowhere does not export its memory: nowhere"):
        interop.taken("v", Nowhere(x))


def test_a_read_only_out_is_an_error() -> None:
    x = three_arrays()[0]
    frozen = x.copy()
    frozen.flags.writeable = False
    outs = [ArrayInterface(frozen), OldHostDLPack(x)]
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":  # its DLPack says what is read-only
        assert interop.taken_out(HostDLPack(x))[0].flags.writeable
        outs.append(HostDLPack(frozen))
    for out in outs:
        with pytest.raises(ValueError, match=f"out: this {type(out).__name__} exports .*read-only"):
            interop.taken_out(out)


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="needs a NumPy that exports DLPack 1.0"
)
def test_flags_of_an_export_are_read() -> None:
    x = three_arrays()[0]
    assert interop._versioned(x.__dlpack__()) is None  # the capsule of before 1.0

    def flags(**how: Any) -> int:
        capsule = x.__dlpack__(max_version=(1, 0), **how)
        tensor = interop._versioned(capsule)
        assert tensor is not None and tensor.major == 1
        return tensor.flags

    assert flags() == 0
    assert flags(copy=True) == interop._COPIED
    x.flags.writeable = False
    assert flags() == interop._READ_ONLY


def test_the_kind_of_the_result_is_that_of_q() -> None:
    q, k, v = three_arrays()
    views = interop.taken_together(q, HostDLPack(k), ArrayInterface(v))
    assert views[3] == "numpy" and all(isinstance(x, np.ndarray) for x in views[:3])
    assert interop.taken_together(HostDLPack(q), k, v)[3] == "other"


def test_gpu_and_cpu_do_not_mix() -> None:
    q, k, v = three_arrays()
    members = {"__module__": "cupy", "dtype": np.dtype("f2"), "device": SimpleNamespace(id=0)}
    on_gpu = type("ndarray", (), members)()
    for arrays, named in (((on_gpu, k, v), "k, v:"), ((q, on_gpu, on_gpu), "q:")):
        with pytest.raises(TypeError, match=f"^{named} on the CPU while the others are on a GPU"):
            interop.taken_together(*arrays)


def test_kinds_go_by_class_names() -> None:
    """Numba's managed memory is a NumPy array, too: it runs where the rest of Numba's does."""
    array = type("DeviceNDArrayBase", (), {"__module__": "numba.cuda.cudadrv.devicearray"})
    managed = type("ManagedNDArray", (array, np.ndarray), {})
    assert interop._kind_of(array) == interop._kind_of(managed) == "numba"
    assert interop._kind_of(np.float32) == interop._kind_of(list) == "other"
    assert interop._kind_of(type("Tensor", (), {"__module__": "torchlike"})) == "other"


def test_numba_is_asked_for_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = type(sys)("numba.cuda")
    fake.as_cuda_array = lambda array: ("numba", array)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "numba.cuda", fake)
    assert interop.returned(1, "numba") == ("numba", 1)
    assert interop.returned(1, "numba", 2) == 2
