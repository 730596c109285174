"""Break the kernels, one place at a time, and see whether runs on the CPU find it.

    python tests/mutate_barriers.py                      every place, but those known to live
    python tests/mutate_barriers.py --known              those, too
    python tests/mutate_barriers.py --kernel mma_sm80 --only work.cuh
    python tests/mutate_barriers.py --tenth 3            a tenth, in the checking build alone

A place is tried for each kernel that has it: on the kernel's trials of ``cases_mutants.py``, in
their order, until one finds something; in the plain build, then in the checking one, each in
several schedules.
"""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in conftest.py

import click
import mutants
from cases_mutants import KNOWN, TRIALS, Trial
from helpers import ROOT
from mutants import Mutant
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from flashcore_cupy.cpu.emulator.run import KernelError, Schedule
from flashcore_cupy.jit.compiler import usable_cores

#: Of each build of a trial. What a bound does hardly depends on the order of things.
SCHEDULES: dict[mutants.Kind, tuple[Schedule, ...]] = {
    "barrier": (Schedule(1, 20), Schedule(2, 0), Schedule(3, 100)),
    "bound": (Schedule(1, 20),),
}
# Seconds of processor time: a run that takes so long never ends. With something broken it may take
# a few times as long as the trial did in all schedules with nothing broken.
_PATIENCE, _TIMES = 60, 3
_NONE = -1
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Found:
    """What was found of a mutant of a kernel."""

    kernel: str
    name: str
    kind: mutants.Kind
    line: int
    reached: bool = False
    """Whether some trial of the kernel comes to the place."""
    trial: str = ""
    """The trial that found it, and in which build; empty if none did."""
    what: str = ""
    """What was wrong there."""
    seconds: float = 0.0
    """Of processor time."""


# ---- runs in a process of their own, which may crash or never end --------------------------------


@dataclass(frozen=True)
class Run:
    """A trial in one of its builds."""

    trial: Trial
    checking: bool

    @property
    def name(self) -> str:
        return self.trial.name + (", checking" if self.checking else "")

    def libraries(self) -> list[ctypes.CDLL]:
        """What it runs, compiled."""
        return self.trial.libraries(checking=self.checking)

    def finds(self, schedule: Schedule) -> str:
        """What is wrong; empty if nothing is."""
        try:
            result = self.trial.run(schedule, checking=self.checking)
        except KernelError as error:
            return str(error)
        return "" if result.ok else f"wrong result: {result.reason}"


class Job:
    """A mutant's runs, until something is wrong."""

    def __init__(
        self, mutant: int, kind: mutants.Kind, runs: Sequence[Run], places: int, patience: int
    ) -> None:
        self.mutant = mutant
        self.run, self.what, self.seconds = "", "", 0.0
        self.reached: set[int] = set()
        self.messages, theirs = _FORK.Pipe(duplex=False)
        arguments = (mutant, SCHEDULES[kind], runs, places, patience, theirs)
        self._process = _FORK.Process(target=_work, args=arguments)
        self._process.start()
        theirs.close()

    def is_over(self) -> bool:
        """Take what the process has said."""
        try:
            while self.messages.poll():
                said = self.messages.recv()
                if isinstance(said, Exception):
                    raise said
                self.run, self.what, self.reached, self.seconds = said
            return False
        except EOFError:
            self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            self.what = "never ends" if name == "SIGXCPU" else f"crash: {name}"
        return True


def _work(
    mutant: int,
    schedules: Sequence[Schedule],
    runs: Sequence[Run],
    places: int,
    patience: int,
    to: Connection,
) -> None:
    try:
        for run in runs:
            libraries = run.libraries()
            for library in libraries:
                ctypes.c_int.in_dll(library, "flashcore_broken").value = mutant
            for schedule in schedules:
                used = time.process_time()
                to.send((run.name, "", set(), used))
                limit = math.ceil(used) + patience, resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_CPU, limit)
                what = run.finds(schedule)
                to.send((run.name, what, _reached(libraries, places), time.process_time()))
                if what:
                    return
    except Exception as error:  # of this program, not of a kernel
        to.send(error)
    finally:
        to.close()
        os._exit(0)


