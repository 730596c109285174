"""From a configured kernel and arrays to launches: grid, block, shared memory, parameters.

A ``Plan`` is one problem bound to its arrays: ``launch()`` enqueues it, as often as wanted, and
allocates nothing. One function per kernel fills it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcore_cupy import jit
from flashcore_cupy.config import KernelConfig, round_up
from flashcore_cupy.params import ATTENTION_PARAMS, QUANTIZE_PARAMS
from flashcore_cupy.problem import AttentionProblem, Operand
from flashcore_cupy.tiles import Selection, configs_of

if TYPE_CHECKING:
    import cupy

_LOG2_E = math.log2(math.e)
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_MAX_GRID = 2**31 - 1
_DEFAULT_SMEM = 48 * 1024  # more than this has to be asked for, once per kernel


class Place(NamedTuple):
    """Where a kernel runs and what it is built from; keys whatever keeps loaded kernels."""

    device: int
    arch: str
    sources: str | None
    """The other folder of kernels that the environment asks for, if it does."""


@dataclass(frozen=True)
class LoadedKernel:
    """A compiled kernel on a device, ready to launch."""

    config: KernelConfig
    compiled: jit.CompiledKernel
    entries: Mapping[str, cupy.RawKernel]


@dataclass(frozen=True)
class Step:
    """One launch."""

    entry: cupy.RawKernel
    grid: int
    block: int
    smem_bytes: int
    params: np.ndarray[Any, Any]
    """0-d array of bytes: the struct that the kernel takes by value."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A problem and its kernels, without any arrays."""

    problem: AttentionProblem
    selection: Selection
    kernels: tuple[LoadedKernel, ...]
    """In launch order."""
    params: np.ndarray[Any, Any]
    """``AttentionParams`` with all addresses 0."""


@dataclass
class Plan:
    """A problem, its kernel and its arrays. Keeps every array that a launch touches alive."""

    problem: AttentionProblem
    selection: Selection
    kernels: tuple[LoadedKernel, ...]
    steps: tuple[Step, ...]
    arrays: dict[str, Any] = field(default_factory=dict)
    """"o" (B, Hq, Sq, Dv) view of the output, "lse" or the gate's arrays, scratch."""

    @property
    def compiled(self) -> tuple[jit.CompiledKernel, ...]:
        """What was built, in launch order."""
        return tuple(kernel.compiled for kernel in self.kernels)

    def launch(self) -> None:
        """Enqueue on the current stream; returns without waiting."""
        for step in self.steps:
            step.entry((step.grid,), (step.block,), (step.params,), shared_mem=step.smem_bytes)

    def gate_output(self) -> Any:
        """What the gate stopped at, fp32 (B, Hq, Sq, Skv): scores, or normalised probabilities."""
        if self.problem.gate == "qk":
            return self.arrays["gate"]
        return _normalised_probabilities(self)


def prepare(
    problem: AttentionProblem, selection: Selection, o_operand: Operand, place: Place
) -> Prepared:
    """Build the kernel if need be, load it, and pack what the problem fixes of its parameters.

    ``o_operand`` describes the output; ``place`` names the current device.
    """
    selection = replace(selection, config=_aligned_for(selection.config, o_operand))
    kernels = tuple(load_kernel(config, place) for config in configs_of(selection))
    params = _fixed_params(problem, selection.config, o_operand)
    return Prepared(problem, selection, kernels, params)


def make_plan(
    prepared: Prepared,
    q: cupy.ndarray,
    k: cupy.ndarray,
    v: cupy.ndarray,
    o: cupy.ndarray,
    *,
    want_lse: bool,
) -> Plan:
    """Bind a prepared problem to its arrays, and allocate what the kernel needs beside them."""
    import cupy

    problem = prepared.problem
    plan = Plan(problem, prepared.selection, prepared.kernels, (), {"q": q, "k": k, "v": v, "o": o})
    params = prepared.params.copy()
    for name in "qkvo":
        params[name] = plan.arrays[name].data.ptr
    rows = (problem.batch, problem.heads_q, problem.seqlen_q)
    if want_lse:
        plan.arrays["lse"] = cupy.empty(rows, cupy.float32)
        params["lse"] = plan.arrays["lse"].data.ptr
    if problem.gate is not None:
        _allocate_gate(plan, params)
    if 0 in rows:
        return plan
    if prepared.selection.kernel.name == "wmma_unfused":
        _plan_unfused(plan, params)
    elif prepared.selection.kernel.quantizes:
        _plan_fp8(plan, params)
    else:
        _plan_one_entry(plan, params)
    return plan


