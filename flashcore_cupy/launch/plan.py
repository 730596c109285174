"""From a configured kernel and arrays to launches: grid, block, shared memory, parameters.

A ``Plan`` is one problem bound to its arrays: ``launch()`` enqueues it, as often as wanted, and
allocates nothing. A kernel's configuration says what is its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import tensor_map
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.workspace import allocate, workspace
from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand
from flashcore_cupy.select import gates, grids
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.parameters import fixed_params
from flashcore_cupy.select.selector import Selection, configs_of
from flashcore_cupy.select.targets import smem_limit
from flashcore_cupy.select.tensor_view import View
from flashcore_cupy.select.units import MAX_GRID, round_up

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

    def launch(self, stream: int) -> None:
        """Enqueue on a stream, by its handle; returns without waiting."""
        import cupy

        cupy.cuda.driver.launchKernel(
            *(self.function, self.grid, 1, 1, self.block, 1, 1, self.smem_bytes, stream),
            *(self.params.address, 0),
        )


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
class Plan:
    """A problem, its kernel and its arrays. Keeps every array that a launch touches alive."""

    problem: AttentionProblem
    selection: Selection
    kernels: tuple[LoadedKernel, ...]
    output: Operand
    steps: tuple[Step, ...]
    arrays: dict[str, Any] = field(default_factory=dict)
    """q, k, v, the output "o" in its own layout, "lse" or the gate's arrays, those of the rules,
    scratch, and "split", the ``Workspace`` of split keys."""
    workspace_bytes: tuple[int, int] = (0, 0)
    """Of the partial results and the counters in arrays["split"], if there is that."""

    @property
    def compiled(self) -> tuple[compiler.CompiledKernel, ...]:
        """What was built, in launch order."""
        return tuple(kernel.compiled for kernel in self.kernels)

    @property
    def views(self) -> tuple[View, ...]:
        """How the kernel's tensor maps see its arrays; empty if it has none."""
        return self.selection.config.views(self.problem, self.output)

    def launch(self) -> None:
        """Enqueue on the current stream; returns without waiting.

        A graph that the stream is captured into keeps the arrays, too.
        """
        import cupy

        stream = cupy.cuda.get_current_stream().ptr
        for step in self.steps:
            step.launch(stream)
        if captures.is_capturing(stream) and not captures.is_active():
            captures.keep(stream, self.arrays)

    def gate_output(self) -> Any:
        """What the gate stopped at, fp32 (B, Hq, Sq, Skv): scores, or normalised probabilities."""
        import cupy

        return gates.output(self.problem, self.selection.config, self.arrays, cupy)


def prepare(
    problem: AttentionProblem, selection: Selection, o_operand: Operand, place: Place
) -> Prepared:
    """Build the kernel if need be, load it, and pack what the problem fixes of its parameters.

    ``o_operand`` describes the output; ``place`` names the current device.
    """
    grids.check_sizes(problem, selection.config)
    selection = replace(selection, config=selection.config.stored_to(o_operand))
    kernels = tuple(load_kernel(config, place) for config in configs_of(selection))
    params = _fixed_params(problem, kernels[-1], o_operand, place)
    return Prepared(problem, selection, kernels, params, o_operand, place.multiprocessors)


