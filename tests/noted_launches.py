"""A GPU that is none: it hands out addresses, and notes what is launched."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from flashcore_cupy.launch import tensor_map
from flashcore_cupy.launch.parameter_block import ParameterBlock


class Data(NamedTuple):
    ptr: int
    device_id: int = 0


class Array:
    """A CuPy array, as far as a launch looks at it."""

    def __init__(
        self, shape: Any, dtype: Any = "float16", ptr: int = 0, device: int = 0, strides: Any = None
    ) -> None:
        self.shape = shape if isinstance(shape, tuple) else (shape,)
        self.dtype, self.data = np.dtype(dtype), Data(ptr, device)
        self.strides = strides or np.empty(shape, dtype).strides
        self._c_contiguous = strides is None
        self.flags = SimpleNamespace(c_contiguous=strides is None)
        self.size = int(np.prod(self.shape))

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, axes: tuple[None, ...]) -> Array:
        assert self._c_contiguous and set(axes) <= {None}
        return Array((1,) * len(axes) + self.shape, self.dtype, *self.data)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def view(self, dtype: Any) -> Array:
        return Array(self.shape, dtype, *self.data)

    def astype(self, dtype: Any, copy: bool = True) -> Array:
        assert self.dtype == dtype and not copy
        return self

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=self.data.device_id)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


Array.__module__, Array.__name__ = "cupy", "ndarray"  # by which its kind is told


class Device:
    def __init__(self, device: int = 0) -> None:
        self.id = device

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Launched(NamedTuple):
    geometry: tuple[Any, ...]
    """The function, the grid, the block, the shared memory."""
    stream: int
    contents: bytes
    """The parameters."""


class Driver:
    """What a call asks of CuPy: memory, and launches."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.made: list[Array] = []
        self.blocks: dict[int, ParameterBlock] = {}
        self.next, self.step, self.stream, self.captured, self.device = 2**40, 512, 7, False, 0
        self.devices_set: list[int] = []

    def empty(self, shape: Any, dtype: Any = "float64") -> Array:
        self.made.append(Array(shape, dtype, self.next))
        self.next += -(-self.made[-1].nbytes // self.step) * self.step or self.step
        return self.made[-1]

    def launch(self, *arguments: Any) -> None:
        *geometry, stream, address, extra = arguments
        assert extra == 0
        contents = self.blocks[address].words.tobytes()
        self.launches.append(Launched(tuple(geometry), stream, contents))


def _contiguous(x: Array) -> Array:
    assert x._c_contiguous
    return x


def install(monkeypatch: pytest.MonkeyPatch, *, movable: bool) -> Driver:
    """Take CuPy's place. ``movable``: whether tensor maps differ in their addresses alone."""
    driver = Driver()
    runtime = SimpleNamespace(
        getDevice=lambda: driver.device,
        setDevice=driver.devices_set.append,
        streamIsCapturing=lambda stream: driver.captured,
        streamPerThread=2,
    )
    cuda = SimpleNamespace(
        runtime=runtime,
        driver=SimpleNamespace(launchKernel=lambda *a: driver.launch(*a)),
        get_current_stream=lambda: SimpleNamespace(ptr=driver.stream),
        Device=Device,
    )
    fake = SimpleNamespace(
        ndarray=Array, empty=driver.empty, zeros=driver.empty, uint8=np.uint8, cuda=cuda,
        ascontiguousarray=_contiguous, dtype=np.dtype,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    for variable in ("FLASHCORE_KERNELS_DIR", "FLASHCORE_ARCH"):
        monkeypatch.delenv(variable, raising=False)

    def encode(address: int, view: Any) -> np.ndarray[Any, Any]:
        words = np.full(16, hash(view) % 2**32, np.uint64)
        words[0] = address + view.offset
        words[3] += np.uint64(0 if movable else address % 997)
        return words

    init = ParameterBlock.__init__

    def noted(self: ParameterBlock, params: Any) -> None:
        init(self, params)
        driver.blocks[self.address] = self

    monkeypatch.setattr(tensor_map, "encode", encode)
    monkeypatch.setattr(ParameterBlock, "__init__", noted)
    return driver
