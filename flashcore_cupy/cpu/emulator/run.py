"""A problem on NumPy arrays, by a kernel that runs on the CPU."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore_cupy.cpu.emulator.build import library
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem, Operand
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.select import grids
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.parameters import fixed_params
from flashcore_cupy.select.tensor_view import View

_MULTIPROCESSORS = 16
_RESIDENT = 32  # thread blocks
_ALIGN = 64  # bytes, of a kernel's parameters
_MESSAGE = 20_000


@dataclass(frozen=True)
class Schedule:
    """In which order things happen that may happen in any."""

    seed: int = 0
    eager: int = 30
    """Of 100 looks of the scheduler, at how many a copy ends before anybody waits for it."""


class KernelError(RuntimeError):
    """What a kernel has done wrong: an access, a race, a deadlock."""


def run(
    problem: AttentionProblem,
    configs: Sequence[KernelConfig],
    output: Operand,
    arrays: dict[str, Array],
    mod_args: Sequence[Array] = (),
    *,
    arch: str,
    schedule: Schedule = Schedule(),
    checking: bool = False,
) -> None:
    """Run a selected kernel, all that it launches, on NumPy arrays, in place.

    ``arrays``: by their names in ``AttentionParams``: q, k, v, o, lse if it is wanted, those of the
    rules, those of the gate. Scratch and workspace are added to them. Raises ``KernelError``.
    """
    config = configs[-1]
    grids.check_sizes(problem, config)
    params = fixed_params(problem, config, output, _RESIDENT, _MULTIPROCESSORS)
    if problem.seqlen_q == 0 or (problem.batch == 0 and not problem.packed):
        return
    for name, (shape, dtype) in config.scratch(problem).items():
        own = arrays["q"].dtype if dtype == problem.dtype else np.dtype(dtype)
        poison = bytearray(b"\xff" * (math.prod(shape) * own.itemsize))
        arrays[name] = np.frombuffer(poison, own).reshape(shape)
    given = set(params.dtype.names or ())
    for name, array in arrays.items():
        if name in given:
            params[name] = array.ctypes.data
    for index, array in enumerate(mod_args):
        params["mod_args"][index] = array.ctypes.data
    for view in config.views(problem, output):
        params[f"{view.name}_map"] = _tensor_map(view, arrays[view.name].ctypes.data)
    blocks = _give_workspace(problem, config, params, arrays)
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    for one in configs:
        struct = params if one is config else np.zeros((), one.params)
        one.bind(struct, problem, addresses)
        for entry, grid in zip(one.entries, one.grids(problem, blocks), strict=True):
            if grid:
                _launch(one, entry, struct, grid, arch, schedule, checking=checking)


def _give_workspace(
    problem: AttentionProblem,
    config: KernelConfig,
    params: np.ndarray[Any, Any],
    arrays: dict[str, Array],
) -> int:
    blocks, splits = grids.query_blocks(problem, config), int(params["splits"])
    most = config.most_blocks(_MULTIPROCESSORS)
    sizes = config.workspace_bytes(blocks, splits, most)
    if any(sizes):
        arrays["split_partial"] = np.full(sizes[0] + _ALIGN, 255, np.uint8)
        arrays["split_arrivals"] = np.zeros(sizes[1] + _ALIGN, np.uint8)
        for name in ("split_partial", "split_arrivals"):
            params[name] = arrays[name].ctypes.data
    return min(blocks * splits, most)


def _tensor_map(view: View, address: int) -> np.ndarray[Any, Any]:
    """A map as ``emulator``'s own ``ptx/tma.cuh`` reads it."""
    words = np.zeros(16, np.uint64)
    words[0] = address + view.offset
    words[1:5], words[5:8] = view.dims, view.strides
    words[8] = sum(size << 16 * d for d, size in enumerate((*view.box, 1)))
    words[9], words[10] = ITEMSIZE[view.dtype], view.swizzle
    return words


def _launch(
    config: KernelConfig,
    entry: str,
    params: np.ndarray[Any, Any],
    grid: int,
    arch: str,
    schedule: Schedule,
    *,
    checking: bool,
) -> None:
    text = params.tobytes()
    room = np.zeros(len(text) + _ALIGN, np.uint8)
    first = -room.ctypes.data % _ALIGN
    room[first : first + len(text)] = np.frombuffer(text, np.uint8)
    message = ctypes.create_string_buffer(_MESSAGE)
    function = getattr(library(config, arch, checking=checking), f"launch_{entry}")
    failed = function(
        ctypes.c_void_p(room.ctypes.data + first),
        *(grid, config.threads, config.smem_bytes, config.tile.cluster),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ctypes.c_uint64(schedule.seed),
        schedule.eager,
        message,
        _MESSAGE,
    )
    if failed:
        raise KernelError(f"{entry}: {message.value.decode(errors='replace')}")
