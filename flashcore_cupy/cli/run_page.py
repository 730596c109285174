"""The page of `run`, and what `emulate` says of a check, too."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.text import Text

from flashcore_cupy.check.verify_backward import GradientsCheck
from flashcore_cupy.cli.plots import describe_problem
from flashcore_cupy.cli.tables import grid, kib, significant
from flashcore_cupy.cpu.reference import Comparison
from flashcore_cupy.launch.builds import Build
from flashcore_cupy.measure.job import Result
from flashcore_cupy.measure.passes import Checked
from flashcore_cupy.measure.timing import Timing


def run_table(result: Result) -> Group:
    """What `run` prints."""
    table = grid()
    table.add_row("device", _device(result))
    problem = result.wanted.to_json()
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


def check_text(check: Checked) -> Text:
    """Whether a result is right, and how far off it is."""
    text = Text("ok" if check.ok else "FAILED", style="bold green" if check.ok else "bold red")
    if isinstance(check, GradientsCheck):
        lines = [f"{name}: {_figures(found)}" for name, found in check.each.items()]
        extent = f"{check.heads_checked} of {check.heads_total} heads of k and v"
        row = "row"
    else:
        lines, row = [_figures(check.comparison)], "query"
        extent = f"{check.rows_checked} of {check.rows_total} query rows of each head"
    lines[-1] += ", against float64"
    if check.quantization_error is not None:
        lines[-1] += f" on the quantised inputs; quantisation error {check.quantization_error:.3g}"
    text.append("  " + "\n".join([*lines, extent]))
    if not check.ok:
        text.append(f"\n{check.reason}\n", style="red")
        text.append(f"worst element: {_place(check.comparison, row)}", style="red")
    return text


def _figures(found: Comparison) -> str:
    return (
        f"max error {found.max_error:.3g}, mean {found.mean_error:.3g}, "
        f"allowed {found.allowed_error:.3g}"
    )


def _place(found: Comparison, row: str) -> str:
    if found.worst_index is None:
        return "none"
    b, h, at, column = found.worst_index
    got, expected = found.worst_got, found.worst_expected
    return f"b={b} h={h} {row}={at} column={column}: got {got:.6g}, expected {expected:.6g}"


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
