"""The main job, `run`: random inputs, the kernel and its check, and on a GPU its times.

Without a GPU the kernel is emulated; NumPy takes its place where that cannot be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashcore_cupy.attention import attention, plan
from flashcore_cupy.check import verify
from flashcore_cupy.check.inputs import inputs
from flashcore_cupy.check.machine import Machine, machine
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cpu.emulator.plan import EmulatedPlan, emulated_plan
from flashcore_cupy.cpu.emulator.run import Schedule
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.launch import builds
from flashcore_cupy.launch.plan import GpuPlan
from flashcore_cupy.measure.timing import Peak, Timing, free_memory, peak, time_calls, time_graph
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem, contiguous_problem
from flashcore_cupy.problem.blocks import Array
from flashcore_cupy.problem.rules import NO_RULES, describe_rules
from flashcore_cupy.select import selector

OnPhase = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to run: the kernel and changes to its row, random seed, timing."""

    kernel: str = "auto"
    overrides: Mapping[str, object] | None = None
    seed: int = 0
    warmup: int = 10
    iters: int = 100
    graph: bool = True
    emulate: bool = True
    """Without a GPU."""


@dataclass(frozen=True)
class Result:
    """Everything that `run` shows."""

    machine: Machine
    no_gpu: str | None
    """Why the job ran on NumPy arrays; None on a GPU."""
    not_emulated: str | None
    """Why NumPy ran in the kernel's place; None if the kernel ran."""
    problem: AttentionProblem
    seed: int
    kernel: str | None
    config: str | None
    passed_over: tuple[tuple[str, str], ...]
    builds: tuple[builds.Build, ...]
    not_built: str | None
    """Why no kernel was compiled; None if it was."""
    check: verify.Check
    graph: Timing | None
    call: Timing | None
    """None of an emulated kernel, whose time tells nothing."""
    peak: Peak | None
    emulated_seconds: float | None = None
    """What it took to emulate it."""

    @property
    def ran(self) -> str | None:
        """What was run and checked: the kernel, or "numpy" in its place."""
        return self.kernel if self.not_emulated is None else "numpy"

    @property
    def tflops(self) -> float | None:
        """10^12 operations of the two products per second, without Python; None for a gate."""
        timing = self.graph or self.call
        if self.problem.gate is not None or timing is None:
            return None
        return self.problem.flops / timing.median_us / 1e6

    @property
    def share_of_peak(self) -> float | None:
        """``tflops`` by the computed peak; None where either is not known."""
        return None if self.tflops is None or self.peak is None else self.tflops / self.peak.tflops

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "ok": self.check.ok,
            "machine": self.machine.to_json(),
            "no_gpu": self.no_gpu,
            "ran": self.ran,
            "emulated": self.emulated_seconds is not None,
            "not_emulated": self.not_emulated,
            "problem": problem_json(self.problem) | {"seed": self.seed},
            "kernel": self.kernel,
            "config": self.config,
            "passed_over": dict(self.passed_over),
            "builds": [build.to_json() for build in self.builds],
            "not_built": self.not_built,
            "check": self.check.to_json(),
            "graph": self.graph and self.graph.to_json(),
            "call": self.call and self.call.to_json(),
            "emulated_seconds": self.emulated_seconds,
            "tflops": self.tflops,
            "peak": self.peak and self.peak.to_json(),
            "share_of_peak": self.share_of_peak,
        }


def problem_json(problem: AttentionProblem) -> dict[str, Any]:
    """Return the sizes and rules of a problem under the command line's names."""
    return {
        "B": problem.batch,
        "H": problem.heads_q,
        "Hkv": problem.heads_kv,
        "S": problem.seqlen_q,
        "Skv": problem.seqlen_kv,
        "D": problem.head_dim,
        "Dv": problem.head_dim_v,
        "dtype": problem.dtype,
        "layout": problem.layout,
        "causal": problem.causal,
        **problem.rules.values,
        "gate": problem.gate,
    }


def problem_of(
    batch: int,
    heads: int,
    seqlen: int,
    head_dim: int,
    **others: Any,
) -> AttentionProblem:
    """``contiguous_problem`` with rules that are values; ``ValueError`` says what is wrong."""
    given = {name: others.pop(name, None) for name in NO_RULES.values}
    problem = contiguous_problem(batch, heads, seqlen, head_dim, **others)
    given = {name: value for name, value in given.items() if value is not None}
    return replace(problem, rules=describe_rules(problem.scores, problem.dtype, **given))


