"""From a configured kernel and arrays to launches: grid, block, shared memory, parameters.

A ``Plan`` is one problem bound to its arrays: ``launch()`` enqueues it, as often as wanted, and
allocates nothing. One function per kernel fills it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcore_cupy.cuda import captures
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import gates, tensor_map
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.workspace import allocate, split_bytes, workspace
from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand
from flashcore_cupy.problem.rules import Rules
from flashcore_cupy.select import grids, tma
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.params import QUANTIZE_PARAMS, params_of
from flashcore_cupy.select.selector import Selection, configs_of
from flashcore_cupy.select.targets import smem_limit
from flashcore_cupy.select.tile_checks import round_up

if TYPE_CHECKING:
    import cupy

_LOG2_E = math.log2(math.e)
_MAX_GRID = 2**31 - 1
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
    most_blocks: int = _MAX_GRID
    """Thread blocks of a launch; kernels that take more work than that hand it out themselves."""


@dataclass
class Plan:
    """A problem, its kernel and its arrays. Keeps every array that a launch touches alive."""

    problem: AttentionProblem
    selection: Selection
    kernels: tuple[LoadedKernel, ...]
    output: Operand
    steps: tuple[Step, ...]
    arrays: dict[str, Any] = field(default_factory=dict)
    """"o" (B, Hq, Sq, Dv) view of the output, "lse" or the gate's arrays, scratch."""

    @property
    def compiled(self) -> tuple[compiler.CompiledKernel, ...]:
        """What was built, in launch order."""
        return tuple(kernel.compiled for kernel in self.kernels)

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
        return gates.output(self.problem, self.selection.config, self.arrays)


def prepare(
    problem: AttentionProblem, selection: Selection, o_operand: Operand, place: Place
) -> Prepared:
    """Build the kernel if need be, load it, and pack what the problem fixes of its parameters.

    ``o_operand`` describes the output; ``place`` names the current device.
    """
    grids.check_sizes(problem, selection.config)
    selection = replace(selection, config=_stored_to(o_operand, selection.config))
    kernels = tuple(load_kernel(config, place) for config in configs_of(selection))
    params = _fixed_params(problem, kernels[-1], o_operand, place)
    most = place.multiprocessors if selection.config.uses_tma else _MAX_GRID
    return Prepared(problem, selection, kernels, params, o_operand, most)


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
    for name, array in gates.allocate(problem, prepared.selection.config).items():
        plan.arrays[name] = array
        params[name] = array.data.ptr
    if problem.seqlen_q == 0 or (problem.batch == 0 and not problem.packed):
        return plan  # rows of a packed batch without sequences are zeros, too
    if prepared.selection.config.uses_tma:
        views = tensor_map.views_of(problem, prepared.selection.config, prepared.output)
        for name, words in tensor_map.maps_of(views, plan.arrays).items():
            params[f"{name}_map"] = words
    if prepared.selection.kernel.name == "wmma_unfused":
        _plan_unfused(plan, params)
    elif prepared.selection.kernel.quantizes:
        _plan_fp8(plan, params)
    else:
        _plan_one_entry(plan, params, own_workspace, prepared.most_blocks)
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


def _stored_to(output: Operand, config: KernelConfig) -> KernelConfig:
    """Loads of q, k, v and stores of o share one width: a less aligned output sets it."""
    return replace(
        config,
        align_bytes=min(config.align_bytes, output.align_bytes),
        tma_stores=config.tma_stores and tma.is_addressable(output, config.dtype),
    )


def _plan_one_entry(
    plan: Plan,
    params: np.ndarray[Any, Any],
    own_workspace: bool = True,
    most_blocks: int = _MAX_GRID,
) -> None:
    """One block per BLOCK_M queries of a head, times the parts of the keys.

    Or ``most_blocks``, which then take work from a counter that is 0 between launches.
    """
    (name,) = plan.selection.kernel.entries
    config = plan.selection.config
    blocks, splits = grids.query_blocks(plan.problem, config), int(params["splits"])
    grid = blocks * splits
    if config.tile.cluster == 1:  # clusters need no memory, and each has one block of rows
        if splits > 1 or grid > most_blocks:
            partial, arrivals = split_bytes(config, blocks, splits)
            area = (allocate if own_workspace else workspace)(partial, arrivals)
            params["split_partial"], params["split_arrivals"] = area.partial, area.arrivals
            plan.arrays["split"] = area
        grid = min(grid, most_blocks)
    plan.steps += (_step(plan.kernels[-1], name, grid, params),)


