"""The picture of a ladder, by matplotlib: latency by rung, or resources where nothing was timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcore_cupy.measure.ladder import Ladder, Rung

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
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    timed = [rung for rung in ladder.rungs if rung.latency_us]
    built = [rung for rung in ladder.rungs if rung.registers is not None]
    rungs = timed or built
    if not rungs:
        raise RuntimeError("nothing to draw: no rung was built")
    layout = ConstrainedLayoutEngine(w_pad=0.11)
    figure = Figure(figsize=(9.0, 1.9 + 0.46 * len(rungs)), dpi=160, layout=layout)
    if timed:
        _draw_latency(figure.add_subplot(), ladder, timed)
    else:
        _draw_resources(figure.subplots(1, 2, sharey=True), built)
    gpu = ladder.machine.get("gpu") or f"built for {ladder.machine['arch']}"
    title = f"FlashCore ladder · {gpu}\n"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
    what = "kernel in a replayed CUDA graph" if timed else "what the kernels take"
    subtitle = f"{describe_problem(ladder.problem)} · {what}"
    figure.text(0.012, 1 - 0.52 / figure.get_figheight(), subtitle, fontsize=10, color="#444444")
    return figure


def describe_problem(problem: Any) -> str:
    """One line, such as "B=1 H=8 S=512 D=64 float16 causal"; older results lack some rules."""
    parts = [f"B={problem['B']}", f"H={problem['H']}"]
    if problem["Hkv"] != problem["H"]:
        parts.append(f"Hkv={problem['Hkv']}")
    parts.append(f"S={problem['S']}")
    if problem["Skv"] != problem["S"]:
        parts.append(f"Skv={problem['Skv']}")
    parts.append(f"D={problem['D']}")
    plain = {"Dv": problem["D"], "window": [-1, -1], "softcap": 0, "dropout_p": 0}
    rules = {**plain, "layout": "bhsd", **problem}
    if rules["Dv"] != problem["D"]:
        parts.append(f"Dv={rules['Dv']}")
    parts.append(str(problem["dtype"]))
    if problem["causal"]:
        parts.append("causal top-left" if problem["causal"] == "top-left" else "causal")
    if list(rules["window"]) != [-1, -1]:
        parts.append("window " + ",".join(map(str, rules["window"])))
    if rules["softcap"]:
        parts.append(f"softcap {rules['softcap']:g}")
    if rules["dropout_p"]:
        parts.append(f"dropout {rules['dropout_p']:g}")
    if rules["layout"] != "bhsd":
        parts.append(str(rules["layout"]))
    if "wrt" in problem:
        named = "" if problem["wrt"] == ["q", "k", "v"] else f" for {', '.join(problem['wrt'])}"
        order = "" if problem.get("deterministic", True) else ", sums in any order"
        parts.append(f"backward{named}{order}")
    return " ".join(parts)


def _draw_latency(axes: Any, ladder: Ladder, rungs: Sequence[Rung]) -> None:
    """Dots, for a bar would start at a zero that a log axis has not; figures in a column beside."""
    latencies = [rung.latency_us or 0.0 for rung in rungs]
    shown = latencies + [baseline.us for baseline in ladder.baselines]
    places = range(len(rungs))
    colors = [_color(rung) for rung in rungs]
    axes.scatter(latencies, places, color=colors, s=90, zorder=4)
    for place, rung in zip(places, rungs, strict=True):
        _write_beside(axes, place, format_us(rung.latency_us or 0.0), 62)
        if rung.correct is False:
            _write_beside(axes, place, "wrong", 112, _WRONG)
        elif rung.speedup is not None:
            _write_beside(axes, place, f"{_three_digits(rung.speedup)}×", 112)
    axes.set_xscale("log")
    axes.set_xlim(min(shown) / 2, max(shown) * 2)
    _plain_ticks(axes.xaxis, max(shown) / min(shown))
    _explain(axes, ladder, rungs)
    _name_rungs(axes, rungs)
    axes.grid(which="major", color="#dddddd", zorder=0)
    axes.set_xlabel("µs per call, log scale")


def _write_beside(axes: Any, place: int, text: str, right: int, color: str = "black") -> None:
    """Write a figure to the right of the axes, where no line runs; ``right``: its end, points."""
    axes.annotate(
        text,
        (1.0, place),
        xycoords=("axes fraction", "data"),
        xytext=(right, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=10,
        color=color,
    )


def _explain(axes: Any, ladder: Ladder, rungs: Sequence[Rung]) -> None:
    """Draw the baselines, and name lines and colours outside the axes."""
    from matplotlib.lines import Line2D

    handles: dict[Any, str] = {}
    for number, baseline in enumerate(ladder.baselines):
        line = axes.axvline(
            baseline.us,
            color=_BASELINES[number % len(_BASELINES)],
            linestyle=("--", ":", "-.")[number % 3],
            linewidth=1.6,
            zorder=3,
        )
        name = baseline.name.replace("$", r"\$")  # which would begin a formula
        handles[line] = f"{name}, {format_us(baseline.us)}"
    if any(_color(rung) == _OWN_RULE for rung in rungs):
        dot = Line2D([], [], color=_OWN_RULE, marker="o", markersize=9, linestyle="none")
        handles[dot] = "checked against its quantised inputs"
    if handles:
        axes.figure.legend(
            list(handles),
            list(handles.values()),
            loc="outside lower right",
            ncols=2,
            fontsize=10,
            frameon=False,
        )


def _plain_ticks(axis: Any, span: float) -> None:
    """1, 2 and 5 of each decade, written out; of very many decades 1 alone."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1e4 else (1,)))
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
        axes.set_xlabel(title)
        axes.locator_params(axis="x", nbins=4)
        _name_rungs(axes, rungs)


def _name_rungs(axes: Any, rungs: Sequence[Rung]) -> None:
    axes.set_yticks(range(len(rungs)), [rung.kernel for rung in rungs], fontsize=11)
    axes.set_ylim(len(rungs) - 0.4, -0.6)  # the first rung on top
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _color(rung: Rung) -> str:
    if rung.correct is False:
        return _WRONG
    return _OWN_RULE if rung.quantization_error is not None else _COLOR


def format_us(us: float) -> str:
    """Microseconds with three significant digits, such as "12.3 µs" or "2480 µs"."""
    return f"{_three_digits(us)} µs"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"
