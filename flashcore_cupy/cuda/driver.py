"""The driver's functions that CuPy lacks, as cuda-bindings has them."""

from __future__ import annotations

import functools
from typing import Any

_OVERLAPPING = 12030
"""The first driver, as CUDA counts, that captures overlapping launches into a graph."""
_MOST_STREAMS = 64


@functools.cache
def binding() -> Any:
    """The module ``cuda.bindings.driver``; ``RuntimeError`` where it is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RuntimeError(
            "wgmma_sm90, and calls inside a graph capture, ask the driver through cuda-bindings, "
            f"which cannot be imported ({error}): pip install 'cuda-bindings==12.*'; other kernels "
            "do without it"
        ) from None
    return driver


@functools.cache
def can_overlap_launches() -> bool:
    """Whether the driver lets launches overlap, in captured graphs, too."""
    import cupy

    return bool(cupy.cuda.runtime.driverGetVersion() >= _OVERLAPPING)


class OverlappingLaunch:
    """Launches a kernel that may begin before the one before it in the stream has ended.

    The kernel itself waits for that one, before it touches memory (``ptx/launches.cuh``; CUDA C++
    Programming Guide, "Programmatic Dependent Launch and Synchronization").
    """

    def __init__(self, function: int, grid: int, block: int, smem_bytes: int) -> None:
        driver = binding()
        self._launch = driver.cuLaunchKernelEx
        self._function = driver.CUfunction(function)
        self._geometry = (grid, block, smem_bytes)
        self._configs: dict[int, Any] = {}  # by stream; threads share them, so none is changed

    def __call__(self, stream: int, params: int) -> None:
        """Enqueue on a stream, by its handle; ``params``: the address of the parameters' list."""
        config = self._configs.get(stream)
        if config is None:
            config = self._config(stream)
        result = self._launch(config, self._function, params, 0)
        if result[0]:
            checked(result, "a launch")

    def _config(self, stream: int) -> Any:
        driver = binding()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX, config.sharedMemBytes = self._geometry
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.hStream = stream
        overlap = driver.CUlaunchAttribute()
        overlap.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        overlap.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [overlap], 1
        if len(self._configs) >= _MOST_STREAMS:
            self._configs.clear()
        self._configs[stream] = config
        return config


def checked(result: Any, what: str) -> tuple[Any, ...]:
    """What a function of the driver returns beside its code; ``RuntimeError`` for a bad code."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{what}: the driver answers {error!r}")
    return tuple(values)


def enter_context() -> None:
    """Have the driver see the device that the runtime sees.

    In a new thread it has no context until something asks the runtime for memory, say, and CuPy's
    pools may have enough.
    """
    from cupy.cuda import runtime

    runtime.setDevice(runtime.getDevice())
