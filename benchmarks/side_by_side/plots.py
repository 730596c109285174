"""The measured rows as pictures, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashcore_cupy.cli.plots import require_matplotlib
from side_by_side.cells import DTYPE, Cell
from side_by_side.results import BACKENDS, FA4, FIXED, NAMES, OURS, OURS_ANY, Report, Row

_HUES = ("#2f6f9f", "#b07a2e", "#7a3f8f", "#4f9d69", "#2a9d9d", "#8a8a2a", "#c8443c")
_COLORS = dict(zip(BACKENDS, _HUES, strict=True))
_LABELS = {name: name for name in NAMES} | {OURS: "FlashCore", FA4: "FlashAttention-4"}
_LABELS |= {OURS_ANY: "FlashCore, in any order", f"{FA4}-det": "FlashAttention-4, deterministic"}
_MARKERS = dict(zip(BACKENDS, "os^vPXD", strict=True))
# Drawn as another, but dashed.
_LIKE = {OURS_ANY: OURS} | {name: name.removesuffix("-det") for name in FIXED}
_SUBTITLE = {"loc": "left", "fontsize": 10, "color": "#444444"}
_TALL = 0.25  # of the axis: a bar that holds its figure


def draw(report: Report, folder: Path) -> list[Path]:
    """Write a picture per head dim of the grids, one of decode, one of packed sequences.

    Returns the files.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for group in ("grid", "backward"):
        for head_dim, rows in _by_head_dim(report.of_group(group)).items():
            written.append(_save(_grid_figure(report, rows), folder / f"{group}_d{head_dim}.png"))
    if decode := report.of_group("decode"):
        written.append(_save(_decode_figure(report, decode), folder / "decode.png"))
    if varlen := report.of_group("varlen"):
        written.append(_save(_varlen_figure(report, varlen), folder / "varlen.png"))
    return written