def arguments_of(problem: AttentionProblem) -> dict[str, Any]:
    """The arguments of ``attention`` that make this problem of the arrays that ``arrays`` gives."""
    return {
        "layout": problem.layout,
        "causal": problem.causal,
        **problem.rules.values,
        "gate": problem.gate,
    }


def in_layout(problem: AttentionProblem, *canonical: Array) -> list[Array]:
    """Arrays (B, H, S, D) as contiguous ones in the problem's layout."""
    if problem.layout == "bhsd":
        return list(canonical)
    return [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in canonical]


def check_memory(problem: AttentionProblem) -> None:
    """Raise ``ValueError`` if this machine has not the memory to make the inputs and check them."""
    free, needed = free_memory(), memory_needed(problem)
    if free is not None and needed > free:
        raise ValueError(
            f"the inputs and their check take {needed / 2**30:.3g} GiB of memory, and "
            f"{free / 2**30:.3g} GiB are free; use fewer or shorter sequences, or fewer heads"
        )


def memory_needed(problem: AttentionProblem) -> int:
    """Bytes on the host, roughly: the arrays, and what is computed in float32 and float64."""
    heads = problem.batch * problem.heads_q
    q, o = (heads * problem.seqlen_q * d for d in (problem.head_dim, problem.head_dim_v))
    keys = problem.batch * problem.heads_kv * problem.seqlen_kv
    k, v = keys * problem.head_dim, keys * problem.head_dim_v
    item = ITEMSIZE[problem.dtype] * (1 if problem.layout == "bhsd" else 2)
    made = 4 * (q + k + v)  # random numbers in float32, before they are rounded
    rows = verify.sample_size(problem)
    judged = 16 * max(q, k)  # the lengths of rows, in float64
    if problem.gate in ("qk", "softmax"):
        judged += 12 * heads * problem.seqlen_q * problem.seqlen_kv
        judged += 32 * heads * rows * problem.seqlen_kv
    else:
        judged += 32 * heads * rows * problem.head_dim_v
    judged += 32 * min(rows * problem.seqlen_kv, 2**22)  # the oracle's block of scores
    return item * (q + k + v + o) + max(made, judged)


def choose(problem: AttentionProblem, arch: str, options: Options) -> selector.Selection:
    """Check what the user asks for. Raises ``ValueError`` with the reason if it cannot be."""
    return selector.select(problem, arch, kernel=options.kernel, overrides=options.overrides)


def why_not_emulated(options: Options) -> str | None:
    """Why a job without a GPU has NumPy in the kernel's place; None if it has not."""
    return build.why_not() if options.emulate else "--no-emulate"


def run(
    problem: AttentionProblem,
    selection: selector.Selection,
    arch: str,
    options: Options,
    on_phase: OnPhase = lambda words: None,
) -> Result:
    """Run the job on the GPU; without one emulated, or by NumPy.

    ``on_phase(words)`` tells of each phase. Raises ``jit.CompileError`` for a kernel that does not
    compile, and what ``EmulatedPlan.launch`` raises.
    """
    no_gpu = compiler.no_gpu_reason()
    if no_gpu is None:
        return _run_on_gpu(problem, arch, options, on_phase)
    on_phase("compiling the kernel")
    built, not_built = build_without_gpu(selection, arch)
    known = dict(
        machine=machine(arch), no_gpu=no_gpu, problem=problem, seed=options.seed,
        kernel=selection.kernel.name, config=selection.config.describe(),
        passed_over=selection.passed_over, builds=built, not_built=not_built, graph=None, peak=None,
    )  # fmt: skip
    why = why_not_emulated(options)
    if why is None:
        return _run_emulated(problem, selection, arch, options, on_phase, known)
    return _run_by_numpy(problem, options, on_phase, known | {"not_emulated": why})


def to_gpu(*arrays: Array) -> list[Any]:
    """Copy NumPy arrays to the current device."""
    import cupy

    return [cupy.asarray(x) for x in arrays]


