"""Attention next to torch's on one GPU, in one process, taking turns: speed.

``python benchmarks/peers.py all --json peers.json --plots plots``; needs this package installed (or
PYTHONPATH=.), torch with a GPU, and matplotlib for pictures. ``--from peers.json`` draws a result
again, without a GPU.
"""

from __future__ import annotations

from pathlib import Path

import click
from side_by_side import cells, plots, tables
from side_by_side.backends import Ours, Torch, call_of, compile_ahead, require_torch
from side_by_side.measure import METHODS, Bench
from side_by_side.results import PEERS, Report
from side_by_side.timing import Gpu

from flashcore_cupy.cli.tables import console, progress
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.select.registry import KERNELS


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("group", type=click.Choice((*cells.GROUPS, "all")), default="all")
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False)
)
@click.option("--plots", "folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--kernel", type=click.Choice(("auto", *KERNELS)), default="auto", help="Ours by this kernel."
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
    source: Path | None,
) -> None:
    """Compare with torch's attention backends, cell by cell.

    Exit code 1: ours failed or was wrong in some cell.
    """
    groups = cells.GROUPS if group == "all" else (group,)
    try:
        if source is None:
            report = _measure(groups, rounds, kernel, json_path)
        else:
            report = Report.load(source)
            report.rows = [row for row in report.rows if row.cell.group in groups]
        console().print(tables.report_tables(report))
        if folder is not None:
            for path in plots.draw(report, folder):
                click.echo(f"wrote {path}", err=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if not report.ok:
        raise click.exceptions.Exit(1)


def _measure(groups: tuple[str, ...], rounds: int, kernel: str, json_path: Path | None) -> Report:
    """Measure all cells of some groups; the JSON is up to date after every cell."""
    torch = require_torch()
    wanted = [cell for group in groups for cell in cells.cells(group)]
    shown = console(stderr=True)
    with progress(shown) as bar:
        task = bar.add_task("compiling", total=None, last="")

        def on_done(done: compiler.CompiledKernel | Exception) -> None:
            bar.update(task, advance=1, last=builds.what(done))

        compile_ahead([call_of(cell, kernel) for cell in wanted], on_done)
        gpu = Gpu(torch)
        methods = {group: METHODS[group] for group in groups}
        report = Report(gpu.machine(), gpu.ceilings(), methods)
        bench_ = Bench(gpu, [Ours(torch, kernel), *(Torch(torch, name) for name in PEERS)], rounds)
        bar.reset(task, description="measuring", total=len(wanted))
        for cell in wanted:
            bar.update(task, last=f"{cell.group} {cell.name}")
            report.rows.append(bench_.row(cell))
            bar.advance(task)
            if json_path is not None:
                report.save(json_path)
    return report


if __name__ == "__main__":
    main()