def _plan_unfused(plan: Plan, params: np.ndarray[Any, Any]) -> None:
    import cupy

    problem, (kernel,) = plan.problem, plan.kernels
    tile = kernel.config.tile
    heads = problem.batch * problem.heads_q
    rows = round_up(problem.seqlen_q, tile.block_m)
    cols = round_up(problem.visible_kv, tile.block_n)
    scratch = {
        "scratch_scores": cupy.empty((heads, rows, cols), cupy.float32),
        "scratch_probs": cupy.empty((heads, rows, cols), plan.arrays["q"].dtype),
        "scratch_sum": cupy.empty((heads, rows), cupy.float32),
    }
    plan.arrays |= scratch
    for name, array in scratch.items():
        params[name] = array.data.ptr
    params["rows_padded"], params["cols_padded"] = rows, cols
    tiles = heads * (rows // tile.block_m) * (cols // tile.block_n)
    row_blocks = -(-heads * problem.seqlen_q // kernel.config.num_warps)
    if tiles:
        plan.steps += (_step(kernel, "wmma_scores", tiles, params),)
    plan.steps += (
        _step(kernel, "wmma_softmax", row_blocks, params),
        _step(kernel, "wmma_pv", grids.query_blocks(plan.problem, plan.selection.config), params),
    )


def _plan_fp8(plan: Plan, params: np.ndarray[Any, Any]) -> None:
    """Quantise q, k, v, then attend to the e4m3 copies."""
    import cupy

    quantizer, kernel = plan.kernels
    row = kernel.config.head_dim
    pack = np.zeros((), QUANTIZE_PARAMS)
    blocks = 0
    for index, operand in enumerate((plan.problem.q, plan.problem.k, plan.problem.v)):
        name = operand.name
        batch, heads, seqlen, dim = operand.shape
        x8 = cupy.empty((batch, heads, seqlen, row), cupy.uint8)
        scale = cupy.empty((batch, heads), cupy.float32)
        plan.arrays |= {f"{name}8": x8, f"{name}_scale": scale}
        params[name] = x8.data.ptr
        params[f"{name}_scale"] = scale.data.ptr
        params[f"{name}_strides"] = (heads * seqlen * row, seqlen * row, row)
        tensor = pack["tensor"][index]
        tensor["x"], tensor["x8"] = plan.arrays[name].data.ptr, x8.data.ptr
        tensor["scale"], tensor["strides"] = scale.data.ptr, operand.strides
        tensor["heads"], tensor["seqlen"], tensor["dim"] = heads, seqlen, dim
        tensor["visible"] = seqlen if name == "q" else plan.problem.visible_kv
        tensor["blocks"] = batch * heads
        blocks += batch * heads
    plan.steps += (_step(quantizer, "fp8_quantize", blocks, pack),)
    _plan_one_entry(plan, params)


def _fixed_params(
    problem: AttentionProblem, kernel: LoadedKernel, o_operand: Operand, place: Place
) -> np.ndarray[Any, Any]:
    config = kernel.config
    params = np.zeros((), params_of(config.source))
    for operand in (problem.q, problem.k, problem.v, o_operand):
        params[f"{operand.name}_strides"] = operand.strides
    params["batch"], params["heads_q"] = problem.batch, problem.heads_q
    params["heads_kv"] = problem.heads_kv
    params["group"] = problem.heads_q // problem.heads_kv
    params["seqlen_q"], params["seqlen_kv"] = problem.seqlen_q, problem.visible_kv
    params["causal_offset"] = problem.causal_offset
    params["top_left"] = problem.causal == "top-left"
    left, right = problem.window
    params["window_left"], params["window_right"] = max(left, 0), max(right, 0)
    heads = problem.heads_q * problem.seqlen_q
    params["lse_strides"] = (0 if problem.packed else heads, problem.seqlen_q)
    params["gate_row"] = problem.seqlen_kv
    params["gate_tiles"] = gates.tiles_of(problem, config)
    params["m_blocks"] = grids.blocks_per_head(problem, config)
    params["splits"] = grids.splits(problem, config, _resident(kernel, place))
    params["section"] = (
        grids.section(problem, config, place.multiprocessors) if config.uses_tma else 1
    )
    _set_rules(params, problem.rules)
    params["softmax_scale"] = problem.softmax_scale
    params["scale_log2"] = problem.softmax_scale * _LOG2_E
    return params


def _set_rules(params: np.ndarray[Any, Any], rules: Rules) -> None:
    for rule, described in rules.given:
        for name, value in rule.params(described).items():
            params[name] = value


def _resident(kernel: LoadedKernel, place: Place) -> int:
    """Thread blocks that run side by side on the whole GPU."""
    return place.multiprocessors * kernel.blocks_per_multiprocessor(place.arch)


def _step(kernel: LoadedKernel, entry: str, grid: int, params: np.ndarray[Any, Any]) -> Step:
    if grid > _MAX_GRID:
        raise ValueError(f"q: needs {grid} thread blocks, a launch has at most 2**31 - 1")
    config = kernel.config
    function = kernel.entries[entry].ptr
    return Step(function, grid, config.threads, config.smem_bytes, ParameterBlock(params))
