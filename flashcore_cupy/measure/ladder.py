"""Every kernel of the ladder on one problem: does it build, launch, get it right, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from flashcore_cupy.check.machine import machine
from flashcore_cupy.cpu.emulator.build import Source, build_libraries
from flashcore_cupy.cpu.emulator.run import KernelError
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.launch import builds
from flashcore_cupy.measure.passes import Checked, Choice, Pass, Trial
from flashcore_cupy.measure.timing import Timing, time_graph

#: What JSON has for the types of a rung's fields.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
}


@dataclass(frozen=True)
class Rung:
    """One row. None: not known, for want of a GPU or because an earlier stage failed."""

    kernel: str
    idea: str
    config: str | None = None
    refused: str | None = None
    """Why the kernel cannot do this problem."""
    failure: str | None = None
    """What went wrong, of a kernel that can."""
    builds: bool | None = None
    launches: bool | None = None
    correct: bool | None = None
    max_error: float | None = None
    mean_error: float | None = None
    allowed_error: float | None = None
    quantization_error: float | None = None
    latency_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    speedup: float | None = None
    registers: int | None = None
    shared_bytes: int | None = None
    local_bytes: int | None = None
    spill_bytes: int | None = None
    compile_seconds: float | None = None
    from_cache: bool | None = None


@dataclass(frozen=True)
class Baseline:
    """Another implementation's latency on the same problem and GPU, microseconds."""

    name: str
    us: float


