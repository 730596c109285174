"""Gradients on NumPy arrays, by kernels that run on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cpu.emulator.memory import memory_of
from flashcore_cupy.cpu.emulator.plan import poisoned, tensor_map
from flashcore_cupy.cpu.emulator.run import DEFAULT_SCHEDULE, Grid, KernelError, Schedule, launch
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.gradients import BackwardCall, BackwardRequest
from flashcore_cupy.select import gates
from flashcore_cupy.select.backward import (
    arrays_of,
    backward_launches,
    backward_params,
    select_backward,
)
from flashcore_cupy.select.backward_plan import BackwardPlan
from flashcore_cupy.select.plan import Launch


@dataclass
class EmulatedBackward(BackwardPlan):
    """A backward pass bound to NumPy arrays."""

    arch: str = ""
    steps: tuple[Launch, ...] = ()
    inputs: frozenset[str] = frozenset()
    """Names of the arrays that kernels only read."""

    def build(self, *, checking: bool = False) -> None:
        """Compile what the launches run, where that is not in the cache."""
        for config in dict.fromkeys(step.config for step in self.steps):
            build.library(build.Source.of(config, self.arch), checking=checking)

    def launch(self, schedule: Schedule = DEFAULT_SCHEDULE, *, checking: bool = False) -> None:
        """Run the kernels; raises what ``EmulatedPlan.launch`` does."""
        results = {result.name for result in self.problem.results}
        defined = results if self.problem.accumulate else ()
        memory = memory_of(self.arrays, self.inputs, defined) if checking else ()
        for step in self.steps:
            config = step.config
            library = build.library(build.Source.of(config, self.arch), checking=checking)
            grid = Grid(step.grid, config.threads, config.smem_bytes)
            params = step.params.tobytes()
            launch(*(library, step.entry, params, grid, schedule), keep=self.arrays, memory=memory)
        for one in memory:
            missing = one.missing() if one.name in results else None
            if missing is not None:
                raise KernelError(f"{self.steps[-1].entry}: nobody has written {missing}")


def emulated_backward(
    operands: Mapping[str, Array], arch: str, *, out: Mapping[str, Array] | None = None, **rest: Any
) -> EmulatedBackward:
    """``plan_backward`` for a target and a kernel that the caller names.

    ``operands``: do, q, k, v, o, lse, and dlse if there is one. Results that ``out`` does not give
    start as NaN. Raises ``TypeError`` and ``ValueError`` as ``attention_backward`` does.
    """
    request = BackwardRequest.taken(rest | {"out": out})
    given = {"dlse": None, **operands}
    return bind(request.call(given, request.out, on_gpu=False, empty=poisoned), arch)


def bind(call: BackwardCall, arch: str) -> EmulatedBackward:
    """Bind a call on NumPy arrays to its kernels, as those are built for a target.

    Raises ``ValueError`` with the reason if the kernels cannot do the problem.
    """
    problem, forward = call.problem, call.forward
    selection = select_backward(problem, arch, kernel=forward.kernel, overrides=forward.config)
    arrays = arrays_of(call, np, boundaries=np.asarray)
    mods = {f"mod_args[{n}]": x for n, x in enumerate(forward.mod_args.values())}
    inputs = frozenset(arrays) | mods.keys()
    arrays |= {result.name: call.arrays[result.name] for result in problem.results}
    scratch = selection.scratch(problem.attention)
    arrays |= {n: poisoned(shape, np.dtype(np.float32)) for n, shape in scratch.items()}
    arrays |= gates.allocate_backward(problem, np)
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    params = backward_params(problem, selection)
    params["rng_key"] = forward.rng_key
    pointers = [x.ctypes.data for x in mods.values()]
    launches = backward_launches(
        problem, selection, params, addresses, pointers, lambda at, view: tensor_map(view, at)
    )
    return EmulatedBackward(problem, selection, arrays | mods, arch, tuple(launches), inputs)
