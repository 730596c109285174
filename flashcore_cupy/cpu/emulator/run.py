"""Launches on the CPU: a grid of thread blocks, thread by thread, in an order that a seed decides.

A launch runs on a thread of its own, while the caller waits, so that Ctrl-C is heard.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashcore_cupy.cpu.emulator.memory import Memory
from flashcore_cupy.jit.compiler import usable_cores

_MESSAGE = 20_000
_PATIENCE = 2.0  # seconds, for a launch to see that it is to stop
_running: dict[int, ctypes.c_int] = {}
"""What ends a launch, by its identity."""


@dataclass(frozen=True)
class Schedule:
    """In which order things happen that may happen in any."""

    seed: int = 0
    eager: int = 30
    """Of 100 looks of the scheduler, at how many a copy ends before anybody waits for it."""

    @classmethod
    def seeded(cls, seed: int) -> Schedule:
        """Copies that end at random, as late as they may, or at once: by turns."""
        return cls(seed, (30, 0, 100)[seed % 3])


DEFAULT_SCHEDULE = Schedule()


@dataclass(frozen=True)
class Grid:
    """How many thread blocks and threads a launch has, and the shared memory of a block."""

    blocks: int
    threads: int
    smem_bytes: int = 0
    cluster: int = 1


class KernelError(RuntimeError):
    """What a kernel has done wrong: an access, a race, a deadlock."""


class _Options(ctypes.Structure):
    """``Options`` of ``emulator/machine.hpp``."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("eager", ctypes.c_int),
        ("stop", ctypes.POINTER(ctypes.c_int)),
    )


class _Array(ctypes.Structure):
    """``Array`` of ``emulator/launch.hpp``."""

    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("is_writable", ctypes.c_int),
    )


class _Grid(ctypes.Structure):
    """``Grid`` of ``emulator/launch.hpp``."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("blocks", "threads", "smem_bytes", "cluster")),
        ("workers", ctypes.c_int),
        ("options", _Options),
        ("arrays", ctypes.POINTER(_Array)),
        ("array_count", ctypes.c_int),
    )


def launch(
    library: ctypes.CDLL,
    entry: str,
    params: bytes,
    grid: Grid,
    schedule: Schedule = DEFAULT_SCHEDULE,
    *,
    keep: Any = None,
    memory: Sequence[Memory] = (),
) -> None:
    """Run one kernel of a library.

    ``params``: its parameters as a GPU takes them, one after the other, each at a multiple of its
    alignment; ``keep``: what they point to. ``memory``: all that the kernel may touch, for a
    library that checks; without it accesses to global memory are not checked. Raises
    ``KernelError``.
    """
    function, stop = getattr(library, f"launch_{entry}"), ctypes.c_int(0)
    message = ctypes.create_string_buffer(_MESSAGE)
    options = _Options(schedule.seed, schedule.eager, ctypes.pointer(stop))
    sizes = grid.blocks, grid.threads, grid.smem_bytes, grid.cluster
    own = _Grid(*sizes, usable_cores(), options, _arrays(memory), len(memory))
    failed = []

    def run() -> None:
        failed.append(function(params, ctypes.byref(own), message, _MESSAGE))
        del kept[:]

    # As long as the kernel runs, even where nobody waits for it any more.
    kept = [keep, memory, stop, options]
    _running[id(stop)] = stop
    thread = threading.Thread(target=run, daemon=True)
    try:
        try:
            thread.start()
        except RuntimeError:  # no thread is to be had
            run()
        while thread.is_alive():
            thread.join()
    except BaseException:
        stop.value = 1
        if thread.is_alive():
            thread.join(_PATIENCE)
        raise
    finally:
        del _running[id(stop)]
    if failed[0]:
        raise KernelError(f"{entry}: {message.value.decode(errors='replace')}")


def _arrays(memory: Sequence[Memory]) -> ctypes.Array[_Array]:
    described = (
        _Array(m.begin, m.state.size, m.name.encode(), m.state.ctypes.data, m.is_writable)
        for m in memory
    )
    return (_Array * len(memory))(*described)


def stop_all() -> None:
    """End what other threads of this process have launched; there it raises ``KernelError``."""
    for stop in list(_running.values()):
        stop.value = 1