def _by_head_dim(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rows of a grid: of each head dim that has several lengths, those named for it."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row.cell.name.startswith(f"D{row.cell.head_dim}S"):
            found.setdefault(row.cell.head_dim, []).append(row)
    return {
        head_dim: found[head_dim] for head_dim in sorted(found) if _lengths(found[head_dim]) > 2
    }


def _lengths(rows: Sequence[Row]) -> int:
    return len({row.cell.seqlen_q for row in rows})


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path


def _figure(report: Report, title: str, width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    gpu = report.machine.get("gpu") or "unknown GPU"
    figure.suptitle(f"{title} · {gpu}", fontsize=14, fontweight="bold", x=0.012, ha="left")
    return figure


def _grid_figure(report: Report, rows: Sequence[Row]) -> Any:
    head_dim = rows[0].cell.head_dim
    which = "Backward" if rows[0].cell.is_backward else "Forward"
    figure = _figure(report, f"{which}, head dim {head_dim}, {DTYPE}", 10.0, 4.6)
    both = figure.subplots(1, 2, sharey=True)
    for axes, causal in zip(both, (False, True), strict=True):
        some = [row for row in rows if row.cell.causal == causal]
        for name in NAMES:
            points = [(row.cell.seqlen_q, row.cell.figure(us)) for row, us in _timed(some, name)]
            if points:
                axes.plot(*zip(*points, strict=True), **_line(name))
        _mark_ceiling(axes, report.ceilings.get("matmul_tflops"), "matmul 8192³, this run")
        axes.set_xscale("log", base=2)
        lengths = sorted({row.cell.seqlen_q for row in some})
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set_xlabel("sequence length, 16384 tokens in all")
        mask = "causal" if causal else "not causal"
        axes.set_title(f"{rows[0].cell.heads} heads, {mask}", **_SUBTITLE)
        _plain(axes, "both")
    both[0].set_ylabel("TFLOP/s")
    both[0].set_ylim(bottom=0)
    _legend(figure, both[0])
    return figure


def _decode_figure(report: Report, rows: Sequence[Row]) -> Any:
    figure = _figure(report, f"Decode: one query per sequence, {DTYPE}", 10.0, 4.6)
    axes = _bars(figure, rows, lambda cell: f"B={cell.batch}\nSkv={cell.seqlen_kv}")
    _mark_ceiling(
        axes, report.ceilings.get("copy_gbs"), "copy of 1 GiB, read and written, this run"
    )
    axes.set_ylabel("GB/s of K and V")
    cell = rows[0].cell
    subtitle = f"Hq={cell.heads} Hkv={cell.heads_kv} D={cell.head_dim}, inputs not in the L2"
    axes.set_title(subtitle, **_SUBTITLE)
    _legend(figure, axes)
    return figure


def _varlen_figure(report: Report, rows: Sequence[Row]) -> Any:
    def name(cell: Cell) -> str:
        lengths = f"{cell.batch} of {min(cell.lengths)} to {max(cell.lengths)}"
        return f"{lengths}\nD={cell.head_dim}{', causal' if cell.causal else ''}"

    figure = _figure(report, f"Packed sequences, {DTYPE}", 10.0, 4.6)
    axes = _bars(figure, rows, name)
    axes.set_ylabel("TFLOP/s")
    columns = rows[0].cell.heads * rows[0].cell.head_dim
    axes.set_title(f"{columns} columns over all heads", **_SUBTITLE)
    _legend(figure, axes)
    return figure


def _bars(figure: Any, rows: Sequence[Row], name_of: Callable[[Cell], str]) -> Any:
    """Axes with a bar for each backend on each cell."""
    axes = figure.add_subplot()
    names = [name for name in BACKENDS if _timed(rows, name)]
    width = 0.8 / max(1, len(names))
    place = {row.cell.name: i for i, row in enumerate(rows)}
    top = 1.12 * max((row.cell.figure(us) for n in names for row, us in _timed(rows, n)), default=1)
    for number, name in enumerate(names):
        timed = _timed(rows, name)
        shift = (number - (len(names) - 1) / 2) * width
        bars = axes.bar(
            [place[row.cell.name] + shift for row, _ in timed],
            [row.cell.figure(us) for row, us in timed],
            width * 0.92,
            color=_COLORS[name],
            label=_LABELS[name],
            zorder=2,
        )
        _write_figures(axes, bars, top)
    axes.set_xticks(range(len(rows)), [name_of(row.cell) for row in rows])
    axes.set_ylim(0, top)
    _plain(axes, "y")
    return axes


def _write_figures(axes: Any, bars: Any, top: float) -> None:
    """Write each bar's figure inside it, in front of the ceiling's line, or above a low one."""
    for bar in bars:
        value, inside = bar.get_height(), bar.get_height() > _TALL * top
        axes.annotate(
            f"{value:.0f}",
            (bar.get_x() + bar.get_width() / 2, value),
            xytext=(0, -4 if inside else 4),
            textcoords="offset points",
            ha="center",
            va="top" if inside else "bottom",
            rotation=90,
            fontsize=7,
            color="white" if inside else "black",
            # Above a bar, lines of the grid end at the figure.
            bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            zorder=4,
        )


def _timed(rows: Sequence[Row], name: str) -> list[tuple[Row, float]]:
    return [(row, us) for row in rows if (us := row.us(name)) is not None]


def _line(name: str) -> dict[str, Any]:
    like = _LIKE.get(name, name)
    ours = like == OURS
    return {
        "color": _COLORS[like],
        "label": _LABELS[name],
        "marker": _MARKERS[like],
        "markersize": 5,
        "linestyle": "-" if like == name else "--",
        "linewidth": 2.4 if ours else 1.5,
        "zorder": 4 if ours else 3,
    }


def _mark_ceiling(axes: Any, value: float | None, label: str) -> None:
    if value is not None:
        axes.axhline(value, color="#3d3d3d", linestyle="--", linewidth=1.2, label=label, zorder=1)


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, which="major", color="#dddddd", zorder=0)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it can cover nothing."""
    handles, _ = axes.get_legend_handles_labels()
    ncols = 6 if len(handles) <= 6 else 4  # more names are wider, too
    figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols, fontsize=9, frameon=False
    )
