"""The picture of a ladder, by matplotlib: latency by rung, or resources where nothing was timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcore_cupy.ladder import Ladder, Rung

_COLOR = "#2f6f9f"
_OWN_RULE = "#b07a2e"  # fp8: a comparison point, correct by a rule of its own
_WRONG = "#b23a3a"
_BASELINES = ("#3d3d3d", "#7a3f8f", "#2e7d4f")


def require_matplotlib() -> None:
    """Raise ``RuntimeError`` with the cure if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "a picture needs matplotlib: pip install 'flashcore-cupy[plot]'"
        ) from None


def draw(ladder: Ladder, path: Path) -> None:
    """Write the picture to ``path``, in the format that its suffix names."""
    picture(ladder).savefig(path)


def picture(ladder: Ladder) -> Any:
    """The picture as a matplotlib Figure. Raises ``RuntimeError`` if nothing was built."""
    require_matplotlib()
    from matplotlib.figure import Figure

    timed = [rung for rung in ladder.rungs if rung.latency_us]
    built = [rung for rung in ladder.rungs if rung.registers is not None]
    rungs = timed or built
    if not rungs:
        raise RuntimeError("nothing to draw: no rung was built")
    figure = Figure(figsize=(9.0, 1.9 + 0.46 * len(rungs)), dpi=160, layout="constrained")
    if timed:
        _draw_latency(figure.add_subplot(), ladder, timed)
    else:
        _draw_resources(figure.subplots(1, 2, sharey=True), built)
    gpu = ladder.machine.get("gpu") or f"built for {ladder.machine['arch']}"
    figure.suptitle(f"FlashCore ladder · {gpu}", fontsize=14, fontweight="bold", x=0.012, ha="left")
    return figure


def describe_problem(problem: Any) -> str:
    """One line, such as "B=1 H=8 S=512 D=64 float16 causal"."""
    parts = [f"B={problem['B']}", f"H={problem['H']}"]
    if problem["Hkv"] != problem["H"]:
        parts.append(f"Hkv={problem['Hkv']}")
    parts.append(f"S={problem['S']}")
    if problem["Skv"] != problem["S"]:
        parts.append(f"Skv={problem['Skv']}")
    parts += [f"D={problem['D']}", str(problem["dtype"])]
    if problem["causal"]:
        parts.append("causal")
    return " ".join(parts)


def _draw_latency(axes: Any, ladder: Ladder, rungs: Sequence[Rung]) -> None:
    latencies = [rung.latency_us or 0.0 for rung in rungs]
    shown = latencies + [baseline.us for baseline in ladder.baselines]
    low, high = min(shown) / 2.2, max(shown) * 3.2  # room for the labels on the right
    places = range(len(rungs))
    axes.barh(places, latencies, color=[_color(rung) for rung in rungs], height=0.62, zorder=2)
    for place, rung in zip(places, rungs, strict=True):
        label = format_us(rung.latency_us or 0.0)
        if rung.speedup is not None and place > 0:
            label += f"   {rung.speedup:.3g}×"
        if rung.correct is False:
            label += "   wrong"
        # On a line of the baseline, the label still reads.
        axes.annotate(
            label,
            (rung.latency_us, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.85},
            zorder=4,
        )
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _plain_ticks(axes.xaxis)
    _draw_baselines(axes, ladder)
    _explain(axes, rungs)
    _name_rungs(axes, rungs)
    axes.set_xlabel("µs per call, log scale")
    axes.set_title(
        f"{describe_problem(ladder.problem)} · kernel in a replayed CUDA graph",
        loc="left",
        fontsize=10,
        color="#444444",
    )


def _draw_baselines(axes: Any, ladder: Ladder) -> None:
    for number, baseline in enumerate(ladder.baselines):
        axes.axvline(
            baseline.us,
            color=_BASELINES[number % len(_BASELINES)],
            linestyle=("--", ":", "-.")[number % 3],
            linewidth=1.6,
            zorder=3,
            label=f"{baseline.name}, {format_us(baseline.us)}",
        )


def _explain(axes: Any, rungs: Sequence[Rung]) -> None:
    """The legend, outside the axes, where it can cover nothing."""
    from matplotlib.patches import Patch

    handles, _ = axes.get_legend_handles_labels()
    if any(_color(rung) == _OWN_RULE for rung in rungs):
        handles.append(Patch(color=_OWN_RULE, label="checked against its quantised inputs"))
    if handles:
        axes.figure.legend(
            handles=handles, loc="outside lower right", ncols=2, fontsize=10, frameon=False
        )


def _plain_ticks(axis: Any) -> None:
    """1, 2 and 5 of each decade, written out."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def _draw_resources(both: Any, rungs: Sequence[Rung]) -> None:
    places = range(len(rungs))
    columns: tuple[tuple[str, list[float], str], ...] = (
        ("registers per thread", [rung.registers or 0 for rung in rungs], "{:.0f}"),
        ("shared memory per block, KiB", [(r.shared_bytes or 0) / 1024 for r in rungs], "{:.1f}"),
    )
    for axes, (title, values, style) in zip(both, columns, strict=True):
        bars = axes.barh(places, values, color=_COLOR, height=0.62, zorder=2)
        axes.bar_label(bars, [style.format(value) for value in values], padding=4, fontsize=10)
        axes.set_xlim(0, max(values) * 1.18 or 1)
        axes.set_title(title, loc="left", fontsize=10, color="#444444")
        _name_rungs(axes, rungs)


def _name_rungs(axes: Any, rungs: Sequence[Rung]) -> None:
    axes.set_yticks(range(len(rungs)), [rung.kernel for rung in rungs], fontsize=11)
    axes.set_ylim(len(rungs) - 0.4, -0.6)  # the first rung on top
    axes.grid(axis="x", which="major", color="#dddddd", zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _color(rung: Rung) -> str:
    if rung.correct is False:
        return _WRONG
    return _OWN_RULE if rung.quantization_error is not None else _COLOR


def format_us(us: float) -> str:
    """Microseconds with three significant digits, such as "12.3 µs" or "2480 µs"."""
    return f"{us:.0f} µs" if us >= 100 else f"{us:.3g} µs"
