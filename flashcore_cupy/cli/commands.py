"""The command line: options in, library calls, tables or JSON out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from flashcore_cupy._version import __version__
from flashcore_cupy.check import doctor
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.cli import plots, tables
from flashcore_cupy.cli.emulate import emulate_command
from flashcore_cupy.cli.errors import OneLineErrors
from flashcore_cupy.cli.options import (
    PICTURES,
    arch_option,
    bad_input,
    check_arch,
    emulate_option,
    finite,
    json_option,
    missing_extra,
    overrides_of,
    problem_options,
    refuse_beside,
    selection_options,
    target_of,
    timing_options,
    writable,
)
from flashcore_cupy.cli.output import json_text, report
from flashcore_cupy.cli.progress import Steps, orderly_end
from flashcore_cupy.cli.run_page import run_table
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import cache, compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.measure import job, ladder

#: A call of more operations takes NumPy seconds, at the least; and a kernel, emulated.
_LONG_FLOPS, _LONG_EMULATED = 5e10, 5e9


#: \b keeps the lines below it as they are.
_HELP = """Fused attention for CuPy arrays: run, check and time its kernels.

\b
run --B 1 --H 8 --S 512    one kernel: check it, time it
ladder --plot ladder.png   all kernels, side by side
doctor                     what would make a first call fail

Without a GPU, kernels run on the CPU, emulated, if there is a C++ compiler:
that says whether they are right, and nothing of their speed."""


@click.group(
    cls=OneLineErrors, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="flashcore-cupy")
def main() -> None:
    """Fused attention for CuPy arrays: run, check and time its kernels."""


main.add_command(emulate_command)


@main.command("run")
@problem_options
@selection_options
@timing_options
@click.option(
    "--graph/--no-graph",
    default=True,
    show_default=True,
    help="Also time the kernel in a CUDA graph.",
)
@emulate_option
@arch_option
@json_option
def run_command(
    kernel: str,
    changes: tuple[str, ...],
    seed: int,
    warmup: int,
    iters: int,
    graph: bool,
    emulate: bool,
    arch: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Run one kernel on random inputs, check it against float64, and time it.

    With --backward, the kernels of the gradients of q, k and v. Without a GPU, kernels are emulated
    and not timed; without a C++ compiler, too, NumPy runs in their place. "ran" in the JSON says
    which of them did. Exit code 1: the check failed, or a kernel does not compile. 2: bad input.
    """
    target = target_of(arch)
    options = job.Options(kernel, overrides_of(changes), seed, warmup, iters, graph, emulate)
    with bad_input():
        wanted = job.pass_of(**asked)
        choice = job.choose(wanted, target, options)
        wanted.check_memory()
    _note_what_runs(emulate, "the job runs on NumPy arrays", wanted.flops)
    with Steps() as steps:
        result = job.run(wanted, choice, target, options, steps.phase)
    report(as_json, result.to_json(), lambda _: run_table(result))
    if not result.check.ok:
        raise click.exceptions.Exit(1)


@main.command("explain")
@problem_options
@selection_options
@click.option(
    "--arch",
    metavar="TARGET",
    help=f"Target to choose for [the GPU's own, or {targets.DEFAULT_ARCH} without one].",
)
@json_option
def explain_command(
    kernel: str, changes: tuple[str, ...], arch: str | None, as_json: bool, **asked: Any
) -> None:
    """Tell which kernel a problem gets, and why the faster ones are passed over.

    Builds and runs nothing. Exit code 2: no kernel can do it, or bad input.
    """
    target = target_of(arch, gpu_decides=arch is None)
    options = job.Options(kernel, overrides_of(changes))
    with bad_input():
        wanted = job.pass_of(**asked)
        choice = job.choose(wanted, target, options)
    data = {
        "problem": wanted.to_json(),
        "arch": target,
        "kernel": choice.name,
        "config": choice.describe(),
        "passed_over": dict(choice.passed_over),
    }
    report(as_json, data, lambda _: tables.explanation(choice, target))


