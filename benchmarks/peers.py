"""Attention next to torch's and FlashAttention-4 on one GPU, in one process, taking turns: speed.

``python benchmarks/peers.py all --json peers.json --plots plots``; needs this package installed (or
PYTHONPATH=.), torch with a GPU, flash-attn-4 if that is to be compared, and matplotlib for
pictures. ``--from peers.json`` draws a result again, without a GPU. ``--joules 2`` adds energy.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
from side_by_side import backends, backward, cells, plots, tables
from side_by_side.cells import Cell
from side_by_side.joules import Joules, meter_of
from side_by_side.measure import METHODS, Bench
from side_by_side.results import LOAD, Report
from side_by_side.timing import Gpu

from flashcore_cupy.cli.tables import console, progress
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS
from flashcore_cupy.select.registry import KERNELS


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("group", type=click.Choice((*cells.GROUPS, "all")), default="all")
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False)
)
@click.option("--plots", "folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--kernel",
    type=click.Choice(("auto", *KERNELS, *BACKWARD_KERNELS)),
    default="auto",
    help="Ours by this kernel, in cells of its pass.",
)
@click.option(
    "--cells",
    "pattern",
    metavar="PATTERN",
    default="*",
    help="Only cells whose names match, as 'D128*c1'.",
)
@click.option(
    "--joules",
    "seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    help="Also measure energy, under so many seconds of load per backend, where cells are rates of "
    "arithmetic.",
)
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Show this result instead of measuring.",
)
def main(
    group: str,
    json_path: Path | None,
    folder: Path | None,
    rounds: int,
    kernel: str,
    pattern: str,
    seconds: float | None,
    source: Path | None,
) -> None:
    """Compare with torch's attention and FlashAttention-4, cell by cell.

    Exit code 1: ours failed or was wrong in some cell.
    """
    groups = cells.GROUPS if group == "all" else (group,)

    def wanted(cell: Cell) -> bool:
        return cell.group in groups and fnmatchcase(cell.name, pattern)

    try:
        if source is None:
            chosen = [cell for group in groups for cell in cells.cells(group) if wanted(cell)]
        else:
            report = Report.load(source)
            report.rows = [row for row in report.rows if wanted(row.cell)]
            chosen = [row.cell for row in report.rows]
        if not chosen:
            raise ValueError(f"{group} has no cell whose name matches {pattern}")
        if source is None:
            report = _measure(chosen, rounds, kernel, seconds, json_path)
        console().print(tables.report_tables(report))
        if folder is not None:
            for path in plots.draw(report, folder):
                click.echo(f"wrote {path}", err=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if not report.ok:
        raise click.exceptions.Exit(1)


def _measure(
    wanted: list[Cell], rounds: int, kernel: str, seconds: float | None, json_path: Path | None
) -> Report:
    """Measure some cells; the JSON is up to date after every one."""
    torch = backends.require_torch()
    shown = console(stderr=True)
    with progress(shown) as bar:
        task = bar.add_task("compiling", total=None, last="")

        def on_done(done: compiler.CompiledKernel | Exception) -> None:
            bar.update(task, advance=1, last=builds.what(done))

        calls = [
            backends.call_of(cell, _of_pass(kernel, is_backward=cell.is_backward))
            for cell in wanted
        ]
        backends.compile_ahead(calls, on_done)
        bench, report = _prepared(torch, rounds, kernel, seconds)
        report.methods |= {cell.group: METHODS[cell.group] for cell in wanted}
        bar.reset(task, description="measuring", total=len(wanted))
        for cell in wanted:
            bar.update(task, last=f"{cell.group} {cell.name}")
            report.rows.append(bench.row(cell))
            bar.advance(task)
            if json_path is not None:
                report.save(json_path)
    return report


def _prepared(torch: Any, rounds: int, kernel: str, seconds: float | None) -> tuple[Bench, Report]:
    """What measures, and an empty report of the machine."""
    gpu, fa4 = Gpu(torch), backends.FlashAttention4(torch)
    joules = None if seconds is None else Joules(gpu, meter_of(gpu.bus_id), seconds)
    machine = gpu.machine() | {"fa4": fa4.version}
    methods = {} if joules is None else {LOAD: joules.method}
    ours = backends.Ours(torch, _of_pass(kernel, is_backward=False))
    compared = [ours, *backends.torchs(torch), fa4]
    gradients = backward.compared(torch, _of_pass(kernel, is_backward=True))
    bench = Bench(gpu, compared, rounds, joules, gradients)
    return bench, Report(machine, gpu.ceilings(), methods)


def _of_pass(kernel: str, *, is_backward: bool) -> str:
    """The kernel that was asked for, in cells of its pass; "auto" in the others."""
    return kernel if (kernel in BACKWARD_KERNELS) == is_backward else "auto"


if __name__ == "__main__":
    main()