def _run_on_gpu(
    problem: AttentionProblem, arch: str, options: Options, on_phase: OnPhase
) -> Result:
    import cupy

    on_phase("making inputs")
    host = inputs(problem, options.seed)
    q, k, v = to_gpu(*in_layout(problem, *host))
    rules = arguments_of(problem) | {"kernel": options.kernel, "config": options.overrides}
    out = cupy.asarray(np.full(problem.output_shape, np.nan, host[0].dtype))
    on_phase("compiling the kernel")
    bound = plan(q, k, v, out=out, return_lse=problem.gate is None, **rules)
    assert isinstance(bound, GpuPlan)
    bound.launch()
    rules |= _target(problem, out)
    on_phase("checking against float64")
    known = None  # what was asked for, whatever the plan is of
    if not bound.selection.kernel.quantizes:
        known = verify.expect(problem, *host, tile=bound.selection.config.tile.block_m)
    check = verify.check_plan(bound, *host, known=known)
    timing = {"iters": options.iters, "warmup": options.warmup}
    configs = selector.configs_of(bound.selection)
    on_phase("timing")
    return Result(
        machine=machine(arch),
        no_gpu=None,
        not_emulated=None,
        problem=problem,
        seed=options.seed,
        kernel=bound.selection.kernel.name,
        config=bound.selection.config.describe(),
        passed_over=bound.selection.passed_over,
        builds=tuple(map(builds.describe_build, configs, bound.compiled)),
        not_built=None,
        check=check,
        graph=time_graph(bound, **timing) if options.graph else None,
        call=time_calls(
            lambda: attention(q, k, v, **rules),
            synchronize=cupy.cuda.get_current_stream().synchronize,
            **timing,
        ),
        peak=peak(problem.dtype),
    )


def _target(problem: AttentionProblem, out: Any) -> dict[str, Any]:
    """``out=``, unless the gate stops before there is an output."""
    return {} if problem.gate in ("qk", "softmax") else {"out": out}


def _run_emulated(
    problem: AttentionProblem,
    selection: selector.Selection,
    arch: str,
    options: Options,
    on_phase: OnPhase,
    known: dict[str, Any],
) -> Result:
    on_phase("making inputs")
    host = inputs(problem, options.seed)
    bound = emulated(problem, host, arch, kernel=options.kernel, config=options.overrides)
    on_phase("compiling the kernel for the CPU")
    bound.build()
    on_phase("emulating the kernel")
    start = time.perf_counter()
    bound.launch(Schedule.seeded(options.seed))
    seconds = time.perf_counter() - start
    on_phase("checking against float64")
    check = verify.check_plan(bound, *host)
    return Result(**known, not_emulated=None, check=check, call=None, emulated_seconds=seconds)


def emulated(
    problem: AttentionProblem, host: tuple[Array, Array, Array], arch: str, **choices: Any
) -> EmulatedPlan:
    """A problem's plan for a kernel on the CPU, with an output of NaN."""
    q, k, v = in_layout(problem, *host)
    out = _target(problem, np.full(problem.output_shape, np.nan, q.dtype))
    rules = arguments_of(problem) | out | choices
    return emulated_plan(q, k, v, arch, return_lse=problem.gate is None, **rules)


def _run_by_numpy(
    problem: AttentionProblem, options: Options, on_phase: OnPhase, known: dict[str, Any]
) -> Result:
    on_phase("making inputs")
    host = inputs(problem, options.seed)
    q, k, v = in_layout(problem, *host)
    rules = arguments_of(problem)
    rules |= _target(problem, np.full(problem.output_shape, np.nan, q.dtype))
    on_phase("attention on the CPU, once")
    start = time.perf_counter()
    wants_lse = problem.gate is None
    made = attention(q, k, v, return_lse=wants_lse, **rules)
    first_us = (time.perf_counter() - start) * 1e6
    got, lse = made if wants_lse else (made, None)
    if problem.layout == "bshd" and problem.gate not in ("qk", "softmax"):
        got = got.transpose(0, 2, 1, 3)
    on_phase("checking against float64")
    check = verify.expect(problem, *host).judge(got, lse)
    on_phase(f"timing calls of {first_us / 1e6:.1f} s" if first_us > 1e6 else "timing calls")
    timing = time_calls(
        lambda: attention(q, k, v, **rules),
        iters=options.iters,
        warmup=options.warmup,
        first_us=first_us,
    )
    return Result(**known, check=check, call=timing)


def build_without_gpu(
    selection: selector.Selection, arch: str
) -> tuple[tuple[builds.Build, ...], str | None]:
    """Compile what a selection launches; nothing, and the reason, without CuPy or NVRTC."""
    try:
        nvrtc.nvrtc_version()
    except RuntimeError as error:
        return (), str(error)
    return tuple(builds.build(config, arch) for config in selector.configs_of(selection)), None
