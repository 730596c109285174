"""From a configured kernel and arrays to launches: grid, block, shared memory, parameters.

A ``GpuPlan`` is one problem bound to its arrays: ``launch()`` enqueues it, as often as wanted, and
allocates nothing. A kernel's configuration says what is its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.cuda.driver import OverlappingLaunch, can_overlap_launches, enter_context
from flashcore_cupy.cuda.targets import smem_limit
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import tensor_map
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.workspace import allocate, workspace
from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.parameters import fixed_params
from flashcore_cupy.select.plan import Launch, Params, Plan, copied
from flashcore_cupy.select.selector import Selection
from flashcore_cupy.select.units import round_up

if TYPE_CHECKING:
    import cupy

_REGISTERS = 65536  # of a multiprocessor
_DEFAULT_SMEM = 48 * 1024  # more than this has to be asked for, once per kernel


class Place(NamedTuple):
    """Where a kernel runs and what it is built from; keys whatever keeps loaded kernels."""

    device: int
    arch: str
    multiprocessors: int
    sources: str | None
    """The other folder of kernels that the environment asks for, if it does."""


@dataclass(frozen=True)
class LoadedKernel:
    """A compiled kernel on a device, ready to launch."""

    config: KernelConfig
    compiled: compiler.CompiledKernel
    entries: Mapping[str, cupy.cuda.Function]

    def blocks_per_multiprocessor(self, arch: str) -> int:
        """Thread blocks that registers and shared memory let run side by side."""
        registers = max(entry.registers for entry in self.compiled.entries.values())
        by_registers = _REGISTERS // (round_up(registers, 8) * self.config.threads)
        # 1 KiB of every block's shared memory is the system's.
        by_memory = (smem_limit(arch) + 1024) // (self.config.smem_bytes + 1024)
        return max(1, min(by_registers, by_memory))


@dataclass(frozen=True)
class Step:
    """One launch."""

    function: int
    """The driver's handle."""
    grid: int
    block: int
    smem_bytes: int
    params: ParameterBlock
    overlapping: OverlappingLaunch | None = None
    """How it is launched, if it may begin before the launch before it has ended."""

    def launch(self, stream: int) -> None:
        """Enqueue on a stream, by its handle; returns without waiting."""
        import cupy

        if self.overlapping is not None:
            self.overlapping(stream, self.params.address)
            return
        cupy.cuda.driver.launchKernel(
            *(self.function, self.grid, 1, 1, self.block, 1, 1, self.smem_bytes, stream),
            *(self.params.address, 0),
        )