def _reached(libraries: Iterable[ctypes.CDLL], places: int) -> set[int]:
    arrays = [(ctypes.c_ubyte * places).in_dll(each, "flashcore_reached") for each in libraries]
    return {place for array in arrays for place in range(places) if array[place]}


def _all(jobs: Iterable[Callable[[], Job]]) -> Iterator[Job]:
    """Start jobs, as many at a time as there are cores, and yield each when it is over."""
    running: list[Job] = []
    cores = usable_cores()
    for start in jobs:
        running.append(start())
        while len(running) >= cores:
            yield from _over(running)
    while running:
        yield from _over(running)


def _over(running: list[Job]) -> Iterator[Job]:
    wait([job.messages for job in running])
    for job in [job for job in running if job.is_over()]:
        running.remove(job)
        yield job


# ---- the hunt ------------------------------------------------------------------------------------


class Hunt:
    """The mutants of a kernel, tried on its trials until one finds them.

    ``copy``: the folder of kernels that has them; ``FLASHCORE_KERNELS_DIR`` names it. ``builds``:
    whether they are checking.
    """

    def __init__(
        self, copy: Path, kernel: str, places: Sequence[Mutant], builds: Sequence[bool]
    ) -> None:
        self.trials = [trial for trial in TRIALS if trial.case.kernel == kernel]
        self._copy, self._places, self._builds = copy, places, builds
        files = set[str]().union(*map(self._files, self.trials))
        mine = [place for place in places if place.file in files]
        self.found = {m.number: Found(kernel, m.name, m.kind, m.line) for m in mine}

    def keep(self, is_wanted: Callable[[Found], bool]) -> None:
        """Leave out all others."""
        self.found = {number: one for number, one in self.found.items() if is_wanted(one)}

    def build(self) -> None:
        """Compile what the trials run."""
        runs = [run for trial in self.trials if self._alive(trial) for run in self._runs(trial)]
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(Run.libraries, runs))

    def go(self, trial: Trial) -> Iterator[Found]:
        """Try all that are alive and that the trial comes to; yield what was found of each."""
        alive, runs = self._alive(trial), self._runs(trial)
        if not alive:
            return
        reached: set[int] = set()
        patience = 1
        for job in _all(self._job(_NONE, "barrier", [run], _PATIENCE) for run in runs):
            if job.what:
                raise RuntimeError(f"{job.run}, with nothing broken: {job.what}")
            reached |= job.reached
            patience = max(patience, math.ceil(_TIMES * job.seconds))
        tried = [mutant for mutant in alive if mutant.number in reached]
        for job in _all(self._job(m.number, m.kind, runs, patience) for m in tried):
            before = self.found[job.mutant]
            self.found[job.mutant] = replace(
                before,
                reached=True,
                trial=job.run if job.what else "",
                what=job.what,
                seconds=round(before.seconds + job.seconds, 2),
            )
            yield self.found[job.mutant]

    def _alive(self, trial: Trial) -> list[Mutant]:
        """Those of the files that the trial's kernel includes."""
        files = self._files(trial)
        alive = (self._places[n] for n, found in self.found.items() if not found.trial)
        return [mutant for mutant in alive if mutant.file in files]

    def _runs(self, trial: Trial) -> list[Run]:
        return [
            Run(trial, checking) for checking in (self._builds if trial.is_checked else [False])
        ]

    def _files(self, trial: Trial) -> set[str]:
        sources = [source.file for source in trial.sources()]
        return set[str]().union(*(mutants.included(self._copy, file) for file in sources))

    def _job(
        self, mutant: int, kind: mutants.Kind, runs: Sequence[Run], patience: int
    ) -> Callable[[], Job]:
        return lambda: Job(mutant, kind, runs, len(self._places), patience)


