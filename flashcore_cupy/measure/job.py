"""The main job, `run`: random inputs, a pass and its check, and on a GPU its times.

Without a GPU kernels are emulated; NumPy takes their place where that cannot be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashcore_cupy.check.machine import Machine, machine
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cpu.emulator.run import Schedule
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.launch import builds
from flashcore_cupy.measure.backward import INPUTS, Backward
from flashcore_cupy.measure.forward import Forward
from flashcore_cupy.measure.passes import Checked, Choice, Pass
from flashcore_cupy.measure.problems import problem_of
from flashcore_cupy.measure.timing import Peak, Timing, peak, time_calls, time_graph
from flashcore_cupy.problem.attention_problem import GATES, check_choice

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
    wanted: Pass
    seed: int
    kernel: str | None
    config: str | None
    passed_over: tuple[tuple[str, str], ...]
    builds: tuple[builds.Build, ...]
    not_built: str | None
    """Why no kernel was compiled; None if it was."""
    check: Checked
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
        """10^12 operations of the products per second, without Python; None for a gate."""
        timing = self.graph or self.call
        if self.wanted.gate is not None or timing is None:
            return None
        return self.wanted.flops / timing.median_us / 1e6

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
            "problem": self.wanted.to_json() | {"seed": self.seed},
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


def pass_of(
    *,
    backward: bool = False,
    wrt: tuple[str, ...] = (),
    deterministic: bool = True,
    **asked: Any,
) -> Pass:
    """The pass that a command line asks for; ``ValueError`` says what is wrong.

    ``wrt``: whose gradients; those of q, k and v if it is empty. ``asked``: as of ``problem_of``.
    """
    if backward:
        gate, names = asked.pop("gate", None), tuple(dict.fromkeys(wrt)) or INPUTS
        return Backward(problem_of(**asked), names, gate, deterministic)
    if wrt or not deterministic:
        name = "wrt" if wrt else "no-deterministic"
        raise ValueError(f"{name}: is of gradients, which only --backward computes; leave it out")
    check_choice("gate", asked.get("gate"), GATES)
    return Forward(problem_of(**asked))


def choose(wanted: Pass, arch: str, options: Options) -> Choice:
    """Check what the user asks for. Raises ``ValueError`` with the reason if it cannot be."""
    return wanted.choose(arch, options.kernel, options.overrides)


def why_not_emulated(options: Options) -> str | None:
    """Why a job without a GPU has NumPy in the kernel's place; None if it has not."""
    return build.why_not() if options.emulate else "--no-emulate"


def run(
    wanted: Pass,
    choice: Choice,
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
        return _run_on_gpu(wanted, arch, options, on_phase)
    on_phase("compiling the kernel")
    built, not_built = build_without_gpu(choice, arch)
    known = dict(
        machine=machine(arch), no_gpu=no_gpu, wanted=wanted, seed=options.seed, kernel=choice.name,
        config=choice.describe(), passed_over=choice.passed_over, builds=built,
        not_built=not_built, graph=None, peak=None,
    )  # fmt: skip
    why = why_not_emulated(options)
    if why is None:
        return _run_emulated(wanted, arch, options, on_phase, known)
    return _run_by_numpy(wanted, options, on_phase, known | {"not_emulated": why})


def _run_on_gpu(wanted: Pass, arch: str, options: Options, on_phase: OnPhase) -> Result:
    import cupy

    on_phase("making inputs")
    trial = wanted.trial(options.seed)
    on_phase("compiling the kernel")
    bound = trial.on_gpu(options.kernel, options.overrides)
    bound.launch()
    on_phase("checking against float64")
    check = trial.check(bound)
    timing = {"iters": options.iters, "warmup": options.warmup}
    choice: Choice = bound.selection
    on_phase("timing")
    return Result(
        machine=machine(arch),
        no_gpu=None,
        not_emulated=None,
        wanted=wanted,
        seed=options.seed,
        kernel=choice.name,
        config=choice.describe(),
        passed_over=choice.passed_over,
        builds=tuple(map(builds.describe_build, choice.configs, bound.compiled)),
        not_built=None,
        check=check,
        graph=time_graph(bound, **timing) if options.graph else None,
        call=time_calls(
            trial.calls_on_gpu(options.kernel, options.overrides),
            synchronize=cupy.cuda.get_current_stream().synchronize,
            **timing,
        ),
        peak=peak(wanted.problem.dtype),
    )


def _run_emulated(
    wanted: Pass, arch: str, options: Options, on_phase: OnPhase, known: dict[str, Any]
) -> Result:
    on_phase("making inputs")
    trial = wanted.trial(options.seed)
    bound = trial.emulated(arch, options.kernel, options.overrides)
    on_phase("compiling the kernel for the CPU")
    bound.build()
    on_phase("emulating the kernel")
    start = time.perf_counter()
    bound.launch(Schedule.seeded(options.seed))
    seconds = time.perf_counter() - start
    on_phase("checking against float64")
    check = trial.check(bound)
    return Result(**known, not_emulated=None, check=check, call=None, emulated_seconds=seconds)


def _run_by_numpy(
    wanted: Pass, options: Options, on_phase: OnPhase, known: dict[str, Any]
) -> Result:
    on_phase("making inputs")
    trial = wanted.trial(options.seed)
    call = trial.by_numpy()
    on_phase("attention on the CPU, once")
    start = time.perf_counter()
    made = call()
    first_us = (time.perf_counter() - start) * 1e6
    on_phase("checking against float64")
    check = trial.check_call(made)
    on_phase(f"timing calls of {first_us / 1e6:.1f} s" if first_us > 1e6 else "timing calls")
    timing = time_calls(call, iters=options.iters, warmup=options.warmup, first_us=first_us)
    return Result(**known, check=check, call=timing)


def build_without_gpu(choice: Choice, arch: str) -> tuple[tuple[builds.Build, ...], str | None]:
    """Compile what is launched; nothing, and the reason, without CuPy or NVRTC."""
    try:
        nvrtc.nvrtc_version()
    except RuntimeError as error:
        return (), str(error)
    return tuple(builds.build(config, arch) for config in choice.configs), None