def launch_steps(steps: tuple[Step, ...], arrays: dict[str, Any]) -> None:
    """Enqueue launches on the current stream; a graph that it is captured into keeps the arrays."""
    import cupy

    enter_context()
    stream = cupy.cuda.get_current_stream().ptr
    for step in steps:
        step.launch(stream)
    if captures.is_capturing(stream) and not captures.is_active():
        captures.keep(stream, arrays)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A problem and its kernels, without any arrays."""

    problem: AttentionProblem
    selection: Selection
    kernels: tuple[LoadedKernel, ...]
    """In launch order."""
    params: np.ndarray[Any, Any]
    """``AttentionParams``, or what begins with them, with all addresses 0."""
    output: Operand
    multiprocessors: int


@dataclass
class GpuPlan(Plan):
    """A plan of CuPy arrays. Keeps every array that a launch touches alive."""

    kernels: tuple[LoadedKernel, ...] = ()
    prepared_launches: tuple[Launch, ...] = ()
    steps: tuple[Step, ...] = ()
    workspace_bytes: tuple[int, int] = (0, 0)
    """Of split_partials and counters, if the arrays have those."""
    params: Params | None = None
    """What the last kernel takes, without addresses."""
    blocks: int = 0
    """Thread blocks of the last launch."""

    @property
    def compiled(self) -> tuple[compiler.CompiledKernel, ...]:
        """What was built, in launch order."""
        return tuple(kernel.compiled for kernel in self.kernels)

    def launch(self) -> None:
        """Enqueue on the current stream; returns without waiting.

        A graph that the stream is captured into keeps the arrays, too.
        """
        launch_steps(self.steps, self.arrays)

    def launches_at(self, addresses: Mapping[str, int]) -> list[Launch]:
        """All launches, if the arrays of these names lie there."""
        assert self.params is not None
        count = sum(name.startswith("mod_args[") for name in addresses)
        mod_args = [addresses[f"mod_args[{index}]"] for index in range(count)]
        launches = self.launches(copied(self.params), addresses, mod_args, self.blocks)
        return [launch._replace(params=copied(launch.params)) for launch in launches]

    @property
    def array_module(self) -> Any:
        """CuPy."""
        import cupy

        return cupy


def prepare(
    problem: AttentionProblem, selection: Selection, o_operand: Operand, place: Place
) -> Prepared:
    """Build the kernel if need be, load it, and pack what the problem fixes of its parameters.

    ``o_operand`` describes the output; ``place`` names the current device.
    """
    problem = selection.seen(problem)
    selection = selection.stored_to(problem, o_operand)
    kernels = tuple(load_kernel(config, place) for config in selection.configs)
    params = _fixed_params(problem, kernels[-1], o_operand, place)
    return Prepared(problem, selection, kernels, params, o_operand, place.multiprocessors)


def make_plan(
    prepared: Prepared,
    arrays: Mapping[str, Any],
    mod_args: Sequence[Any] = (),
    *,
    rng_key: int = 0,
    want_lse: bool,
    own_workspace: bool = True,
) -> GpuPlan:
    """Bind a prepared problem to its arrays, and allocate what the kernel needs beside them.

    ``arrays``: q, k, v, o and those of the rules, by their names in ``AttentionParams``;
    ``mod_args``: the mods'. ``rng_key``: ``Call.rng_key``. ``own_workspace``: for a plan
    that is launched more than once, on whatever stream.
    """
    import cupy

    plan = GpuPlan(
        prepared.problem, prepared.selection, prepared.output, {**arrays}, prepared.kernels
    )
    plan.add_results(want_lse=want_lse, empty=cupy.empty)
    if plan.is_empty:
        return plan
    plan.add_scratch(cupy.empty)
    params = copied(prepared.params)
    params["rng_key"] = rng_key
    for name, words in tensor_map.maps_of(plan.views, plan.arrays).items():
        params[f"{name}_map"] = words
    work = plan.work(params, prepared.multiprocessors)
    plan.workspace_bytes = work.partials_bytes, work.counters_bytes
    if any(plan.workspace_bytes):
        area = (allocate if own_workspace else workspace)(*plan.workspace_bytes)
        plan.arrays["split_partials"] = area.partials_array
        plan.arrays["counters"] = area.counter_array
    plan.arrays |= {f"mod_args[{index}]": array for index, array in enumerate(mod_args)}
    plan.params, plan.blocks = params, work.blocks
    launches = plan.launches_at({name: array.data.ptr for name, array in plan.arrays.items()})
    plan.prepared_launches = tuple(launches)
    plan.steps = tuple(step_of(plan.kernels[launch.number], launch) for launch in launches)
    return plan


@functools.cache
def load_kernel(config: KernelConfig, place: Place) -> LoadedKernel:
    """Compile (or fetch) and load a kernel; once per configuration and place."""
    compiled = compiler.compile_kernel(config.source, config.defines(), place.arch, config.headers)
    module = compiler.load(compiled)
    entries = {name: module.get_function(name) for name in compiled.entries}
    if config.smem_bytes > _DEFAULT_SMEM:
        for entry in entries.values():
            compiler.allow_shared_memory(entry, config.smem_bytes)
    return LoadedKernel(config, compiled, entries)


def _fixed_params(
    problem: AttentionProblem, kernel: LoadedKernel, o_operand: Operand, place: Place
) -> np.ndarray[Any, Any]:
    resident = _resident(kernel, place)
    return fixed_params(problem, kernel.config, o_operand, resident, place.multiprocessors)


def _resident(kernel: LoadedKernel, place: Place) -> int:
    """Thread blocks that run side by side on the whole GPU."""
    return place.multiprocessors * kernel.blocks_per_multiprocessor(place.arch)


def step_of(kernel: LoadedKernel, launch: Launch) -> Step:
    """Make a launch of a loaded kernel ready."""
    config, function = kernel.config, kernel.entries[launch.entry].ptr
    geometry = (function, launch.grid, config.threads, config.smem_bytes)
    overlapping = None
    if config.overlaps_launches and can_overlap_launches():
        overlapping = OverlappingLaunch(*geometry)
    return Step(*geometry, ParameterBlock(launch.params), overlapping)
