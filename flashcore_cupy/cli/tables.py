"""Results as tables for people, by rich; the JSON of the same results is in `_cli`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, TextIO, cast

from rich import box
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from flashcore_cupy.check.doctor import Report
from flashcore_cupy.cli.plots import describe_problem
from flashcore_cupy.cli.terminal import PIPE_COLUMNS, Output, columns_of
from flashcore_cupy.jit.cache import CacheEntry
from flashcore_cupy.launch.builds import Build
from flashcore_cupy.measure.ladder import Ladder, Rung
from flashcore_cupy.measure.passes import Choice
from flashcore_cupy.problem.attention_problem import DTYPES

#: Columns in which every page of the command line has room for its figures.
FEWEST_COLUMNS = 60
_WIDE, _SHORT = 100, 80
_LADDER_COLUMNS = {
    **{name: name for name in ("rung", "builds", "launches", "correct", "error", "us")},
    **{"speedup": "speed-up", "registers": "registers", "shared": "shared KiB", "spills": "spills"},
}
_SHORT_NAMES = {"speedup": "speed", "registers": "regs", "shared": "KiB"}
_NARROW_LADDER = ("rung", "correct", "us", "speedup")


def console(*, stderr: bool = False, fewest: int = PIPE_COLUMNS) -> Console:
    """A console for results, or for progress and notes on stderr.

    ``fewest`` columns are what the tables need; in a file they get them.
    """
    stream = sys.stderr if stderr else sys.stdout
    output = cast(TextIO, Output(stream))
    width = columns_of(stream, fewest)
    # Unless it has a height, too, rich reads COLUMNS all the same, and fails on a number too long.
    height = None if width is None else 25
    return Console(file=output, width=width, height=height, highlight=False)


class _Count(MofNCompleteColumn):
    """Steps done of all, where their number is known."""

    def render(self, task: Task) -> Text:
        """Return nothing for a phase of which nothing tells how far it is."""
        return Text() if task.total is None else super().render(task)


def progress(shown: Console) -> Progress:
    """A progress bar that leaves nothing behind."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _Count(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}", style="dim"),
        console=shown,
        transient=True,
        disable=not shown.is_terminal,
    )


def clean(value: Any) -> Any:
    """Make a result valid JSON: NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): clean(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def _table(words: Sequence[str], figures: Sequence[str], columns: int = PIPE_COLUMNS) -> Table:
    """A table of columns of words, and of figures, which are not cut."""
    padding = (0, 1, 0, 0) if columns >= _WIDE else 0
    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def grid() -> Table:
    """A page of names and what is said of each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def ladder_table(ladder: Ladder, columns: int) -> Group:
    """What `ladder` prints: the table, and under it what went wrong or is told beside.

    ``columns`` is the terminal's width; 80 are enough for every figure, fewer for the most needed.
    """
    where = ladder.machine.get("gpu")
    if where is None:
        how = "emulated on the CPU" if ladder.emulated else "no GPU"
        where = f"{how}, built for {ladder.machine['arch']}"
    names = _LADDER_COLUMNS if columns >= _WIDE else _LADDER_COLUMNS | _SHORT_NAMES
    chosen = [name for name in names if columns >= _SHORT or name in _NARROW_LADDER]
    table = _table(("rung",), [names[name] for name in chosen[1:]], columns)
    title = f"FlashCore ladder · {where} · {describe_problem(ladder.problem)}"
    for name, column in zip(chosen, table.columns, strict=True):
        if name in ("builds", "launches", "correct"):
            column.justify = "center"
    for rung in ladder.rungs:
        cells = _rung_cells(rung)
        table.add_row(*map(cells.__getitem__, chosen), style="dim" if rung.refused else "")
    notes = (Text(note, style=style) for note, style in _ladder_notes(ladder))
    return Group(Text(title, style="italic"), table, "", *notes)


def _rung_cells(rung: Rung) -> Mapping[str, Text | str]:
    return {
        "rung": rung.kernel,
        "builds": _yes(rung.builds),
        "launches": _yes(rung.launches),
        "correct": _yes(rung.correct),
        "error": figure(rung.max_error, ".1e"),
        "us": "-" if rung.latency_us is None else significant(rung.latency_us),
        "speedup": "-" if rung.speedup is None else f"{significant(rung.speedup)}x",
        "registers": figure(rung.registers, "d"),
        "shared": "-" if rung.shared_bytes is None else kib(rung.shared_bytes),
        "spills": figure(rung.spill_bytes, "d"),
    }


def _ladder_notes(ladder: Ladder) -> Iterable[tuple[str, str]]:
    for rung in ladder.rungs:
        if rung.refused:
            yield f"{rung.kernel}: {rung.refused}", "dim"
        if rung.failure:
            yield f"{rung.kernel}: {rung.failure}", "red"
        if rung.quantization_error is not None:
            error = f"{rung.quantization_error:.2e}"
            yield f"{rung.kernel}: judged on its quantised inputs; quantisation error {error}", ""
    for baseline in ladder.baselines:
        yield f"{baseline.name}: {significant(baseline.us)} us", ""
    if ladder.rows_checked is not None:
        rows = f"{ladder.rows_checked} of {ladder.problem['S']} query rows of each head"
        what = f"max |o - float64 reference| over {rows}"
        if ladder.heads_checked is not None:
            heads = ladder.problem["B"] * ladder.problem["Hkv"]
            of = f"{ladder.heads_checked} of {heads} heads of k and v"
            what = f"max |x - float64 reference| of the gradient nearest to its limit, over {of}"
        yield f"error: {what}", "dim"
        if not ladder.emulated:
            yield "us: median in a replayed CUDA graph, inputs warm in L2", "dim"


