"""A problem on NumPy arrays, by a kernel that runs on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cpu.emulator.memory import memory_of
from flashcore_cupy.cpu.emulator.run import DEFAULT_SCHEDULE, Grid, KernelError, Schedule, launch
from flashcore_cupy.problem.array_spec import spec_of, usable
from flashcore_cupy.problem.attention_problem import ITEMSIZE, operand
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.request import Call, Request
from flashcore_cupy.select.parameters import fixed_params
from flashcore_cupy.select.plan import Launch, Params, Plan
from flashcore_cupy.select.selector import select
from flashcore_cupy.select.tensor_view import View

# Of the GPU that is emulated: so few that small problems have several waves of blocks, too.
_MULTIPROCESSORS = 16
_RESIDENT = 32  # thread blocks

# What a launch may read before it has written it: the workspace's counters, which are 0; and rows
# of P that no query has, for wmma_pv leaves out what it makes of them.
_DEFINED = ("counters", "scratch_probs")


@dataclass
class EmulatedPlan(Plan):
    """A plan of NumPy arrays. Arrays that the kernel allocates start as NaN."""

    arch: str = ""
    steps: tuple[Launch, ...] = ()
    inputs: frozenset[str] = frozenset()
    """Names of the arrays that a kernel only reads."""

    @property
    def array_module(self) -> Any:
        """NumPy."""
        return np

    def build(self, *, checking: bool = False) -> None:
        """Compile what the launches run, where that is not in the cache."""
        for config in dict.fromkeys(step.config for step in self.steps):
            build.library(build.Source.of(config, self.arch), checking=checking)

    def launch(self, schedule: Schedule = DEFAULT_SCHEDULE, *, checking: bool = False) -> None:
        """Run the kernel; compile it before, if need be.

        Raises ``KernelError`` for what it does wrong, ``jit.CompileError`` if it does not compile,
        ``RuntimeError`` without a C++ compiler.
        """
        memory = memory_of(self.arrays, self.inputs, _DEFINED) if checking else ()
        for step in self.steps:
            config = step.config
            library = build.library(build.Source.of(config, self.arch), checking=checking)
            grid = Grid(step.grid, config.threads, config.smem_bytes, config.tile.cluster)
            params = step.params.tobytes()
            launch(*(library, step.entry, params, grid, schedule), keep=self.arrays, memory=memory)
        results = {"lse"} if self.problem.gate in ("qk", "softmax") else {"o", "lse"}
        for one in memory:
            missing = one.missing() if one.name in results else None
            if self.steps and missing is not None:
                raise KernelError(f"{self.steps[-1].entry}: nobody has written {missing}")


def emulated_plan(
    q: Array,
    k: Array,
    v: Array,
    arch: str,
    *,
    out: Array | None = None,
    return_lse: bool = False,
    **arguments: Any,
) -> EmulatedPlan:
    """``plan`` for a target that the caller names; with kernel="auto" its fastest kernel.

    Raises ``TypeError`` and ``ValueError`` as ``attention`` does.
    """
    call = Request.of(arguments).call(q, k, v, out, on_gpu=False, in_kernel=True)
    return bind(call, arch, want_lse=return_lse)


def bind(
    call: Call, arch: str, *, want_lse: bool, multiprocessors: int = _MULTIPROCESSORS
) -> EmulatedPlan:
    """Bind a call on NumPy arrays to its kernel, as that is built for a target.

    ``multiprocessors``: how many the emulated GPU has. Raises ``ValueError`` with the reason if the
    kernel cannot do the problem.
    """
    selection = select(call.problem, arch, kernel=call.kernel, overrides=call.config)
    problem = selection.seen(call.problem)
    q, k, v = (usable(call.arrays[name], np) for name in "qkv")
    out = call.arrays.get("out")
    if out is None:
        out = poisoned(problem.output_shape, q.dtype)
    o = operand("o", spec_of(out), "packed" if problem.packed else problem.layout, out.ctypes.data)
    arrays = {"q": q, "k": k, "v": v, "o": out, **call.pointers(np, boundaries=np.asarray)}
    plan = EmulatedPlan(problem, selection.stored_to(problem, o), o, arrays, arch)
    plan.inputs = frozenset(arrays) - {"o"}
    plan.add_results(want_lse=want_lse, empty=poisoned)
    if not plan.is_empty:
        plan.add_scratch(poisoned)
        _add_steps(plan, tuple(call.mod_args.values()), call.rng_key, multiprocessors)
    return plan


def _add_steps(
    plan: EmulatedPlan, mod_args: tuple[Array, ...], rng_key: int, multiprocessors: int
) -> None:
    config = plan.selection.config
    params = fixed_params(plan.problem, config, plan.output, _RESIDENT, multiprocessors)
    params["rng_key"] = rng_key
    for view in plan.views:
        params[f"{view.name}_map"] = tensor_map(view, plan.arrays[view.name].ctypes.data)
    work = plan.work(params, multiprocessors)
    if work.partials_bytes or work.counters_bytes:
        plan.arrays["split_partials"] = poisoned((work.partials_bytes,), np.dtype(np.uint8))
        plan.arrays["counters"] = np.zeros(work.counters_bytes, np.uint8)
    mods = {f"mod_args[{index}]": array for index, array in enumerate(mod_args)}
    plan.arrays |= mods
    plan.inputs |= mods.keys()
    addresses = {name: array.ctypes.data for name, array in plan.arrays.items()}
    pointers = [array.ctypes.data for array in mod_args]
    plan.steps = tuple(plan.launches(params, addresses, pointers, work.blocks))


def poisoned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array of NaN, where its dtype has that; each bit is set."""
    return np.full(math.prod(shape) * dtype.itemsize, 255, np.uint8).view(dtype).reshape(shape)


def tensor_map(view: View, address: int) -> Params:
    """A map as ``emulator``'s own ``ptx/tma.cuh`` reads it."""
    words = np.zeros(16, np.uint64)
    words[0] = address + view.offset
    words[1:5], words[5:8] = view.dims, view.strides
    words[8] = sum(size << 16 * d for d, size in enumerate((*view.box, 1)))
    words[9], words[10] = ITEMSIZE[view.dtype], view.swizzle
    return words