@main.command("ladder")
@problem_options
@timing_options
@emulate_option
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    callback=writable(*PICTURES),
    metavar="FILE",
    help="Draw the latencies into an existing folder: .png, .svg or .pdf.",
)
@click.option(
    "--baseline-us",
    type=float,
    multiple=True,
    callback=finite,
    help="Latency of something else on the same problem, drawn as a line; may be repeated.",
)
@click.option("--baseline-name", multiple=True, help="Its name, one per --baseline-us.")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show or draw the JSON of an earlier ladder instead of running one.",
)
@arch_option
@json_option
def ladder_command(
    plot: Path | None,
    baseline_us: tuple[float, ...],
    baseline_name: tuple[str, ...],
    source: Path | None,
    arch: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Build, launch, check and time every kernel on one problem, side by side.

    A kernel that lacks a rule is shown with the reason. Without a GPU, kernels are emulated and
    not timed.
    Exit code 1: a kernel failed. 2: bad input.
    """
    if len(baseline_name) > len(baseline_us):
        raise click.UsageError("--baseline-name: give a --baseline-us for each")
    if source is not None:
        refuse_beside("--from", ("source", "plot", "baseline_us", "baseline_name", "as_json"))
    if plot is not None:
        with missing_extra():
            plots.require_matplotlib()
    names = [*baseline_name, *["baseline"] * len(baseline_us)]
    baselines = tuple(ladder.Baseline(*pair) for pair in zip(names, baseline_us, strict=False))
    if source is not None:
        result = _read_ladder(source, baselines)
    else:
        result = _climb(asked, arch, baselines)
    if plot is not None:
        plots.draw(result, plot)
    report(as_json, result.to_json(), lambda columns: tables.ladder_table(result, columns))
    if not result.ok:
        raise click.exceptions.Exit(1)


def _climb(
    asked: dict[str, Any], arch: str | None, baselines: tuple[ladder.Baseline, ...]
) -> ladder.Ladder:
    timing = {name: asked.pop(name) for name in ("seed", "iters", "warmup")}
    emulate = asked.pop("emulate")
    target = target_of(arch)
    with bad_input():
        wanted = job.pass_of(**asked)
        if compiler.no_gpu_reason() is None or emulate:  # else no array is made
            wanted.check_memory()
    if compiler.no_gpu_reason() is not None:
        flops = wanted.flops * len(wanted.ladder) if emulate else 0
        _note_what_runs(emulate, "kernels are compiled, not run", flops)
    with orderly_end(), Steps() as steps:
        return ladder.climb(
            wanted,
            target,
            baselines=baselines,
            emulate=emulate and build.why_not() is None,
            on_start=steps.start,
            on_step=steps.step,
            **timing,
        )


def _read_ladder(source: Path, baselines: tuple[ladder.Baseline, ...]) -> ladder.Ladder:
    try:
        result = ladder.Ladder.from_json(json.loads(source.read_text(encoding="utf-8")))
    except ValueError as error:
        raise click.UsageError(f"--from: {source} is not the JSON of a ladder: {error}") from error
    return replace(result, baselines=result.baselines + baselines)


@main.command("selftest")
@click.option("--quick", is_flag=True, help="Every seventh case.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    callback=writable(),
    metavar="FILE",
    help="Also write the JSON into this file.",
)
@json_option
def selftest_command(quick: bool, output: Path | None, as_json: bool) -> None:
    """Check every kernel: dtypes, head dims, shapes, views, gates, rules.

    Without a GPU kernels are emulated. On 2 cores that takes about 6 minutes with --quick and an
    hour without, and a quarter of it once all is in the cache. Exit code 1: a case failed, or there
    is neither a GPU nor a C++ compiler.
    """
    reason = compiler.no_gpu_reason()
    if reason is not None:
        why = build.why_not()
        if why is not None:
            raise click.ClickException(
                f"selftest needs a GPU ({reason}), or a C++ compiler to emulate it: {why}"
            )
        _note_missing_gpu("kernels are emulated")
    with orderly_end(), Steps() as steps:
        result = matrix.run_all(quick=quick, on_start=steps.start, on_step=steps.step)
    if output is not None:
        output.write_text(json_text(result) + "\n", encoding="utf-8")
    report(as_json, result, lambda _: tables.selftest_table(result))
    if result["failed"]:
        raise click.exceptions.Exit(1)


@main.command("doctor")
@json_option
def doctor_command(as_json: bool) -> None:
    """Look for what would make a first call fail, and say the cure of each.

    Exit code 1: there is something to cure.
    """
    result = doctor.examine()
    report(as_json, result.to_json(), lambda _: tables.doctor_table(result))
    if not result.ok:
        raise click.exceptions.Exit(1)


class _Warmup(click.Command):
    """Its help says how many kernels there are: the table's rows are counted, not written down."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        counts = (
            f"{len(list(builds.table_configs(builds.KERNELS, arch)))} for {arch}"
            for arch in targets.TARGETS
        )
        formatter.write_paragraph()
        formatter.write_text(
            f"Kernels, of which each takes one core about a second: {', '.join(counts)}. Those "
            "that are in the cache take no time."
        )


