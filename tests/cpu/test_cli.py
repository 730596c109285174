"""The command line: help, bad input, tables and pictures, explain; what needs no compiler."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases_cli import COMMAND, FAST, SMALL, invoke, json_of, measured_ladder, pages, png_size, waits
from click.testing import CliRunner
from helpers import ROOT, gpu_skip_reason
from rich.console import Console

from flashcore_cupy import __version__
from flashcore_cupy.cli import plots, progress, tables, terminal
from flashcore_cupy.cli.commands import main
from flashcore_cupy.cuda import targets
from flashcore_cupy.launch import builds
from flashcore_cupy.measure import ladder

ON_GPU = gpu_skip_reason() is None
without_gpu = pytest.mark.skipif(ON_GPU, reason="shows what happens without a GPU")


pytestmark = pytest.mark.usefixtures("lines_of_a_file")


def test_run_without_cupy_still_runs_and_says_why_nothing_was_built() -> None:
    code = (
        "import sys; sys.modules['cupy'] = sys.modules['cupy_backends'] = None\n"
        "from flashcore_cupy.cli.commands import main\n"
        f"main({['run', *SMALL, *FAST]!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())  # lines are as long as COLUMNS says, if it is set
    assert "compiled nothing: " in words and "pip install cupy" in words
    assert "ok max error" in words
    assert done.stderr.startswith("no GPU (")


# --- bad input ---------------------------------------------------------------------------------

HUGE = {
    f"{command} {option} {value[:6]}": ((command, option, value), option)
    for command in ("run", "ladder", "explain")
    for option in ("--B", "--H", "--S", "--D", "--Hkv", "--Skv", "--Dv")
    for value in ("1e26", "10000000000000000000000", "9" * 5000)
}
BAD_INPUT = HUGE | {
    "more than memory": (("run", "--B", "1000000", "--S", "1000000"), "GiB"),
    "scores beyond memory": (("run", "--S", "2000000", "--D", "1", "--gate", "qk"), "GiB"),
    "one long sequence": (("run", "--S", str(10**9), "--D", "512"), "GiB"),
    "huge tile": (("run", "--set", "block_n=10000000000000000000000"), "block_n"),
    "old target": (("run", "--arch", "sm_60"), "sm_75 or later"),
    "old target to explain for": (("explain", "--arch", "sm_70"), "sm_75 or later"),
    "old target to build for": (("warmup", "--arch", "sm_60"), "sm_75 or later"),
    "no target": (("warmup", "--arch", "sm_" + "9" * 5000), "sm_90a"),
    "causal": (("run", "--causal", "left"), "top-left"),
    "half a window": (("run", "--window", "3"), "--window"),
    "a window to the wrong side": (("run", "--window", "3", "-2"), "--window"),
    "softcap": (("run", "--softcap", "nan"), "softcap"),
    "dropout": (("run", "--dropout-p", "1"), "dropout_p: got 1.0"),
    "negative softcap": (("ladder", "--softcap", "-1"), "softcap"),
    "layout": (("run", "--layout", "sbhd"), "bshd"),
    "rule of a kernel": (("run", "--kernel", "scalar", "--window", "3", "3"), "no window"),
    "explain kernel": (("explain", "--D", "512", "--dtype", "float32"), "none can do"),
    "from, and sizes": (("ladder", "--from", "other.json", "--B", "3"), "--B: not with --from"),
    "from, and more": (
        ("ladder", "--from", "other.json", "--iters", "3", "--causal"),
        "--causal, --iters: not with --from",
    ),
    "half a ladder": (("ladder", "--from", "half.json"), "not the JSON of a ladder"),
    "nan": (("ladder", "--baseline-us", "nan"), "--baseline-us"),
    "infinity": (("ladder", "--baseline-us", "inf"), "--baseline-us"),
    "zero": (("run", "--B", "0"), "--B"),
    "negative": (("run", "--S", "-5"), "--S"),
    "not a number": (("run", "--H", "many"), "--H"),
    "zero keys": (("run", "--Skv", "0"), "--Skv"),
    "heads": (("run", "--H", "6", "--Hkv", "4"), "multiple"),
    "head dim": (("run", "--D", "600"), "512"),
    "head dim of a kernel": (("run", "--D", "200", "--kernel", "wmma_fused_64"), "up to 128"),
    "dtype": (("run", "--dtype", "float64"), "float64"),
    "dtype of a kernel": (("run", "--dtype", "float32", "--kernel", "fp8_wmma"), "float32"),
    "kernel": (("run", "--kernel", "best"), "wmma_fused_64"),
    "gate": (("run", "--gate", "out"), "softmax"),
    "unknown field": (("run", "--set", "block_k=3"), "block_n"),
    "no value": (("run", "--set", "block_n"), "FIELD=VALUE"),
    "value of a wrong kind": (("run", "--set", "block_n=big"), "whole number"),
    "a kernel of the other pass": (("run", "--kernel", "bwd_sm80"), "kernel: got 'bwd_sm80'"),
    "a forward kernel": (("run", "--backward", "--kernel", "mma_sm80"), "'auto', 'bwd_sm90'"),
    "a gate of the other pass": (("explain", "--gate", "dp"), "gate: got 'dp'; choose one of"),
    "a forward gate": (("run", "--backward", "--gate", "pv"), "choose one of None, 'dp', 'ds'"),
    "wrt of the output": (("ladder", "--wrt", "k"), "--backward"),
    "an order of the output": (("run", "--no-deterministic"), "--backward"),
    "wrt of what has none": (("run", "--backward", "--wrt", "bias"), "'q', 'k', 'v'"),
    "gradients beyond memory": (("run", "--backward", "--B", "10000", "--S", "100000"), "GiB"),
    "wide heads of gradients": (
        ("explain", "--backward", "--D", "512", "--dtype", "float32"),
        "none has the gradients of this problem",
    ),
    "illegal tile": (("run", "--kernel", "wmma_fused_64", "--set", "block_n=33"), "block_n=33"),
    "too much shared memory": (
        ("run", "--kernel", "wmma_fused_64", "--D", "128", "--set", "block_n=512"),
        "shared memory",
    ),
    "seed": (("run", "--seed", "-1"), "--seed"),
    "iters": (("run", "--iters", "0"), "--iters"),
    "unknown option": (("run", "--batch", "3"), "--batch"),
    "unknown command": (("fly",), "fly"),
    "ladder sizes": (("ladder", "--D", "0"), "--D"),
    "ladder heads": (("ladder", "--H", "3", "--Hkv", "2"), "multiple"),
    "plot's folder": (("ladder", "--plot", "no/such/folder/ladder.png"), "no folder"),
    "plot's format": (("ladder", "--plot", "ladder.bmp"), ".png"),
    "plot onto a folder": (("ladder", "--plot", "tests.png"), "cannot be written"),
    "baseline": (("ladder", "--baseline-us", "0"), "--baseline-us"),
    "baseline without a time": (("ladder", "--baseline-name", "x"), "--baseline-us"),
    "missing results": (("ladder", "--from", "missing.json"), "missing.json"),
    "other results": (("ladder", "--from", "other.json"), "not the JSON of a ladder"),
    "results that are not JSON": (("ladder", "--from", "text.json"), "not the JSON of a ladder"),
    "selftest's output": (("selftest", "--output", "no/such/folder/x.json"), "no folder"),
    "warmup kernel": (("warmup", "--kernel", "best"), "scalar"),
    "warmup target": (("warmup", "--arch", "gpu"), "sm_90a"),
}


@pytest.mark.parametrize(("arguments", "told"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests.png").mkdir()
    (tmp_path / "other.json").write_text('{"rows": []}')
    half = {"problem": {}, "machine": {}, "rungs": [], "baselines": [], "rows_checked": None}
    (tmp_path / "half.json").write_text(json.dumps(half))
    (tmp_path / "text.json").write_text("hello")
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 1000
    assert result.stderr.startswith("Error: ") and told in result.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"tests.png", "other.json", "half.json", "text.json"}


def test_the_ladder_fits_80_columns_and_cuts_no_figure(tmp_path: Path) -> None:
    data = json.loads(measured_ladder(tmp_path).read_text())
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(tables.ladder_table(ladder.Ladder.from_json(data), 80))
    text = shown.export_text()
    assert "\u2026" not in text  # rich's mark for what it cut
    assert "wmma_warp_softmax" in text and "launches" in text and "1.0e-04" in text


def test_a_ladder_is_drawn_again_from_its_json(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, picture = measured_ladder(tmp_path), tmp_path / "ladder.png"
    more = ("--baseline-us", "40", "--baseline-name", "second")
    result = invoke("ladder", "--from", str(source), "--plot", str(picture), *more, code=1)
    assert "2400" in result.stdout and "2.50x" in result.stdout and "Some GPU" in result.stdout
    assert "first: 22.0 us" in result.stdout and "second: 40.0 us" in result.stdout
    assert "wmma_cp_async: max error 1 > allowed 0.1" in result.stdout
    width, height = png_size(picture)
    assert 1200 <= width <= 2000 and 600 <= height <= 1400


def test_nothing_runs_through_the_figures_of_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    data = json.loads(measured_ladder(tmp_path).read_text())
    figure = plots.picture(ladder.Ladder.from_json(data))
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert not axes.patches  # bars would start at a zero that is nowhere
    (dots,) = axes.collections
    times = [rung["latency_us"] for rung in data["rungs"]]
    assert np.allclose(dots.get_offsets()[:, 0], times)
    labels = axes.texts
    written = [label.get_text() for label in labels]
    assert written[:4] == ["2400 µs", "1.00×", "960 µs", "2.50×"] and "wrong" in written
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    whole = figure.bbox
    assert all(axes.bbox.x1 < box.x0 and box.x1 <= whole.x1 for box in boxes)
    assert len(axes.lines) == 1  # the baseline, inside the axes
    names = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(whole.x0 <= name.x0 and name.x1 < axes.bbox.x0 for name in names)


@pytest.mark.parametrize("timed", [True, False])
def test_the_picture_names_gpu_problem_and_dtype(tmp_path: Path, timed: bool) -> None:
    pytest.importorskip("matplotlib")
    data = json.loads(measured_ladder(tmp_path).read_text())
    if not timed:
        data["rungs"] = [rung | {"latency_us": None} for rung in data["rungs"]]
    data["problem"] |= {"window": [127, 0], "dtype": "bfloat16"}
    figure = plots.picture(ladder.Ladder.from_json(data))
    assert "Some GPU" in figure.get_suptitle()
    (subtitle,) = (text.get_text() for text in figure.texts if "B=1" in text.get_text())
    assert subtitle.startswith("B=1 H=8 S=512 D=64 bfloat16 window 127,0 ")
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert timed or not any(line.get_visible() for line in axes.get_xgridlines())


def test_a_baseline_may_have_any_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, picture = measured_ladder(tmp_path), tmp_path / "ladder.png"
    names = ("--baseline-us", "40", "--baseline-name", "_a $b^$", "--baseline-us", "50")
    invoke("ladder", "--from", str(source), "--plot", str(picture), *names, code=1)
    data = json.loads(source.read_text())
    data["baselines"] = [{"name": "_a $b^$", "us": 40.0}, {"name": "other", "us": 5.0}]
    figure = plots.picture(ladder.Ladder.from_json(data))
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[:2] == [r"_a \$b^\$, 40.0 µs", "other, 5.00 µs"]


def test_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = measured_ladder(tmp_path)
    result = invoke("ladder", "--from", str(source), "--plot", str(tmp_path / "x.png"), code=2)
    assert "flashcore-cupy[plot]" in result.stderr
    assert not (tmp_path / "x.png").exists()


# --- the other commands ------------------------------------------------------------------------


@without_gpu
def test_without_a_compiler_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = "CXX=no-such-compiler is not there: pip install 'flashcore-cupy[emulator]'"
    result = invoke("run", *SMALL, "--iters", "2", "--warmup", "0", "--json")
    told = [line for line in result.stderr.splitlines() if not line.startswith("compiling")]
    assert len(told) == 1 and missing in told[0], "but for what a slow machine is told"
    assert "the job runs on NumPy arrays; " in told[0]
    data = json.loads(result.stdout)
    assert data["ok"] and data["ran"] == "numpy" and missing in data["not_emulated"]
    for command in ("selftest", "emulate"):
        result = invoke(command, code=1)
        assert result.stderr.count("\n") <= 2 and missing in result.stderr and not result.stdout


def test_the_help_of_warmup_counts_the_kernels() -> None:
    text = " ".join(invoke("warmup", "--help").stdout.split())
    for arch in targets.TARGETS:
        count = len(list(builds.table_configs(builds.KERNELS, arch)))
        assert count > 20 and f"{count} for {arch}" in text


def test_doctor_lists_its_findings() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == (0 if data["ok"] else 1)
    names = {finding["name"] for finding in data["findings"]}
    assert {"CuPy", "driver", "NVRTC", "GPU", "cache"} <= names
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == result.exit_code and "NVRTC" in shown.stdout


def test_version_and_help() -> None:
    assert __version__ in invoke("--version").stdout
    text = invoke("--help").stdout
    for command in ("run", "explain", "emulate", "ladder", "selftest", "doctor", "warmup", "cache"):
        assert command in text and text.isascii()
        page = invoke(command, "--help").stdout
        assert "--json" in page and page.isascii()


def test_numbers_that_json_lacks_become_null() -> None:
    data = {"a": [np.nan, np.inf, 1.5], "b": {"c": (-np.inf, True, None, "x", 3)}}
    assert tables.clean(data) == {"a": [None, None, 1.5], "b": {"c": [None, True, None, "x", 3]}}


def test_figures_keep_three_digits() -> None:
    shown = [tables.significant(us) for us in (0.5, 7.25, 12.345, 99.96, 2480.4)]
    assert shown == ["0.500", "7.25", "12.3", "100", "2480"]


def test_python_m_is_the_command_line() -> None:
    done = subprocess.run(
        [*COMMAND, "cache", "--json"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0 and "entries" in json.loads(done.stdout)
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Usage: python -m flashcore_cupy")


# --- explain -----------------------------------------------------------------------------------


def test_explain_says_what_a_problem_gets() -> None:
    data = json_of("explain", "--arch", "sm_80", "--S", "4096", "--window", "127", "0")
    assert data["kernel"] == "mma_sm80" and data["arch"] == "sm_80"
    assert data["problem"]["window"] == [127, 0] and list(data["passed_over"]) == ["wgmma_sm90"]
    lines = invoke("explain", "--arch", "sm_80", "--S", "4096", "--window", "127", "0").stdout
    assert lines.startswith(f"mma_sm80 on sm_80: {data['config'][:20]}")
    assert "\npassed over wgmma_sm90: needs wgmma" in lines
    assert json_of("explain", "--arch", "sm_90a", "--S", "4096")["kernel"] == "wgmma_sm90"


def test_explain_of_the_backward_pass() -> None:
    options = ("explain", "--backward", "--arch", "sm_80", "--D", "128", "--wrt", "q", "--causal")
    data = json_of(*options)
    assert data["kernel"] == "bwd_sm80" and list(data["passed_over"]) == ["bwd_sm90"]
    assert data["problem"]["wrt"] == ["q"] and data["config"].startswith("dq: ")
    lines = invoke(*options).stdout.splitlines()
    assert lines[0].startswith("bwd_sm80 on sm_80, dq: ") and len(lines) == 2
    assert lines[1].startswith("passed over bwd_sm90: needs wgmma")
    data = json_of("explain", "--backward", "--arch", "sm_90a")
    assert data["kernel"] == "bwd_sm90" and data["config"].startswith("dq, dk, dv: ")
    data = json_of("explain", "--backward", "--arch", "sm_90a", "--D", "96")
    assert data["kernel"] == "bwd_sm90" and "; dq: " in data["config"]


def test_explain_takes_a_kernel_and_changes_to_its_row() -> None:
    data = json_of("explain", "--kernel", "wmma_fused_64", "--set", "block_m=32,warps_m=2")
    assert data["kernel"] == "wmma_fused_64" and data["config"].startswith("32x64 tile")


@pytest.mark.parametrize("columns", ["", "0", "-5", "wide", "1e3", "9" * 5000])
def test_columns_that_say_nothing_are_passed_over(columns: str, tmp_path: Path) -> None:
    arguments = pages(tmp_path)["ladder"]
    shown = CliRunner().invoke(main, arguments, env={"COLUMNS": columns})
    assert shown.stdout == CliRunner().invoke(main, arguments, env={"COLUMNS": None}).stdout


def test_plain_text_is_readable() -> None:
    assert terminal.plain("3 µs · 2.5× ─ ≤ é \udce9 中", "ascii") == (
        "3 us - 2.5x - <= \\xe9 \\xe9 \\u4e2d"
    )
    assert terminal.plain("µ · 中 \udce9", "utf-8") == "µ · 中 \\xe9"
    assert terminal.plain("µ · 中", "latin-1") == "µ · \\u4e2d"


def test_a_terminal_gets_a_bar_and_a_file_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    waits(monkeypatch, 0.01, 0.01)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress.Steps() as steps:
        steps.start(4, "compiling")
        steps.step("scalar.cu")
        steps.phase("checking")
        time.sleep(0.3)
    assert "checking" in shown.getvalue() and "(0 s)" not in shown.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    with progress.Steps() as steps:
        steps.start(4, "compiling")
        steps.step("scalar.cu")
        time.sleep(0.1)
    assert "compiling: 1 of 4 (0 s)\n" in shown.getvalue()