def _yes(value: bool | None) -> Text:
    if value is None:
        return Text("-", style="dim")
    return Text("yes", style="green") if value else Text("NO", style="bold red")


def figure(value: float | None, style: str) -> str:
    """A number, or "-" for None."""
    return "-" if value is None else format(value, style)


def significant(value: float) -> str:
    """Three significant digits, never in exponent form."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def kib(count: int) -> str:
    """Bytes as KiB with one decimal."""
    return f"{count / 1024:.1f}"


def selftest_table(report: Mapping[str, Any]) -> Group:
    """What `selftest` prints: cases per kernel and dtype, then every failure."""
    table = _table(("kernel", "dtype"), ("passed", "failed", "worst error / allowed"))
    kernels = dict.fromkeys(row["kernel"] for row in report["rows"])
    for kernel, dtype in product(kernels, DTYPES):
        rows = [r for r in report["rows"] if (r["kernel"], r["dtype"]) == (kernel, dtype)]
        if not rows:
            continue
        failed = sum(not row["ok"] for row in rows)
        share = max(map(_share, rows))
        style = "bold red" if failed else ""
        passed = str(len(rows) - failed)
        table.add_row(kernel, dtype, passed, Text(str(failed), style=style), f"{share:.2f}")
    failures = [
        Text(f"{r['kernel']} {r['dtype']} {r['case']}: {r['reason']}", style="red")
        for r in report["rows"]
        if not r["ok"]
    ]
    where = f"emulated for {report['arch']}" if report["emulated"] else f"on {report['gpu']}"
    total = f"{report['passed']} passed, {report['failed']} failed {where}"
    return Group(table, "", *failures, Text(total, style="red" if failures else "green"))


def _share(row: Mapping[str, Any]) -> float:
    error, allowed = row["max_error"] or 0.0, row["allowed_error"] or 0.0
    return error / allowed if allowed else 0.0


def warmup_table(
    builds: Sequence[Build],
    without: Iterable[tuple[str, str, str | None]] = (),
    columns: int = PIPE_COLUMNS,
) -> Group:
    """What `warmup` prints: per kernel and target, how many builds and the most they take.

    ``without``: kernels and targets for which there are none, and why.
    """
    notes = [
        Text(f"{kernel} for {arch}: nothing to compile, for it {reason}", style="dim")
        for kernel, arch, reason in without
    ]
    if not builds:
        return Group(*notes)
    groups: dict[tuple[str, str], list[Build]] = {}
    for build in builds:
        groups.setdefault((build.kernel, build.arch), []).append(build)
    full = ("builds", "from cache", "registers", "shared KiB", "spills", "stack")
    short = ("builds", "cached", "regs", "KiB", "spills")
    table = _table(("kernel", "target"), full if columns >= _SHORT else short, columns)
    for group in groups.values():
        table.add_row(*_group_cells(group)[: len(table.columns)])
    most = Text("registers, shared memory, stack: the most of any build", style="dim")
    return Group(table, "", most, *notes)


def _group_cells(group: Sequence[Build]) -> list[str]:
    return [
        group[0].kernel,
        group[0].arch,
        str(len(group)),
        str(sum(build.from_cache for build in group)),
        str(max(build.registers for build in group)),
        kib(max(build.shared_bytes for build in group)),
        str(sum(build.spill_bytes for build in group)),
        str(max(build.local_bytes for build in group)),
    ]


def explanation(choice: Choice, arch: str) -> Group:
    """What `explain` prints: as ``flashcore_cupy.explain`` says it of arrays on a GPU."""
    return Group(*map(Text, choice.explained(arch)))


def cache_table(folder: str, entries: list[CacheEntry]) -> Group:
    """What `cache` prints: per source and target, how many kernels and how much they take."""
    groups: dict[tuple[str, str], list[CacheEntry]] = {}
    for entry in entries:
        name = "damaged, will be rebuilt" if entry.damaged else entry.source
        groups.setdefault((name, entry.arch), []).append(entry)
    size = sum(entry.size_bytes for entry in entries)
    total = Text(f"{folder}: {len(entries)} kernels, {kib(size)} KiB")
    if not entries:
        return Group(total)
    table = _table(("source", "target"), ("kernels", "KiB"))
    for (name, arch), group in sorted(groups.items()):
        table.add_row(name, arch, str(len(group)), kib(sum(entry.size_bytes for entry in group)))
    return Group(total, "", table)


def doctor_table(report: Report) -> Group:
    """What `doctor` prints: every finding, and the cure under those that need one."""
    marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "bold red")}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in report.findings:
        word, style = marks[finding.state]
        text = Text(finding.value)
        if finding.cure:
            text.append(f"\n{finding.cure}", style=style)
        table.add_row(Text(word, style=style), finding.name, text)
    count = len(report.problems)
    total = "nothing stands in the way" if report.ok else f"{count} to cure, marked PROBLEM"
    return Group(table, Text(total, style="green" if report.ok else "bold red"))
