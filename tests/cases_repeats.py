"""What repeated calls are tried with: a GPU that is none, arrays, lists of blocks."""

from __future__ import annotations

import functools
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
from noted_launches import Array, Driver, install

from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import (
    backward,
    backward_cache,
    bind,
    launch_cache,
    once,
    plan,
    ruled_cache,
)
from flashcore_cupy.launch.plan import LoadedKernel
from flashcore_cupy.problem.block_mask import BlockMask

B, H, S, T, D = 2, 4, 300, 400, 64
#: What the launch cache keeps of CuPy's.
OF_CUPY = (
    *("_ndarray", "_empty", "_float32", "_current_device", "_set_device", "_current_stream"),
    *("_is_captured", "_launch_kernel"),
)


@functools.cache
def loaded(config: Any, place: Any) -> LoadedKernel:
    """A kernel that nobody has built."""
    pointers = {n: SimpleNamespace(ptr=zlib.crc32(f"{n}{config}".encode())) for n in config.entries}
    compiled: Any = SimpleNamespace(entries={n: SimpleNamespace(registers=128) for n in pointers})
    return LoadedKernel(config, compiled, pointers)


def no_gpu(monkeypatch: pytest.MonkeyPatch, *, movable: bool) -> Driver:
    """``install``, with kernels that nobody has built, and nothing remembered."""
    driver = install(monkeypatch, movable=movable)
    driver.step = 64  # as parts of one allocation lie
    for module in (launch_cache, ruled_cache, backward_cache):
        monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(once, "_seen", set())
    for name in OF_CUPY:
        monkeypatch.setattr(launch_cache, name, None)
    for module in (plan, backward):
        monkeypatch.setattr(module, "load_kernel", loaded)
    monkeypatch.setattr(compiler, "device_arch", lambda device=None: "sm_90a")
    monkeypatch.setattr(bind, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(plan, "can_overlap_launches", lambda: False)
    return driver


class Arrays:
    """Arrays of one call; another start gives others."""

    def __init__(self, first: int) -> None:
        self.next = first

    def __call__(self, *shape: int, dtype: str = "float16", strides: Any = None) -> Array:
        self.next += 2**26 + 64
        return Array(shape, dtype, self.next, strides=strides)


def lists(new: Arrays, **rule: Any) -> BlockMask:
    rows, columns = -(-S // 128), -(-T // 128)
    shapes = (1, H, rows), (1, H, rows, columns)
    arrays = [new(*shape, dtype="int32") for shape in (*shapes, *shapes)]
    return BlockMask.from_lists(*arrays, seqlen_q=S, seqlen_kv=T, **rule)
