"""The main job, `run`: random inputs, the kernel, its check and its times, on a GPU or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore_cupy import builds, jit, tiles, verify
from flashcore_cupy.attention import attention, plan
from flashcore_cupy.bench import (
    Machine,
    Peak,
    Timing,
    inputs,
    machine,
    peak,
    time_calls,
    time_graph,
)
from flashcore_cupy.numpy_attention import Array
from flashcore_cupy.problem import AttentionProblem


@dataclass(frozen=True)
class Options:
    """How to run: the kernel and changes to its row, random seed, timing."""

    kernel: str = "auto"
    overrides: Mapping[str, object] | None = None
    seed: int = 0
    warmup: int = 10
    iters: int = 100
    graph: bool = True


@dataclass(frozen=True)
class Result:
    """Everything that `run` shows."""

    machine: Machine
    no_gpu: str | None
    """Why the job ran on NumPy arrays; None on a GPU."""
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
    call: Timing
    peak: Peak | None

    @property
    def tflops(self) -> float | None:
        """10^12 operations of the two products per second, without Python; None for a gate."""
        if self.problem.gate is not None:
            return None
        return self.problem.flops / (self.graph or self.call).median_us / 1e6

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
            "problem": problem_json(self.problem) | {"seed": self.seed},
            "kernel": self.kernel,
            "config": self.config,
            "passed_over": dict(self.passed_over),
            "builds": [build.to_json() for build in self.builds],
            "not_built": self.not_built,
            "check": self.check.to_json(),
            "graph": self.graph and self.graph.to_json(),
            "call": self.call.to_json(),
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
        "dtype": problem.dtype,
        "causal": problem.causal,
        "gate": problem.gate,
    }


def choose(problem: AttentionProblem, arch: str, options: Options) -> tiles.Selection:
    """Check what the user asks for. Raises ``ValueError`` with the reason if it cannot be."""
    return tiles.select(problem, arch, kernel=options.kernel, overrides=options.overrides)


def run(
    problem: AttentionProblem, selection: tiles.Selection, arch: str, options: Options
) -> Result:
    """Run the job on the GPU, or without one on NumPy arrays.

    Raises ``jit.CompileError`` for a kernel that does not compile.
    """
    no_gpu = jit.no_gpu_reason()
    if no_gpu is None:
        return _run_on_gpu(problem, arch, options)
    return _run_on_cpu(problem, selection, arch, options, no_gpu)


def to_gpu(*arrays: Array) -> list[Any]:
    """Copy NumPy arrays to the current device."""
    import cupy

    return [cupy.asarray(x) for x in arrays]


def _run_on_gpu(problem: AttentionProblem, arch: str, options: Options) -> Result:
    import cupy

    host = inputs(problem, options.seed)
    q, k, v = to_gpu(*host)
    rules: dict[str, Any] = {
        "causal": problem.causal,
        "gate": problem.gate,
        "kernel": options.kernel,
        "config": options.overrides,
    }
    out = cupy.asarray(np.full(problem.output_shape, np.nan, host[0].dtype))
    bound = plan(q, k, v, out=out, return_lse=problem.gate is None, **rules)
    bound.launch()
    rules |= _target(problem, out)
    check = verify.check_plan(bound, *host)
    timing = {"iters": options.iters, "warmup": options.warmup}
    configs = tiles.configs_of(bound.selection)
    return Result(
        machine=machine(arch),
        no_gpu=None,
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


def _run_on_cpu(
    problem: AttentionProblem,
    selection: tiles.Selection,
    arch: str,
    options: Options,
    no_gpu: str,
) -> Result:
    built, not_built = build_without_gpu(selection, arch)
    q, k, v = host = inputs(problem, options.seed)
    rules: dict[str, Any] = {"causal": problem.causal, "gate": problem.gate}
    rules |= _target(problem, np.full(problem.output_shape, np.nan, q.dtype))
    lse = None
    if problem.gate is None:
        got, lse = attention(q, k, v, return_lse=True, **rules)
    else:
        got = attention(q, k, v, **rules)
    return Result(
        machine=machine(arch),
        no_gpu=no_gpu,
        problem=problem,
        seed=options.seed,
        kernel=selection.kernel.name,
        config=selection.config.describe(),
        passed_over=selection.passed_over,
        builds=built,
        not_built=not_built,
        check=verify.expect(problem, *host).judge(got, lse),
        graph=None,
        call=time_calls(
            lambda: attention(q, k, v, **rules),
            iters=options.iters,
            warmup=options.warmup,
        ),
        peak=None,
    )


def build_without_gpu(
    selection: tiles.Selection, arch: str
) -> tuple[tuple[builds.Build, ...], str | None]:
    """Compile what a selection launches; nothing, and the reason, without CuPy or NVRTC."""
    try:
        jit.nvrtc_version()
    except RuntimeError as error:
        return (), str(error)
    return tuple(builds.build(config, arch) for config in tiles.configs_of(selection)), None
