"""From a configured kernel and arrays to launches: grid, block, shared memory, parameters.

A ``Plan`` is one problem bound to its arrays: ``launch()`` enqueues it, as often as wanted, and
allocates nothing. One function per kernel fills it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flashcore_cupy import jit
from flashcore_cupy.config import KernelConfig
from flashcore_cupy.params import ATTENTION_PARAMS, QUANTIZE_PARAMS
from flashcore_cupy.problem import AttentionProblem, Operand
from flashcore_cupy.tiles import Selection, quantize_config

if TYPE_CHECKING:
    import cupy

_LOG2_E = math.log2(math.e)
_MAX_GRID = 2**31 - 1
_DEFAULT_SMEM = 48 * 1024  # more than this has to be asked for, once per kernel


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
    """0-d structured array: the struct that the kernel takes by value."""


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


def make_plan(
    problem: AttentionProblem,
    selection: Selection,
    arch: str,
    q: cupy.ndarray,
    k: cupy.ndarray,
    v: cupy.ndarray,
    o: cupy.ndarray,
    o_operand: Operand,
    *,
    want_lse: bool,
) -> Plan:
    """Build the kernel if need be, allocate what it needs beside ``o``, and pack its parameters.

    ``q``, ``k``, ``v``, ``o`` are (B, H, S, D) or (B, S, H, D) arrays on the current device,
    described by ``problem`` and ``o_operand``.
    """
    import cupy

    device = cupy.cuda.Device().id
    kernel = load_kernel(_aligned_for(selection.config, o_operand), arch, device)
    plan = Plan(problem, selection, (kernel,), (), {"q": q, "k": k, "v": v, "o": o})
    if want_lse:
        shape = (problem.batch, problem.heads_q, problem.seqlen_q)
        plan.arrays["lse"] = cupy.empty(shape, cupy.float32)
    _allocate_gate(plan)
    params = _attention_params(plan, o_operand)
    if problem.batch * problem.heads_q * problem.seqlen_q == 0:
        return plan
    if selection.kernel.name == "wmma_unfused":
        _plan_unfused(plan, kernel, params)
    elif selection.kernel.quantizes:
        _plan_fp8(plan, kernel, params, arch, device)
    else:
        _plan_one_entry(plan, kernel, params)
    return plan


@functools.cache
def load_kernel(config: KernelConfig, arch: str, device: int) -> LoadedKernel:
    """Compile (or fetch) and load a kernel; once per configuration and device."""
    compiled = jit.compile_kernel(config.source, config.defines(), arch)
    module = jit.load(compiled)
    entries = {name: module.get_function(name) for name in compiled.entries}
    if config.smem_bytes > _DEFAULT_SMEM:
        for entry in entries.values():
            entry.max_dynamic_shared_size_bytes = config.smem_bytes
    return LoadedKernel(config, compiled, entries)


def _aligned_for(config: KernelConfig, o_operand: Operand) -> KernelConfig:
    """Loads of q, k, v and stores of o share one width: a less aligned output sets it."""
    return replace(config, align_bytes=min(config.align_bytes, o_operand.align_bytes))


def _plan_one_entry(plan: Plan, kernel: LoadedKernel, params: np.ndarray[Any, Any]) -> None:
    """Scalar and the fused kernels: one block per BLOCK_M queries of a head."""
    (name,) = plan.selection.kernel.entries
    plan.steps += (_step(kernel, name, _query_blocks(plan), params),)


def _plan_unfused(plan: Plan, kernel: LoadedKernel, params: np.ndarray[Any, Any]) -> None:
    import cupy

    problem, tile = plan.problem, kernel.config.tile
    heads = problem.batch * problem.heads_q
    rows = _round_up(problem.seqlen_q, tile.block_m)
    cols = _round_up(problem.visible_kv, tile.block_n)
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


def _plan_fp8(
    plan: Plan, kernel: LoadedKernel, params: np.ndarray[Any, Any], arch: str, device: int
) -> None:
    """Quantise q, k, v, then attend to the e4m3 copies."""
    import cupy

    config = kernel.config
    quantizer = load_kernel(quantize_config(plan.selection.config), arch, device)
    plan.kernels = (quantizer, kernel)
    for operand in (plan.problem.q, plan.problem.k, plan.problem.v):
        name = operand.name
        batch, heads, seqlen, dim = operand.shape
        x8 = cupy.empty((batch, heads, seqlen, config.head_dim), cupy.uint8)
        scale = cupy.empty((batch, heads), cupy.float32)
        plan.arrays |= {f"{name}8": x8, f"{name}_scale": scale}
        row = config.head_dim
        params[name] = x8.data.ptr
        params[f"{name}_scale"] = scale.data.ptr
        params[f"{name}_strides"] = (heads * seqlen * row, seqlen * row, row)
        if batch * heads * seqlen == 0:
            continue
        pack = np.zeros((), QUANTIZE_PARAMS)
        pack["x"], pack["x8"], pack["scale"] = (
            plan.arrays[name].data.ptr,
            x8.data.ptr,
            scale.data.ptr,
        )
        pack["strides"] = operand.strides
        pack["heads"], pack["seqlen"], pack["dim"] = heads, seqlen, dim
        plan.steps += (_step(quantizer, "fp8_quantize", batch * heads, pack),)
    _plan_one_entry(plan, kernel, params)


def _attention_params(plan: Plan, o_operand: Operand) -> np.ndarray[Any, Any]:
    problem, arrays = plan.problem, plan.arrays
    params = np.zeros((), ATTENTION_PARAMS)
    for operand in (problem.q, problem.k, problem.v, replace(o_operand, name="o")):
        params[operand.name] = arrays[operand.name].data.ptr
        params[f"{operand.name}_strides"] = operand.strides
    for name in ("lse", "gate", "gate_tile_max", "gate_row_max", "gate_row_sum"):
        if name in arrays:
            params[name] = arrays[name].data.ptr
    params["batch"], params["heads_q"] = problem.batch, problem.heads_q
    params["heads_kv"] = problem.heads_kv
    params["seqlen_q"], params["seqlen_kv"] = problem.seqlen_q, problem.visible_kv
    params["causal_offset"] = problem.causal_offset if problem.causal else 0
    params["gate_row"] = problem.seqlen_kv
    params["gate_tiles"] = _gate_tiles(plan)
    params["softmax_scale"] = problem.softmax_scale
    params["scale_log2"] = problem.softmax_scale * _LOG2_E
    return params


def _allocate_gate(plan: Plan) -> None:
    """Arrays for what a gate writes, filled with what it means not to be written: hidden keys."""
    import cupy

    problem = plan.problem
    rows = (problem.batch, problem.heads_q, problem.seqlen_q)
    if problem.gate == "qk":
        plan.arrays["gate"] = cupy.full((*rows, problem.seqlen_kv), -np.inf, cupy.float32)
    elif problem.gate == "softmax":
        plan.arrays["gate"] = cupy.zeros((*rows, problem.seqlen_kv), cupy.float32)
        hidden = cupy.full((*rows, _gate_tiles(plan)), -np.inf, cupy.float32)
        plan.arrays["gate_tile_max"] = hidden
        plan.arrays["gate_row_max"] = cupy.zeros(rows, cupy.float32)
        plan.arrays["gate_row_sum"] = cupy.zeros(rows, cupy.float32)


def _gate_tiles(plan: Plan) -> int:
    return -(-plan.problem.seqlen_kv // plan.selection.config.tile.block_n)


def _normalised_probabilities(plan: Plan) -> Any:
    """p~ * exp(m_j - m) / l: each tile's probabilities at the row's final maximum."""
    import cupy

    arrays, block_n = plan.arrays, plan.selection.config.tile.block_n
    row_max, row_sum = arrays["gate_row_max"][..., None], arrays["gate_row_sum"][..., None]
    factor = cupy.exp2(arrays["gate_tile_max"] - row_max) / row_sum
    factor = cupy.where(row_sum == 0, cupy.float32(0), factor)  # a query without keys
    per_key = cupy.repeat(factor, block_n, axis=-1)[..., : plan.problem.seqlen_kv]
    return arrays["gate"] * per_key


def _step(kernel: LoadedKernel, entry: str, grid: int, params: np.ndarray[Any, Any]) -> Step:
    if grid > _MAX_GRID:
        raise ValueError(f"q: needs {grid} thread blocks, a launch has at most 2**31 - 1")
    config = kernel.config
    return Step(kernel.entries[entry], grid, config.threads, config.smem_bytes, params)


def _query_blocks(plan: Plan) -> int:
    problem = plan.problem
    blocks = -(-problem.seqlen_q // plan.selection.config.tile.block_m)
    return problem.batch * problem.heads_q * blocks


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
