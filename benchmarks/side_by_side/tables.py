"""The measured rows as tables for people, by rich."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from side_by_side.cells import GROUPS, Cell
from side_by_side.results import FLASH2, LOAD, NAMES, OURS, OWN, Report, Row, geometric_mean

_TITLES = {
    "grid": "Forward, 16384 tokens, H x D = 2048",
    "small": "Small problems",
    "decode": "Decode, one query per sequence",
    "variants": "Grouped queries, windows, other head dims",
    "varlen": "Packed sequences",
    "blocks": "Block masks, B=2",
    "backward": "Gradients of q, k and v",
    "percall": "Calls from Python (time on the GPU)",
}

#: Backends under load, at most, whose clocks fit into a table.
_WITH_CLOCK = 3
_RATIOS: dict[str, Callable[[Row], float | None]] = {
    "vs best": Row.speedup_to_best,
    "vs flash2": lambda row: row.speedup(FLASH2),
}
# "any" beside the peers; "ours" beside those that, too, give the same bits each time.
_BACKWARD_RATIOS: dict[str, Callable[[Row], float | None]] = {
    "any/ best": Row.speedup_to_best,
    "any/ flash2": lambda row: row.speedup(FLASH2),
    "ours/ det": Row.speedup_with_bits,
    "ours/ any": Row.speed_kept_with_bits,
}


def report_tables(report: Report) -> Group:
    """Machine, one table per group that was measured, and what has to be said beside them."""
    parts: list[RenderableType] = [machine_line(report.machine)]
    if report.ceilings:
        ceilings = report.ceilings
        parts.append(
            f"ceilings measured in this run: matmul {ceilings.get('matmul_tflops', 0):.0f} "
            f"TFLOP/s, copy {ceilings.get('copy_gbs', 0):.0f} GB/s"
        )
    for group in GROUPS:
        rows = report.of_group(group)
        if rows:
            parts += ["", *_group_table(rows, report.methods.get(group, ""))]
        loaded = [row for row in rows if row.load(OURS) is not None]
        if loaded:
            parts += ["", _load_table(loaded, report.methods.get(LOAD, ""))]
    return Group(*parts)


def machine_line(machine: object) -> str:
    """One line about the machine of a result."""
    known = machine if isinstance(machine, dict) else {}
    return (
        f"{known.get('gpu')}, driver {known.get('driver')}, flashcore {known.get('version')} "
        f"(kernels {known.get('kernels_digest')}), NVRTC {known.get('nvrtc')}, "
        f"CuPy {known.get('cupy')}, torch {known.get('torch')}, cuDNN {known.get('cudnn')}"
        + (f", FlashAttention-4 {known['fa4']}" if known.get("fa4") else "")
    )


def _group_table(rows: Sequence[Row], method: str) -> list[RenderableType]:
    """The table of one group, and under it the reasons and what ours ran."""
    group, unit = rows[0].cell.group, rows[0].cell.unit
    names = [name for name in NAMES if any(name in row.entries for row in rows)]
    ratios = _BACKWARD_RATIOS if rows[0].cell.is_backward else _RATIOS
    table = _table(
        f"{_TITLES[group]}, bfloat16, {unit}",
        f"{method}; medians. A ratio above 1: ours is faster. "
        "Spread: the row's widest (p90 - p10) / median.",
        (*names, *ratios, "spread"),
    )
    reasons: dict[str, int] = {}
    for row in rows:
        figures = [_figure(row, name, reasons) for name in names]
        found = (_ratio(ratio(row)) for ratio in ratios.values())
        table.add_row(row.cell.name, *figures, *found, _percent(row.spread))
    table.add_section()
    means = [geometric_mean(map(ratio, rows)) for ratio in ratios.values()]
    empty = [""] * len(names)
    mean = f"geometric mean of {means[0][1]}"
    table.add_row(mean, *empty, *(_ratio(found) for found, _ in means), "", style="bold")
    return [table, *(Text(line, style="dim") for line in _notes(rows, reasons))]


def _load_table(rows: Sequence[Row], method: str) -> Table:
    """Speed, power, clock, if there is room, and energy of those that were under load."""
    names = [name for name in NAMES if any(row.load(name) is not None for row in rows)]
    clock = len(names) <= _WITH_CLOCK
    units = "TFLOP/s, W, SM MHz, pJ/FLOP" if clock else "TFLOP/s, W, pJ/FLOP"
    table = _table(
        f"{_TITLES[rows[0].cell.group]}, under load: {units}",
        f"{method}. The ratio is of energies, above 1: ours takes less than the best peer.",
        (*names, "vs best"),
    )
    for row in rows:
        figures = [_loaded(row, name, clock) for name in names]
        table.add_row(row.cell.name, *figures, _ratio(row.energy_to_best()))
    table.add_section()
    mean, count = geometric_mean(row.energy_to_best() for row in rows)
    empty = [""] * len(names)
    table.add_row(f"geometric mean of {count}", *empty, _ratio(mean), style="bold")
    return table


def _loaded(row: Row, name: str, clock: bool) -> Text:
    load = row.load(name)
    if load is None:
        return Text("")
    rate = row.cell.flops / load.us / 1e6
    mhz = f" {load.sm_mhz:5.0f}" if clock else ""
    text = f"{rate:.0f} {load.watts:4.0f}{mhz} {load.pj_per_flop:5.2f}"
    return Text(text, style="bold" if name in OWN else "")


def _table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """An empty table of cases by ``columns``."""
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("case", no_wrap=True)
    for name in columns:
        header = name.removeprefix("torch-").replace(" ", "\n").replace("-", "\n")
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _figure(row: Row, name: str, reasons: dict[str, int]) -> Text:
    """The figure of one backend, or the number of the reason why there is none."""
    entry = row.entries.get(name)
    if entry is None:
        return Text("")
    if entry.us is None:
        number = reasons.setdefault(f"{name}: {entry.reason}", len(reasons) + 1)
        return Text(f"none [{number}]", style="red" if name in OWN else "yellow")
    text = _significant(row.cell.figure(entry.us))
    if entry.gpu_us is not None:
        text += f" ({_significant(entry.gpu_us)})"
    return Text(text, style="bold" if name in OWN else "")


def _notes(rows: Sequence[Row], reasons: dict[str, int]) -> list[str]:
    notes = [f"[{number}] {reason}" for reason, number in reasons.items()]
    kernels: dict[str, list[Cell]] = {}
    for row in rows:
        if row.us(OURS) is not None:
            kernels.setdefault(row.entries[OURS].note, []).append(row.cell)
    for note, cells in kernels.items():
        which = "all" if len(kernels) == 1 else f"{cells[0].name}, {len(cells)} in all"
        notes.append(f"ours is {note} ({which})")
    return notes


def _significant(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