def keep_tenth(hunts: Sequence[Hunt], tenth: int) -> None:
    """Leave out the others: what is left is of one kernel or two, so that few are compiled."""
    everything = [found for hunt in hunts for found in hunt.found.values()]
    first, end = (len(everything) * n // 10 for n in (tenth, tenth + 1))
    kept = set(everything[first:end])
    for hunt in hunts:
        hunt.keep(kept.__contains__)


@click.command(context_settings={"max_content_width": 100})
@click.option("--kernel", default="", help="Only this kernel.")
@click.option("--only", default="", help="Only places with this in their name.")
@click.option("--tenth", type=click.IntRange(0, 9), help="Only this tenth, in the checking build.")
@click.option("--known", is_flag=True, help="Also those that are known to live.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write what was found.")
def main(kernel: str, only: str, tenth: int | None, known: bool, report: Path | None) -> None:
    """Break the kernels, one place at a time, and see whether runs on the CPU find it.

    The exit code is 1 if they do not, and the place is not known to live.
    """
    console, began = Console(), time.monotonic()
    kernels = [one for one in dict.fromkeys(t.case.kernel for t in TRIALS) if kernel in ("", one)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "kernels")
        places = mutants.write(ROOT / "kernels", copy)
        os.environ["FLASHCORE_KERNELS_DIR"] = str(copy)
        builds = (False, True) if tenth is None else (True,)
        hunts = [Hunt(copy, one, places, builds) for one in kernels]
        if tenth is not None:
            keep_tenth(hunts, tenth)
        for hunt in hunts:
            hunt.keep(lambda found: only in found.name and (known or not why_known(found)))
        with Progress(console=console, auto_refresh=False) as progress:
            task = progress.add_task("", total=sum(len(hunt.trials) for hunt in hunts))
            for hunt in hunts:
                progress.update(task, description="builds", refresh=True)
                hunt.build()
                for trial in hunt.trials:
                    progress.update(task, description=trial.name, refresh=True)
                    for found in hunt.go(trial):
                        if found.trial:
                            progress.print(escape(f"{found.trial}: {found.name}"))
                    progress.advance(task)
    everything = [found for hunt in hunts for found in hunt.found.values()]
    reached = {found.name for found in everything if found.reached}
    # A kernel has the places that its trials come to. Each place is some kernel's.
    tried = [found for found in everything if found.reached or found.name not in reached]
    if tenth is not None or kernel:
        tried = [found for found in tried if found.reached]
    if report:
        report.write_text(json.dumps([asdict(found) for found in tried], indent=1) + "\n")
    console.print(_alive(tried), _scores(tried))
    console.print(f"{time.monotonic() - began:.0f} s")
    sys.exit(any(not found.trial and not why_known(found) for found in tried))


def why_known(found: Found) -> str:
    """Why nothing finds it; empty if it is not known to live."""
    return KNOWN.get(found.name, "") or KNOWN.get(f"{found.kernel}, {found.name}", "")


def _alive(tried: Sequence[Found]) -> Table:
    table = Table("kernel", "line", "place that lives", "why")
    for found in tried:
        if not found.trial:
            why = why_known(found) if found.reached else "no trial comes to it"
            table.add_row(found.kernel, str(found.line), escape(found.name), why)
    return table


def _scores(tried: Sequence[Found]) -> Table:
    table = Table("kind", "kernel", "tried", "found", "by the checking build alone")
    for kind in SCHEDULES:
        for kernel in dict.fromkeys(found.kernel for found in tried):
            of = [found for found in tried if (found.kind, found.kernel) == (kind, kernel)]
            dead = [found for found in of if found.trial]
            alone = [found for found in dead if found.trial.endswith(", checking")]
            table.add_row(kind, kernel, *(str(len(each)) for each in (of, dead, alone)))
    return table


if __name__ == "__main__":
    main()