def make_plan(
    prepared: Prepared,
    q: cupy.ndarray,
    k: cupy.ndarray,
    v: cupy.ndarray,
    o: cupy.ndarray,
    *,
    want_lse: bool,
    extras: Mapping[str, Any] | None = None,
    mod_args: Sequence[Any] = (),
    own_workspace: bool = True,
) -> Plan:
    """Bind a prepared problem to its arrays, and allocate what the kernel needs beside them.

    ``extras``: the rules' arrays by their names in ``AttentionParams``; ``mod_args``: the mods'.
    ``own_workspace``: for a plan that is launched more than once, on whatever stream.
    """
    import cupy

    problem = prepared.problem
    arrays = {"q": q, "k": k, "v": v, "o": o}
    plan = Plan(problem, prepared.selection, prepared.kernels, prepared.output, (), arrays)
    params = prepared.params.copy()
    for name in "qkvo":
        params[name] = plan.arrays[name].data.ptr
    for name, array in (extras or {}).items():
        plan.arrays[name] = array
        params[name] = array.data.ptr
    for index, array in enumerate(mod_args):
        plan.arrays[f"mod_args[{index}]"] = array
        params["mod_args"][index] = array.data.ptr
    if want_lse:
        plan.arrays["lse"] = cupy.empty(problem.lse_shape, cupy.float32)
        params["lse"] = plan.arrays["lse"].data.ptr
    for name, array in gates.allocate(problem, prepared.selection.config, cupy).items():
        plan.arrays[name] = array
        params[name] = array.data.ptr
    if problem.seqlen_q == 0 or (problem.batch == 0 and not problem.packed):
        return plan  # rows of a packed batch without sequences are zeros, too
    _add_scratch(plan)
    for name, words in tensor_map.maps_of(plan.views, plan.arrays).items():
        params[f"{name}_map"] = words
    blocks = _give_workspace(plan, params, prepared.multiprocessors, own=own_workspace)
    for kernel in plan.kernels[:-1]:
        _add_steps(plan, kernel, np.zeros((), kernel.config.params), blocks)
    _add_steps(plan, plan.kernels[-1], params, blocks)
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


def _add_scratch(plan: Plan) -> None:
    """Allocate what the launches leave for each other."""
    import cupy

    like_q = plan.problem.dtype, plan.arrays["q"].dtype  # NumPy may not know bfloat16 by its name
    for name, (shape, dtype) in plan.selection.config.scratch(plan.problem).items():
        plan.arrays[name] = cupy.empty(shape, like_q[1] if dtype == like_q[0] else dtype)


def _give_workspace(
    plan: Plan, params: np.ndarray[Any, Any], multiprocessors: int, *, own: bool
) -> int:
    """Allocate what the parts of split rows leave for each other; return the thread blocks.

    There is one per row of tiles and part, or as many as the kernel takes at most: then they take
    work from a counter, which is 0 between launches.
    """
    config = plan.selection.config
    blocks, splits = grids.query_blocks(plan.problem, config), int(params["splits"])
    most = config.most_blocks(multiprocessors)
    plan.workspace_bytes = config.workspace_bytes(blocks, splits, most)
    if any(plan.workspace_bytes):
        area = (allocate if own else workspace)(*plan.workspace_bytes)
        params["split_partial"], params["split_arrivals"] = area.partial, area.arrivals
        plan.arrays["split"] = area
    return min(blocks * splits, most)


def _add_steps(plan: Plan, kernel: LoadedKernel, params: np.ndarray[Any, Any], blocks: int) -> None:
    """Add the launches of a kernel, the last of which takes so many thread blocks."""
    config = kernel.config
    arrays = {name: x for name, x in plan.arrays.items() if name != "split"}
    config.bind(params, plan.problem, {name: x.data.ptr for name, x in arrays.items()})
    grid = config.grids(plan.problem, blocks)
    plan.steps += tuple(
        _step(kernel, entry, n, params) for entry, n in zip(config.entries, grid, strict=True) if n
    )


def _fixed_params(
    problem: AttentionProblem, kernel: LoadedKernel, o_operand: Operand, place: Place
) -> np.ndarray[Any, Any]:
    resident = _resident(kernel, place)
    return fixed_params(problem, kernel.config, o_operand, resident, place.multiprocessors)


def _resident(kernel: LoadedKernel, place: Place) -> int:
    """Thread blocks that run side by side on the whole GPU."""
    return place.multiprocessors * kernel.blocks_per_multiprocessor(place.arch)


def _step(kernel: LoadedKernel, entry: str, grid: int, params: np.ndarray[Any, Any]) -> Step:
    if grid > MAX_GRID:
        raise ValueError(f"q: needs {grid} thread blocks, a launch has at most 2**31 - 1")
    config = kernel.config
    function = kernel.entries[entry].ptr
    return Step(function, grid, config.threads, config.smem_bytes, ParameterBlock(params))