@dataclass(frozen=True)
class Ladder:
    """All rungs with the problem and the machine; its JSON is enough to draw it again."""

    problem: Mapping[str, Any]
    machine: Mapping[str, Any]
    rungs: tuple[Rung, ...]
    baselines: tuple[Baseline, ...] = ()
    rows_checked: int | None = None
    """Query rows of each head that were checked, of ``problem["S"]``."""
    emulated: bool = False
    """Whether the kernels ran on a CPU, which tells nothing of their latency."""
    heads_checked: int | None = None
    """Of gradients: heads of k and v, of all batches together, of which all rows were checked."""

    @property
    def ok(self) -> bool:
        """Whether every kernel that can do the problem did it right, as far as it was tried."""
        return not any(rung.failure for rung in self.rungs)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {"ok": self.ok, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ladder:
        """Read what ``to_json`` gave. Raises ``ValueError`` for anything else."""
        try:
            rungs = tuple(_rung_of(rung) for rung in data["rungs"])
            baselines = tuple(Baseline(str(b["name"]), float(b["us"])) for b in data["baselines"])
            for name in ("B", "H", "Hkv", "S", "Skv", "D", "dtype", "causal"):
                data["problem"][name]  # what a page cannot do without
            data["machine"]["arch"]
            rows, is_emulated = data["rows_checked"], bool(data.get("emulated"))
            heads = data.get("heads_checked")
            return cls(data["problem"], data["machine"], rungs, baselines, rows, is_emulated, heads)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _rung_of(data: Mapping[str, Any]) -> Rung:
    """A row of the JSON, whatever else it holds; ``TypeError`` for a value of a wrong kind."""
    values = {field.name: data[field.name] for field in fields(Rung) if field.name in data}
    for field in fields(Rung):
        kind, _, optional = str(field.type).partition(" | ")
        value = values.get(field.name)
        if not isinstance(value, _KINDS[kind]) and not (optional and value is None):
            raise TypeError(f"{field.name} is {value!r}")
    return Rung(**values)


def climb(
    wanted: Pass,
    arch: str,
    *,
    iters: int = 100,
    warmup: int = 10,
    seed: int = 0,
    baselines: Iterable[Baseline] = (),
    emulate: bool = False,
    on_start: Callable[[int, str], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Ladder:
    """Build every rung for ``arch`` in parallel, then check and time each on the GPU, if any.

    ``emulate``: without a GPU, check each on the CPU. ``on_start(steps, words)`` announces a phase
    (of 0 steps, if nothing tells how far it is), ``on_step(words)`` each of its steps.
    """
    announce = on_start or (lambda steps, words: None)
    step = on_step or (lambda words: None)
    chosen = {name: _choose(wanted, arch, name) for name in wanted.ladder}
    rungs = _build(wanted, chosen, arch, announce, step)
    on_gpu = compiler.no_gpu_reason() is None
    emulate = emulate and not on_gpu
    extent: Mapping[str, int] = {}
    if on_gpu or emulate:
        announce(0, "making inputs and what they should give, in float64")
        trial = wanted.trial(seed)
        trial.expect()
        extent = trial.extent
    if on_gpu:
        announce(len(rungs), "checking and timing")
        rungs = [_measured(rung, trial, iters, warmup, step) for rung in rungs]
        rungs = _with_speedup(rungs)
    elif emulate:
        rungs = _emulated(rungs, chosen, trial, arch, announce, step)
    return Ladder(
        wanted.to_json() | {"seed": seed},
        machine(arch).to_json(),
        tuple(rungs),
        tuple(baselines),
        emulated=emulate,
        **extent,
    )


def _choose(wanted: Pass, arch: str, kernel: str) -> Choice | str:
    """Its choice, or why it has none."""
    try:
        return wanted.choose(arch, kernel)
    except ValueError as error:
        return str(error).removeprefix(f"kernel {kernel!r}: ")


def _build(
    wanted: Pass,
    chosen: Mapping[str, Choice | str],
    arch: str,
    announce: Callable[[int, str], None],
    step: Callable[[str], None],
) -> list[Rung]:
    pairs = [
        (config, arch)
        for choice in chosen.values()
        if not isinstance(choice, str)
        for config in choice.configs
    ]
    announce(len(pairs), "compiling")
    made = iter(builds.build_each(pairs, lambda done: step(builds.what(done))))
    rungs = []
    for name, choice in chosen.items():
        rung = Rung(name, wanted.ladder[name])
        if isinstance(choice, str):
            rungs.append(replace(rung, refused=choice))
        else:
            parts = [next(made) for _ in choice.configs]
            rungs.append(_built(replace(rung, config=choice.describe()), parts))
    return rungs


def _built(rung: Rung, parts: Sequence[builds.Build | nvrtc.CompileError]) -> Rung:
    errors = [str(part) for part in parts if isinstance(part, nvrtc.CompileError)]
    if errors:
        return replace(rung, builds=False, failure=errors[0])
    made = [part for part in parts if isinstance(part, builds.Build)]
    return replace(
        rung,
        builds=True,
        compile_seconds=sum(build.compile_seconds for build in made),
        from_cache=all(build.from_cache for build in made),
        **builds.combined(made),
    )


def _emulated(
    rungs: Sequence[Rung],
    chosen: Mapping[str, Choice | str],
    trial: Trial,
    arch: str,
    announce: Callable[[int, str], None],
    step: Callable[[str], None],
) -> list[Rung]:
    """Check each kernel on the CPU; whether NVRTC builds it, too, is known."""
    wanted = [
        Source.of(config, arch)
        for choice in chosen.values()
        if not isinstance(choice, str)
        for config in choice.configs
    ]
    announce(len(wanted), "compiling for the CPU")
    build_libraries(wanted, step)
    announce(len(rungs), "emulating")
    checked = []
    for rung in rungs:
        if not rung.refused:
            rung = _launched_on_cpu(rung, trial, arch)
        checked.append(rung)
        step(rung.kernel)
    return checked


def _launched_on_cpu(rung: Rung, trial: Trial, arch: str) -> Rung:
    bound = trial.emulated(arch, rung.kernel)
    try:
        bound.launch()
    except (nvrtc.CompileError, KernelError) as error:
        return replace(rung, launches=False, failure=rung.failure or str(error))
    return _judged(rung, trial.check(bound))


def _measured(
    rung: Rung, trial: Trial, iters: int, warmup: int, step: Callable[[str], None]
) -> Rung:
    if rung.builds:
        rung = _launched(rung, trial, iters, warmup)
    step(rung.kernel)
    return rung


def _launched(rung: Rung, trial: Trial, iters: int, warmup: int) -> Rung:
    import cupy

    try:
        bound = trial.on_gpu(rung.kernel)
        bound.launch()
        cupy.cuda.get_current_stream().synchronize()
    except (cupy.cuda.runtime.CUDARuntimeError, MemoryError) as error:
        return replace(rung, launches=False, failure=str(error))
    rung = _judged(rung, trial.check(bound))
    return _timed(rung, time_graph(bound, iters=iters, warmup=warmup))


def _judged(rung: Rung, check: Checked) -> Rung:
    return replace(
        rung,
        launches=True,
        correct=check.ok,
        failure=rung.failure or check.reason or None,
        max_error=check.comparison.max_error,
        mean_error=check.comparison.mean_error,
        allowed_error=check.comparison.allowed_error,
        quantization_error=check.quantization_error,
    )


def _timed(rung: Rung, timing: Timing) -> Rung:
    return replace(
        rung,
        latency_us=timing.median_us,
        p10_us=timing.p10_us,
        p90_us=timing.p90_us,
    )


def _with_speedup(rungs: Sequence[Rung]) -> list[Rung]:
    """Speed-ups over the first rung that has a latency."""
    first = next((rung.latency_us for rung in rungs if rung.latency_us), None)
    return [
        replace(rung, speedup=first / rung.latency_us) if first and rung.latency_us else rung
        for rung in rungs
    ]
