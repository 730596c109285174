"""Results as tables for people, by rich; the JSON of the same results is in `_cli`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
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
from flashcore_cupy.check.verify import Check
from flashcore_cupy.cli.plots import describe_problem
from flashcore_cupy.cli.terminal import PIPE_COLUMNS, Output, columns_of
from flashcore_cupy.jit.cache import CacheEntry
from flashcore_cupy.launch.builds import Build
from flashcore_cupy.measure.job import Result, problem_json
from flashcore_cupy.measure.ladder import Ladder, Rung
from flashcore_cupy.measure.timing import Timing
from flashcore_cupy.select.registry import KERNELS
from flashcore_cupy.select.selector import Selection

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


def run_table(result: Result) -> Group:
    """What `run` prints."""
    table = grid()
    table.add_row("device", _device(result))
    problem = problem_json(result.problem)
    gate = f", gate {problem['gate']}" if problem["gate"] else ""
    table.add_row("problem", f"{describe_problem(problem)}{gate}, seed {result.seed}")
    table.add_row("kernel", _kernel(result))
    for build in result.builds:
        table.add_row("compiled", _compiled(build))
    for build in result.builds:
        for line in _resources(build):
            table.add_row("resources", line)
    if result.not_built is not None:
        table.add_row("compiled", Text(f"nothing: {result.not_built}", style="yellow"))
    table.add_row("check", check_text(result.check))
    if result.graph is not None:
        what = "kernel in a replayed CUDA graph, inputs warm in L2"
        table.add_row("latency", _timing(result.graph, what))
    if result.call is not None:
        where = "per call from Python" if result.no_gpu is None else "per call, NumPy on the CPU"
        table.add_row("latency", _timing(result.call, where))
    if result.emulated_seconds is not None:
        seconds = f"{significant(result.emulated_seconds)} s on the CPU"
        table.add_row("emulated", f"in {seconds}, which tells nothing of its time on a GPU")
    if result.tflops is not None:
        table.add_row("rate", _rate(result))
    return Group(table)


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


def _device(result: Result) -> str:
    machine = result.machine
    versions = [f"CuPy {machine.cupy}" if machine.cupy else "", f"NVRTC {machine.nvrtc}"]
    known = ", ".join(filter(None, versions if machine.nvrtc else versions[:1]))
    if machine.gpu is None:
        by = "emulated" if result.not_emulated is None else "NumPy arrays"
        return f"CPU, {by}: {result.no_gpu}" + (f" ({known})" if known else "")
    return f"{machine.gpu}, {machine.arch}, driver {machine.driver}, {known}"


def _kernel(result: Result) -> str:
    name = f"{result.kernel}: {result.config}"
    if result.not_emulated is None or result.not_built:
        return name
    return f"{name} (built for {result.machine.arch}, not run)"


def _compiled(build: Build) -> str:
    seconds = f"{build.compile_seconds:.2f} s"
    how = f"from the cache ({seconds} when it was compiled)" if build.from_cache else seconds
    return f"{build.source} for {build.arch}: {how}"


def _resources(build: Build) -> Iterable[Text]:
    for name, entry in build.entries.items():
        shared = build.dynamic_shared_bytes + entry.shared_bytes
        text = (
            f"{name}: {entry.registers} registers, {kib(shared)} KiB shared memory, "
            f"{entry.spill_bytes} bytes spilled, {entry.local_bytes} bytes of stack"
        )
        yield Text(text, style="" if entry.spill_bytes + entry.local_bytes == 0 else "yellow")


def check_text(check: Check) -> Text:
    """Whether a result is right, and how far off it is."""
    result = check.comparison
    text = Text("ok" if check.ok else "FAILED", style="bold green" if check.ok else "bold red")
    figures = (
        f"  max error {result.max_error:.3g}, mean {result.mean_error:.3g}, "
        f"allowed {result.allowed_error:.3g}, against float64"
    )
    if check.quantization_error is not None:
        figures += f" on the quantised inputs; quantisation error {check.quantization_error:.3g}"
    text.append(f"{figures}\n{check.rows_checked} of {check.rows_total} query rows of each head")
    if not check.ok:
        text.append(f"\n{check.reason}\n", style="red")
        text.append(f"worst element: {_place(check)}", style="red")
    return text


def _place(check: Check) -> str:
    worst = check.comparison.worst_index
    if worst is None:
        return "none"
    b, h, row, column = worst
    got, expected = check.comparison.worst_got, check.comparison.worst_expected
    return f"b={b} h={h} query={row} column={column}: got {got:.6g}, expected {expected:.6g}"


def _timing(timing: Timing, what: str) -> str:
    if timing.samples == 1:
        return f"{significant(timing.median_us)} us (1 x {timing.per_sample} calls): {what}"
    p10, p90 = timing.p10_us, timing.p90_us
    spread = f"p10 {significant(p10)}, p90 {significant(p90)}"
    count = f"{timing.samples} x {timing.per_sample}"
    return f"{significant(timing.median_us)} us median ({spread}; {count} calls): {what}"


def _rate(result: Result) -> str:
    rate = f"{result.tflops:.3g} TFLOP/s"
    if result.share_of_peak is None or result.peak is None:
        return rate if result.no_gpu is None else f"{rate} on the CPU"
    share = f"{100 * result.share_of_peak:.3g} % of {result.peak.tflops:.0f}"
    return f"{rate}, {share}, the peak computed from {result.peak.formula}"


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
        yield f"error: max |o - float64 reference| over {rows}", "dim"
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
    order = [(name, dtype) for name, kernel in KERNELS.items() for dtype in kernel.dtypes]
    for kernel, dtype in order:
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


def explanation(selection: Selection, arch: str) -> Group:
    """What `explain` prints: as ``flashcore_cupy.explain`` says it of arrays on a GPU."""
    return Group(*map(Text, selection.explained(arch)))


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