@main.command("warmup", cls=_Warmup)
@click.option(
    "--arch",
    "archs",
    metavar="TARGET",
    multiple=True,
    help="Target such as sm_90a, may be repeated; default: the GPU's own, "
    f"{targets.DEFAULT_ARCH} without one.",
)
@click.option("--all", "everything", is_flag=True, help=f"Targets {', '.join(targets.TARGETS)}.")
@click.option(
    "--kernel",
    "kernels",
    type=click.Choice(builds.KERNELS),
    multiple=True,
    help="Only this kernel; may be repeated.",
)
@json_option
def warmup_command(
    archs: tuple[str, ...], everything: bool, kernels: tuple[str, ...], as_json: bool
) -> None:
    """Compile the table's rows into the cache ahead of time, in parallel; needs no GPU.

    Rows that a target cannot run are left out.
    """
    every = targets.TARGETS if everything else (target_of(None),)
    chosen = tuple(dict.fromkeys(archs or every))
    names = tuple(dict.fromkeys(kernels or builds.KERNELS))
    for arch in chosen:
        check_arch(arch)
    wanted = [(c, arch) for arch in chosen for c in builds.table_configs(names, arch)]
    pairs = ((name, arch, builds.why_none(name, arch)) for arch in chosen for name in names)
    without = [pair for pair in pairs if pair[2] is not None]
    with orderly_end(), Steps() as steps:
        steps.start(len(wanted), "compiling")
        made = builds.build_all(wanted, lambda done: steps.step(builds.what(done)))
    data = {
        "kernels": [{"kernel": b.kernel, "arch": b.arch, **b.resources()} for b in made],
        "left_out": [{"kernel": k, "arch": arch, "reason": why} for k, arch, why in without],
    }
    report(as_json, data, lambda columns: tables.warmup_table(made, without, columns))


@main.command("cache")
@click.option("--clear", is_flag=True, help="Remove every compiled kernel.")
@json_option
def cache_command(clear: bool, as_json: bool) -> None:
    """Show the compiled kernels on disk, or remove them."""
    cleared = cache.clear_cache() if clear else None
    entries = cache.cache_entries()
    folder = str(cache.cache_dir())
    data = {
        "folder": folder,
        "size_bytes": sum(entry.size_bytes for entry in entries),
        "cleared": cleared,
        "entries": [asdict(entry) | {"path": str(entry.path)} for entry in entries],
    }
    if clear and not as_json:
        click.echo(f"removed {cleared} kernels")
    report(as_json, data, lambda _: tables.cache_table(folder, entries))


def _note_missing_gpu(what: str) -> None:
    reason = compiler.no_gpu_reason()
    if reason is not None:
        click.echo(f"no GPU ({reason}): {what}", err=True)


def _note_what_runs(emulate: bool, otherwise: str, flops: float) -> None:
    """Say without a GPU whether kernels are emulated, and that it takes long if it does."""
    why = build.why_not() if emulate else None
    is_emulated = emulate and why is None
    instead = otherwise if why is None else f"{otherwise}; {why}"
    _note_missing_gpu("emulated on the CPU" if is_emulated else instead)
    if compiler.no_gpu_reason() is None or flops < (_LONG_EMULATED if is_emulated else _LONG_FLOPS):
        return
    takes = "minutes; --no-emulate is faster" if is_emulated else "seconds or minutes"
    click.echo(f"that is {flops / 1e12:.2g} TFLOP, which take a CPU {takes}", err=True)
