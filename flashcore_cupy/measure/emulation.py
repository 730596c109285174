"""The job `emulate`: a kernel on the CPU in several schedules, and what it did wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashcore_cupy.check.machine import Machine, machine
from flashcore_cupy.cpu.emulator.run import KernelError, Schedule
from flashcore_cupy.measure.job import Options
from flashcore_cupy.measure.passes import Checked, Choice, Pass


@dataclass(frozen=True)
class Emulation:
    """Everything that `emulate` shows."""

    machine: Machine
    wanted: Pass
    kernel: str
    config: str
    checking: bool
    """Whether every access was watched."""
    seed: int
    """Of the inputs, and of the first schedule; those after it have the next ones."""
    schedules: int
    """Those that the kernel ran to the end, or until it failed."""
    failure: str | None
    """What the kernel did wrong; None if it came to its end each time."""
    check: Checked | None
    """Of the last schedule; None if the kernel failed."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the kernel did nothing wrong, and its results are right."""
        return self.failure is None and self.check is not None and self.check.ok

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "ok": self.ok,
            "machine": self.machine.to_json(),
            "problem": self.wanted.to_json(),
            "kernel": self.kernel,
            "config": self.config,
            "checking": self.checking,
            "seed": self.seed,
            "schedules": self.schedules,
            "failure": self.failure,
            "check": self.check and self.check.to_json(),
            "emulated_seconds": self.seconds,
        }


def emulate(
    wanted: Pass,
    arch: str,
    options: Options,
    *,
    schedules: int,
    checking: bool,
    on_phase: Callable[[str], None] = lambda words: None,
) -> Emulation:
    """Run a kernel until it fails, gives a wrong result, or has gone through all schedules.

    Raises ``jit.CompileError`` if it does not compile, ``RuntimeError`` without a C++ compiler.
    """
    on_phase("making inputs")
    trial = wanted.trial(options.seed)
    bound = trial.emulated(arch, options.kernel, options.overrides)
    choice: Choice = bound.selection
    on_phase("compiling the kernel for the CPU")
    bound.build(checking=checking)
    on_phase("what it should give, in float64")
    trial.expect(choice)
    check, failure, done, start = None, None, 0, time.perf_counter()
    while done < schedules and failure is None and (check is None or check.ok):
        seed, done = options.seed + done, done + 1
        on_phase(f"emulating, schedule {done} of {schedules}")
        try:
            bound.launch(Schedule.seeded(seed), checking=checking)
            check = trial.check(bound)
        except KernelError as error:
            check, failure = None, str(error)
    return Emulation(
        machine=machine(arch),
        wanted=wanted,
        kernel=choice.name,
        config=choice.describe(),
        checking=checking,
        seed=options.seed,
        schedules=done,
        failure=failure,
        check=check,
        seconds=time.perf_counter() - start,
    )
