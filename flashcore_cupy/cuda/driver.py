"""The driver's functions that CuPy lacks, as cuda-bindings has them."""

from __future__ import annotations

import functools
from typing import Any


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
