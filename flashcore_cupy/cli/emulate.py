"""The command `emulate`: a kernel on the CPU, for whoever writes it."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flashcore_cupy.cli import tables
from flashcore_cupy.cli.options import (
    POSITIVE,
    Whole,
    bad_input,
    check_arch,
    json_option,
    overrides_of,
    problem_options,
    selection_options,
)
from flashcore_cupy.cli.output import report
from flashcore_cupy.cli.plots import describe_problem
from flashcore_cupy.cli.progress import Steps
from flashcore_cupy.cli.run_page import check_text
from flashcore_cupy.cuda import targets
from flashcore_cupy.measure import emulation, job


@click.command("emulate")
@problem_options
@selection_options
@click.option(
    "--check",
    "checks",
    type=click.Choice(("races",)),
    help="Also look at every access to memory: races, strays, what nobody has written. Slow.",
)
@click.option(
    "--seed",
    type=Whole(0),
    metavar="N",
    default=0,
    show_default=True,
    help="Of the inputs, and of the order in which threads run and copies end.",
)
@click.option(
    "--schedules",
    type=POSITIVE,
    metavar="N",
    default=1,
    show_default=True,
    help="Orders to run it in: of this seed, and of the next ones.",
)
@click.option(
    "--arch",
    metavar="TARGET",
    help=f"Target that the kernel is built for [FLASHCORE_ARCH, or {targets.DEFAULT_ARCH}].",
)
@json_option
def emulate_command(
    kernel: str,
    changes: tuple[str, ...],
    checks: str | None,
    seed: int,
    schedules: int,
    arch: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Run a kernel on the CPU, thread by thread, and say what it does wrong.

    Its own text is compiled by a C++ compiler, that of FLASHCORE_KERNELS_DIR if it is set. Needs
    no GPU. Exit code 1: an error, a race, a wrong result, or it does not compile. 2: bad input.
    """
    target = targets.target_without_gpu(arch)
    check_arch(target)
    options = job.Options(kernel, overrides_of(changes), seed)
    with bad_input():
        wanted = job.pass_of(**asked)
        job.choose(wanted, target, options)
        wanted.check_memory()
    with Steps() as steps:
        result = emulation.emulate(
            wanted,
            target,
            options,
            schedules=schedules,
            checking=checks is not None,
            on_phase=steps.phase,
        )
    report(as_json, result.to_json(), lambda _: _page(result))
    if not result.ok:
        raise click.exceptions.Exit(1)


def _page(result: emulation.Emulation) -> Group:
    table: Table = tables.grid()
    table.add_row("kernel", f"{result.kernel} for {result.machine.arch}: {result.config}")
    problem = result.wanted.to_json()
    gate = f", gate {problem['gate']}" if problem["gate"] else ""
    table.add_row("problem", f"{describe_problem(problem)}{gate}, seed {result.seed}")
    last = result.seed + result.schedules - 1
    seeds = f"seed {last}" if last == result.seed else f"seeds {result.seed} to {last}"
    watched = ", each access watched" if result.checking else ""
    seconds = f"in {tables.significant(result.seconds)} s"
    table.add_row("emulated", f"schedules of {seeds}{watched}, {seconds}")
    if result.failure is not None:
        table.add_row("failed", Text(f"schedule of seed {last}\n{result.failure}", style="red"))
    if result.check is not None:
        table.add_row("check", check_text(result.check))
    return Group(table)