@functools.cache
def load_kernel(config: KernelConfig, place: Place) -> LoadedKernel:
    """Compile (or fetch) and load a kernel; once per configuration and place."""
    compiled = jit.compile_kernel(config.source, config.defines(), place.arch)
    module = jit.load(compiled)
    entries = {name: module.get_function(name) for name in compiled.entries}
    if config.smem_bytes > _DEFAULT_SMEM:
        for entry in entries.values():
            entry.max_dynamic_shared_size_bytes = config.smem_bytes
    return LoadedKernel(config, compiled, entries)


def _aligned_for(config: KernelConfig, o_operand: Operand) -> KernelConfig:
    """Loads of q, k, v and stores of o share one width: a less aligned output sets it."""
    return replace(config, align_bytes=min(config.align_bytes, o_operand.align_bytes))


def _plan_one_entry(plan: Plan, params: np.ndarray[Any, Any]) -> None:
    """One block per BLOCK_M queries of a head."""
    (name,) = plan.selection.kernel.entries
    plan.steps += (_step(plan.kernels[-1], name, _query_blocks(plan), params),)


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
        _step(kernel, "wmma_pv", _query_blocks(plan), params),
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
    problem: AttentionProblem, config: KernelConfig, o_operand: Operand
) -> np.ndarray[Any, Any]:
    params = np.zeros((), ATTENTION_PARAMS)
    for operand in (problem.q, problem.k, problem.v, o_operand):
        params[f"{operand.name}_strides"] = operand.strides
    params["batch"], params["heads_q"] = problem.batch, problem.heads_q
    params["heads_kv"] = problem.heads_kv
    params["seqlen_q"], params["seqlen_kv"] = problem.seqlen_q, problem.visible_kv
    params["causal_offset"] = problem.causal_offset if problem.causal else 0
    params["gate_row"] = problem.seqlen_kv
    params["gate_tiles"] = _gate_tiles(problem, config)
    scale = problem.softmax_scale
    if config.source == "fwd_sm80.cu":
        # The kernel compares raw scores, for which the scale has to be positive. Instead of 0 the
        # smallest number: every finite score times that is far below what exp2 can tell from 0.
        params["negate_q"] = scale < 0
        scale = max(abs(scale), _SMALLEST_SCALE)
    params["softmax_scale"] = scale
    params["scale_log2"] = scale * _LOG2_E
    return params


def _allocate_gate(plan: Plan, params: np.ndarray[Any, Any]) -> None:
    """Arrays for what a gate writes, filled with what it means not to be written: hidden keys."""
    import cupy

    problem = plan.problem
    rows = (problem.batch, problem.heads_q, problem.seqlen_q)
    gate: dict[str, Any] = {}
    if problem.gate == "qk":
        gate["gate"] = cupy.full((*rows, problem.seqlen_kv), -np.inf, cupy.float32)
    elif problem.gate == "softmax":
        tiles = _gate_tiles(problem, plan.selection.config)
        gate["gate"] = cupy.zeros((*rows, problem.seqlen_kv), cupy.float32)
        gate["gate_tile_max"] = cupy.full((*rows, tiles), -np.inf, cupy.float32)
        gate["gate_row_max"] = cupy.zeros(rows, cupy.float32)
        gate["gate_row_sum"] = cupy.zeros(rows, cupy.float32)
    for name, array in gate.items():
        plan.arrays[name] = array
        params[name] = array.data.ptr


def _gate_tiles(problem: AttentionProblem, config: KernelConfig) -> int:
    # Whole tiles: with several maxima per tile, the last tile has all of them, too.
    tile = config.tile
    return -(-problem.seqlen_kv // tile.block_n) * (tile.block_n // config.softmax_keys)


def _normalised_probabilities(plan: Plan) -> Any:
    """p~ * exp(m_j - m) / l: each tile's probabilities at the row's final maximum."""
    import cupy

    arrays, keys = plan.arrays, plan.selection.config.softmax_keys
    row_max, row_sum = arrays["gate_row_max"][..., None], arrays["gate_row_sum"][..., None]
    factor = cupy.exp2(arrays["gate_tile_max"] - row_max) / row_sum
    factor = cupy.where(row_sum == 0, cupy.float32(0), factor)  # a query without keys
    per_key = cupy.repeat(factor, keys, axis=-1)[..., : plan.problem.seqlen_kv]
    return arrays["gate"] * per_key


def _step(kernel: LoadedKernel, entry: str, grid: int, params: np.ndarray[Any, Any]) -> Step:
    if grid > _MAX_GRID:
        raise ValueError(f"q: needs {grid} thread blocks, a launch has at most 2**31 - 1")
    config = kernel.config
    # As plain bytes: CuPy looks at a structured array field by field at every launch.
    block = params.view(np.dtype((np.void, params.itemsize)))
    return Step(kernel.entries[entry], grid, config.threads, config.smem_bytes, block)


def _query_blocks(plan: Plan) -> int:
    problem = plan.problem
    blocks = -(-problem.seqlen_q // plan.selection.config.tile.block_m)
    return problem.batch * problem.heads_q * blocks
