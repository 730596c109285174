"""The command line: every command, its JSON, its exit codes, and how it refuses bad input."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, compiler_skip_reason, gpu_skip_reason
from rich.console import Console

import flashcore_cupy
from flashcore_cupy import (
    __version__,
    _cli,
    _plot,
    _render,
    _steps,
    _terminal,
    builds,
    job,
    ladder,
    tiles,
    verify,
)
from flashcore_cupy._cli import main

ON_GPU = gpu_skip_reason() is None
SMALL = ("--B", "1", "--H", "2", "--S", "40", "--D", "32")
FAST = ("--iters", "2", "--warmup", "0")
COMMAND = (sys.executable, "-m", "flashcore_cupy")

needs_compiler = pytest.mark.skipif(
    compiler_skip_reason() is not None, reason=str(compiler_skip_reason())
)
without_gpu = pytest.mark.skipif(ON_GPU, reason="shows what happens without a GPU")


@pytest.fixture(autouse=True)
def lines_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as they are by default: a worker of pytest inherits COLUMNS."""
    monkeypatch.delenv("COLUMNS", raising=False)


def invoke(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def json_of(*arguments: str, code: int = 0) -> Any:
    """What a command prints with --json: nothing else on stdout, and strictly JSON."""
    text = invoke(*arguments, "--json", code=code).stdout

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --- run ---------------------------------------------------------------------------------------


@needs_compiler
def test_run_prints_everything_that_matters() -> None:
    text = invoke("run", *SMALL, *FAST).stdout
    for word in ("device", "problem", "kernel", "compiled", "resources", "check", "latency"):
        assert word in text
    assert "B=1 H=2 S=40 D=32 float16" in text
    assert "registers" in text and "KiB shared memory" in text and "0 bytes spilled" in text
    assert "ok  max error" in text and "allowed" in text
    assert "40 of 40 query rows" in text
    assert "median" in text and "TFLOP/s" in text
    assert ("replayed CUDA graph" in text) == ON_GPU


@without_gpu
@needs_compiler
def test_run_without_a_gpu_says_so_in_one_line_and_compiles() -> None:
    result = invoke("run", *SMALL, *FAST, "--kernel", "scalar", "--arch", "sm_80")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("no GPU (") and "NumPy" in result.stderr
    assert "scalar.cu for sm_80" in result.stdout and "built for sm_80, not run" in result.stdout


@needs_compiler
def test_run_as_json() -> None:
    data = json_of("run", *SMALL, *FAST, "--causal", "--Skv", "50", "--Hkv", "1", "--seed", "7")
    assert data["ok"] and data["check"]["ok"]
    assert data["check"]["max_error"] <= data["check"]["allowed_error"]
    assert data["problem"] == {
        "B": 1, "H": 2, "Hkv": 1, "S": 40, "Skv": 50, "D": 32, "Dv": 32, "dtype": "float16",
        "layout": "bhsd", "causal": True, "window": [-1, -1], "softcap": 0.0, "gate": None,
        "seed": 7,
    }  # fmt: skip
    assert data["ran"] == (data["kernel"] if ON_GPU else "numpy")
    (build,) = data["builds"]
    assert build["arch"] == data["machine"]["arch"]
    assert build["registers"] > 16 and build["shared_bytes"] > 1000 and build["spill_bytes"] == 0
    assert data["call"]["median_us"] > 0 and data["tflops"] > 0
    assert (data["graph"] is not None) == ON_GPU == (data["no_gpu"] is None)


@without_gpu  # where the first run's kernel would still be loaded
@needs_compiler
def test_the_second_run_takes_the_kernel_from_the_cache() -> None:
    job = ("run", *SMALL, *FAST, "--kernel", "wmma_fused_64")
    json_of(*job)
    (build,) = json_of(*job)["builds"]
    assert build["from_cache"]
    assert "from the cache" in invoke(*job).stdout


@needs_compiler
@pytest.mark.parametrize("gate", ["qk", "softmax", "pv"])
def test_run_checks_a_gate(gate: str) -> None:
    data = json_of("run", *SMALL, *FAST, "--gate", gate, "--kernel", "wmma_fused_32")
    assert data["ok"] and data["problem"]["gate"] == gate and data["tflops"] is None


RULES = {
    "bottom-right": (("--causal", "--Skv", "50"), "causal", {"causal": True}),
    "its name": (("--causal", "bottom-right"), "causal", {"causal": True}),
    "top-left": (
        ("--causal", "top-left", "--Skv", "50"),
        "causal top-left",
        {"causal": "top-left"},
    ),
    "window": (("--window", "7", "-1"), "window 7,-1", {"window": [7, -1]}),
    "softcap": (("--softcap", "2.5"), "softcap 2.5", {"softcap": 2.5}),
    "layout": (("--layout", "bshd"), "bshd", {"layout": "bshd"}),
    "Dv": (("--Dv", "64"), "D=32 Dv=64 float16", {"Dv": 64}),
    "together": (
        ("--causal", "--window", "3", "0", "--softcap", "9", "--layout", "bshd", "--Dv", "16"),
        "D=32 Dv=16 float16 causal window 3,0 softcap 9 bshd",
        {"causal": True, "window": [3, 0], "softcap": 9.0, "layout": "bshd", "Dv": 16},
    ),
}


@needs_compiler
@pytest.mark.parametrize(("options", "line", "told"), RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("gate", ["none", "softmax", "pv"])
def test_run_takes_rules_and_shows_them(
    options: tuple[str, ...], line: str, told: dict[str, Any], gate: str
) -> None:
    job = ("run", *SMALL, *FAST, *options, "--gate", gate)
    data = json_of(*job)
    assert data["ok"] and told.items() <= data["problem"].items()
    assert f"{line}, " in invoke(*job).stdout


@needs_compiler
@pytest.mark.parametrize("rule", ["causal", "window", "softcap", "layout"])
def test_run_computes_the_rule_that_it_names(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle, which takes its rules from the problem, finds a run without one of them wrong."""
    arguments_of = job.arguments_of
    monkeypatch.setattr(
        job, "arguments_of", lambda p: {n: x for n, x in arguments_of(p).items() if n != rule}
    )
    options = ("--causal", "top-left", "--window", "5", "5", "--softcap", "0.5")
    shape = ("--layout", "bshd", "--S", "32", "--H", "32", "--Skv", "40")
    if rule == "layout":  # heads and rows change places, which other sizes would refuse
        shape = ("--layout", "bshd", "--S", "32", "--H", "32")
    invoke("run", "--D", "32", *FAST, *options, *shape, code=1)


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_run_takes_other_dtypes(dtype: str) -> None:
    assert json_of("run", *SMALL, *FAST, "--dtype", dtype)["problem"]["dtype"] == dtype


@needs_compiler
def test_set_changes_the_configuration() -> None:
    job = ("run", *SMALL, *FAST, "--no-graph", "--kernel", "wmma_fused_64")
    data = json_of(*job, "--set", "block_m=32", "--set", "warps_m=2,num_stages=2 cp_async=true")
    assert data["config"].startswith("32x64 tile, 4 warps (2x2), 2 stages, cp_async")
    assert data["graph"] is None


@needs_compiler
def test_fp8_reports_both_of_its_kernels() -> None:
    data = json_of("run", *SMALL, *FAST, "--kernel", "fp8_wmma")
    assert [build["source"] for build in data["builds"]] == [
        "ladder/fp8_quantize.cu",
        "ladder/wmma_fused.cu",
    ]
    assert (data["check"]["quantization_error"] is not None) == ON_GPU


@needs_compiler
def test_a_failed_check_is_exit_code_1_and_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = verify.Expectation.judge

    def judge_moved(known: verify.Expectation, got: Any, lse: Any = None) -> verify.Check:
        wrong = got.copy()
        wrong[0, 1, 17, 3] += 5
        return judge(known, wrong, lse)

    monkeypatch.setattr(verify.Expectation, "judge", judge_moved)
    text = invoke("run", *SMALL, *FAST, code=1).stdout
    assert "FAILED" in text
    assert "worst element: b=0 h=1 query=17 column=3: got" in text and "expected" in text
    assert not json_of("run", *SMALL, *FAST, code=1)["ok"]


@needs_compiler
def test_a_kernel_that_does_not_compile_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "kernels"
    (folder / "flashcore").mkdir(parents=True)
    (folder / "ladder").mkdir()
    (folder / "ladder" / "scalar.cu").write_text("int x = ;\n")
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(folder))
    # Another head dim than elsewhere: on a GPU, loaded kernels stay loaded.
    job = ("run", "--S", "8", "--D", "29", *FAST, "--kernel", "scalar")
    result = invoke(*job, code=1)
    assert "scalar.cu, line 1" in result.stderr and "does not compile" in result.stderr


def test_run_without_cupy_still_runs_and_says_why_nothing_was_built() -> None:
    code = (
        "import sys; sys.modules['cupy'] = sys.modules['cupy_backends'] = None\n"
        "from flashcore_cupy._cli import main\n"
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


@needs_compiler
@pytest.mark.parametrize("command", ["run", "ladder", "warmup"])
def test_a_target_that_the_compiler_does_not_know(command: str) -> None:
    result = invoke(command, "--arch", "sm_31", code=2)
    assert "sm_31" in result.stderr and "sm_90a" in result.stderr


@needs_compiler
def test_a_target_in_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_31")
    assert "sm_31" in invoke("run", *SMALL, code=2).stderr


# --- ladder ------------------------------------------------------------------------------------


@needs_compiler
def test_ladder_shows_every_rung() -> None:
    result = invoke("ladder", *SMALL, *FAST)
    lines = result.stdout.splitlines()
    starts = [
        line.split()[0] for line in lines if line.split() and line.split()[0] in tiles.KERNELS
    ]
    assert starts[: len(tiles.KERNELS)] == list(tiles.KERNELS)
    for word in ("builds", "launches", "correct", "speed-up", "registers", "shared", "spills"):
        assert word in result.stdout


@needs_compiler
def test_ladder_as_json() -> None:
    data = json_of("ladder", *SMALL, *FAST)
    assert data["ok"]
    assert [rung["kernel"] for rung in data["rungs"]] == list(tiles.KERNELS)
    for rung in data["rungs"]:
        if tiles.KERNELS[rung["kernel"]].tma and data["machine"]["arch"] != tiles.HOPPER:
            assert "sm_90a alone" in rung["refused"]
            continue
        assert rung["builds"] and rung["registers"] > 16 and rung["spill_bytes"] == 0
        assert rung["shared_bytes"] > 1000
        assert rung["launches"] is rung["correct"] is (True if ON_GPU else None)
        assert (rung["latency_us"] is not None) == (rung["speedup"] is not None) == ON_GPU


@needs_compiler
def test_ladder_says_why_a_rung_refuses() -> None:
    data = json_of("ladder", *SMALL, *FAST, "--dtype", "float32")
    assert data["ok"]
    for rung in data["rungs"]:
        if "float32" in tiles.KERNELS[rung["kernel"]].dtypes:
            assert rung["builds"] and rung["refused"] is None
        else:
            assert "not float32" in rung["refused"]
    table = invoke("ladder", *SMALL, *FAST, "--dtype", "float32").stdout
    assert "wmma_unfused: takes float16 and bfloat16, not float32" in table


@needs_compiler
def test_a_rung_that_does_not_compile_fails_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    with (folder / "ladder" / "wmma_unfused.cu").open("a") as source:
        source.write("\nint x = ;\n")
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(folder))
    data = json_of("ladder", *SMALL, *FAST, code=1)
    builds = {rung["kernel"]: rung["builds"] for rung in data["rungs"] if not rung["refused"]}
    assert builds == {kernel: kernel != "wmma_unfused" for kernel in builds}
    assert "wmma_unfused.cu" in data["rungs"][1]["failure"]


def measured_ladder(folder: Path) -> Path:
    """Made-up results, in the form of a GPU's."""
    rungs = [
        {
            "kernel": kernel,
            "idea": "",
            "builds": True,
            "launches": True,
            "correct": kernel != "wmma_cp_async",
            "max_error": 1e-4,
            "latency_us": 2400.0 / 2.5**number,
            "speedup": 2.5**number,
            "registers": 96,
            "shared_bytes": 4096,
            "spill_bytes": 0,
            "quantization_error": 0.04 if "fp8" in kernel else None,
            "failure": "max error 1 > allowed 0.1" if kernel == "wmma_cp_async" else None,
        }
        for number, kernel in enumerate(tiles.KERNELS)
    ]
    problem = {"B": 1, "H": 8, "Hkv": 8, "S": 512, "Skv": 512, "D": 64}
    data = {
        "problem": problem | {"dtype": "float16", "causal": False, "gate": None, "seed": 0},
        "machine": {"gpu": "Some GPU", "arch": "sm_90a"},
        "rungs": rungs,
        "baselines": [{"name": "first", "us": 22.0}],
        "rows_checked": 512,
    }
    path = folder / "ladder.json"
    path.write_text(json.dumps(data))
    return path


def test_the_ladder_fits_80_columns_and_cuts_no_figure(tmp_path: Path) -> None:
    data = json.loads(measured_ladder(tmp_path).read_text())
    shown = Console(width=80, record=True, file=io.StringIO())
    shown.print(_render.ladder_table(ladder.Ladder.from_json(data), 80))
    text = shown.export_text()
    assert "\u2026" not in text  # rich's mark for what it cut
    assert "wmma_warp_softmax" in text and "launches" in text and "1.0e-04" in text


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


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
    figure = _plot.picture(ladder.Ladder.from_json(data))
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
    figure = _plot.picture(ladder.Ladder.from_json(data))
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
    figure = _plot.picture(ladder.Ladder.from_json(data))
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[:2] == [r"_a \$b^\$, 40.0 µs", "other, 5.00 µs"]


@without_gpu
@needs_compiler
def test_a_ladder_without_a_gpu_is_drawn_from_what_is_known(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ladder.png"
    invoke("ladder", *SMALL, "--plot", str(picture))
    assert png_size(picture)[0] >= 1200


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
def test_selftest_without_a_gpu_says_so() -> None:
    assert "selftest needs a GPU: " in invoke("selftest", code=1).stderr


@needs_compiler
def test_warmup_reports_resources() -> None:
    data = json_of("warmup", "--kernel", "wmma_fused_32", "--arch", "sm_80", "--arch", "sm_90a")
    assert list(data) == ["kernels", "left_out"] and data["left_out"] == []
    rows = list(tiles.rows_of("wmma_fused_32"))
    assert len(data["kernels"]) == 2 * 2 * 2 * len(rows)  # targets, dtypes, causal
    keys = {"kernel", "arch", "registers", "shared_bytes", "local_bytes", "spill_bytes"}
    for build in data["kernels"]:
        assert set(build) == keys
        assert build["kernel"] == "wmma_fused_32" and build["arch"] in ("sm_80", "sm_90a")
        assert build["registers"] > 16 and build["local_bytes"] == build["spill_bytes"] == 0
    table = invoke("warmup", "--kernel", "wmma_fused_32", "--arch", "sm_80").stdout
    assert "wmma_fused_32" in table and "sm_80" in table


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "arch", "why"),
    [("wmma_cp_async", "sm_75", "needs cp.async"), ("wgmma_sm90", "sm_80", "needs wgmma")],
)
def test_warmup_says_why_there_is_nothing_to_compile(kernel: str, arch: str, why: str) -> None:
    data = json_of("warmup", "--kernel", kernel, "--arch", arch)
    (left_out,) = data["left_out"]
    assert data["kernels"] == [] and (left_out["kernel"], left_out["arch"]) == (kernel, arch)
    assert why in left_out["reason"]
    text = invoke("warmup", "--kernel", kernel, "--arch", arch).stdout
    assert text.startswith(f"{kernel} for {arch}: nothing to compile, for it {why}")


def test_the_help_of_warmup_counts_the_kernels() -> None:
    text = " ".join(invoke("warmup", "--help").stdout.split())
    for arch in tiles.TARGETS:
        count = len(list(builds.table_configs(tiles.KERNELS, arch)))
        assert count > 20 and f"{count} for {arch}" in text


def waits(monkeypatch: pytest.MonkeyPatch, first: float, every: float) -> None:
    monkeypatch.setattr(_steps, "_FIRST_S", first)
    monkeypatch.setattr(_steps, "_EVERY_S", every)


@needs_compiler
def test_warmup_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_all(wanted: Any, on_done: Any) -> list[Any]:
        for number in range(3):
            on_done(ValueError())
            time.sleep(0.1 if number < 2 else 0.5)
        return []

    waits(monkeypatch, 0.15, 0.2)
    monkeypatch.setattr(builds, "build_all", build_all)
    result = invoke("warmup", "--kernel", "scalar", "--arch", "sm_80", "--json")
    lines = result.stderr.splitlines()
    assert lines[0] == "compiling: 2 of 12 (0 s)" and lines[1] == "compiling: 3 of 12 (0 s)"
    assert json.loads(result.stdout)["kernels"] == []


@without_gpu
@needs_compiler
def test_a_long_run_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = job.attention

    def slow(*arguments: Any, **rules: Any) -> Any:
        time.sleep(0.3)
        return attention(*arguments, **rules)

    waits(monkeypatch, 0.01, 0.1)
    monkeypatch.setattr(job, "attention", slow)
    monkeypatch.setattr(_cli, "_LONG_FLOPS", 1)
    lines = invoke("run", *SMALL, *FAST).stderr.splitlines()
    assert lines[0].startswith("no GPU (") and lines[1].startswith("one call is ")
    told = " ".join(lines[2:])
    assert "attention on the CPU, once (" in told and "timing calls (" in told


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
def test_workers_end_with_warmup_on_sigterm(tmp_path: Path) -> None:
    """Also those in the middle of a compilation: these kernels take seconds each."""
    command = (*COMMAND, "warmup", "--arch", "sm_80", "--kernel", "mma_sm80")
    environment = dict(os.environ, FLASHCORE_CACHE_DIR=str(tmp_path))
    # The pipe stands open for as long as a worker holds it.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stderr is not None
        assert started.stderr.readline().startswith("compiling: ")
        began = time.monotonic()
        started.terminate()
        assert started.stderr.read().splitlines()[-1] == "stopped by SIGTERM"
        assert started.wait(timeout=5) == 143
    assert time.monotonic() - began < 5


@needs_compiler
def test_cache_shows_and_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    assert json_of("cache")["entries"] == []
    assert "0 kernels" in invoke("cache").stdout
    json_of("warmup", "--kernel", "wmma_fused_32", "--arch", "sm_75")
    data = json_of("cache")
    assert data["folder"] == str(tmp_path / "cache")
    assert len(data["entries"]) == 10 and data["size_bytes"] > 10_000
    assert {entry["arch"] for entry in data["entries"]} == {"sm_75"}
    assert "wmma_fused.cu" in invoke("cache").stdout
    assert json_of("cache", "--clear")["cleared"] == 10
    assert "removed 0 kernels" in invoke("cache", "--clear").stdout


def test_doctor_lists_its_findings() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == (0 if data["ok"] else 1)
    names = {finding["name"] for finding in data["findings"]}
    assert {"CuPy", "driver", "NVRTC", "GPU", "cache"} <= names
    table = CliRunner().invoke(main, ["doctor"])
    assert table.exit_code == result.exit_code and "NVRTC" in table.stdout


def test_version_and_help() -> None:
    assert __version__ in invoke("--version").stdout
    text = invoke("--help").stdout
    for command in ("run", "explain", "ladder", "selftest", "doctor", "warmup", "cache"):
        assert command in text and text.isascii()
        page = invoke(command, "--help").stdout
        assert "--json" in page and page.isascii()


def test_numbers_that_json_lacks_become_null() -> None:
    data = {"a": [np.nan, np.inf, 1.5], "b": {"c": (-np.inf, True, None, "x", 3)}}
    assert _render.clean(data) == {"a": [None, None, 1.5], "b": {"c": [None, True, None, "x", 3]}}


def test_figures_keep_three_digits() -> None:
    shown = [_render.significant(us) for us in (0.5, 7.25, 12.345, 99.96, 2480.4)]
    assert shown == ["0.500", "7.25", "12.3", "100", "2480"]


@needs_compiler
def test_the_checkout_has_a_front_door() -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "run", *SMALL, *FAST, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    wrong = [sys.executable, "cli.py", "run", "--S", "0"]
    done = subprocess.run(wrong, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "--S" in done.stderr and "Traceback" not in done.stderr


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


def test_explain_takes_a_kernel_and_changes_to_its_row() -> None:
    data = json_of("explain", "--kernel", "wmma_fused_64", "--set", "block_m=32,warps_m=2")
    assert data["kernel"] == "wmma_fused_64" and data["config"].startswith("32x64 tile")


@pytest.mark.gpu
def test_explain_is_the_librarys_own() -> None:
    import cupy

    q, k, v = cupy.zeros((3, 1, 512, 8, 64), cupy.float16)
    said = flashcore_cupy.explain(q, k, v, layout="bshd", causal=True, window=(99, 0))
    options = ("--layout", "bshd", "--causal", "--window", "99", "0")
    shown = invoke("explain", *options).stdout
    assert " ".join(shown.split()) == " ".join(said.split())


# --- what a terminal can show --------------------------------------------------------------------


def pages(folder: Path) -> dict[str, tuple[str, ...]]:
    source = str(measured_ladder(folder))
    return {
        "run": ("run", *SMALL, *FAST),
        "explain": ("explain", "--S", "4096"),
        "ladder": ("ladder", "--from", source),
        "doctor": ("doctor",),
        "cache": ("cache",),
        "warmup": ("warmup", "--kernel", "wmma_fused_32", "--arch", "sm_80"),
    }


@needs_compiler
@pytest.mark.parametrize("page", ["run", "explain", "ladder", "doctor", "cache", "warmup"])
def test_pages_keep_to_columns_and_leave_no_blanks(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = pages(tmp_path)[page]
    widths = {}
    for columns in (60, 85, 110, 240):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = CliRunner().invoke(main, arguments).stdout
        lines = text.splitlines()
        assert text and not [line for line in lines if line != line.rstrip()]
        assert "…" not in text  # rich's mark for what it cut
        widths[columns] = max(map(len, lines))
        assert widths[columns] <= columns
    if page == "run":
        assert widths[240] > 110  # not cut at what a file gets by default
    monkeypatch.delenv("COLUMNS")
    lines = CliRunner().invoke(main, arguments).stdout.splitlines()
    assert max(map(len, lines)) == widths[110]


@pytest.mark.parametrize("columns", ["", "0", "-5", "wide", "1e3", "9" * 5000])
def test_columns_that_say_nothing_are_passed_over(columns: str, tmp_path: Path) -> None:
    arguments = pages(tmp_path)["ladder"]
    shown = CliRunner().invoke(main, arguments, env={"COLUMNS": columns})
    assert shown.stdout == CliRunner().invoke(main, arguments, env={"COLUMNS": None}).stdout


@needs_compiler
@pytest.mark.parametrize("page", ["run", "explain", "ladder", "doctor", "cache", "warmup"])
def test_pages_are_plain_where_the_stream_is(page: str, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"  # no text in UTF-8
    for encoding in ("ascii", "utf-8"):
        environment = os.environb | {b"PYTHONIOENCODING": encoding.encode()}
        if page in ("cache", "doctor"):
            environment[b"FLASHCORE_CACHE_DIR"] = folder
        command = [*COMMAND, *pages(tmp_path)[page]]
        done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=ROOT)
        assert done.returncode == (1 if page == "ladder" else 0), done.stderr
        assert b"Traceback" not in done.stderr
        text = done.stdout.decode(encoding)
        if page in ("cache", "doctor"):
            assert "caf\\xe9" in "".join(text.split())
        if page == "ladder":
            middle, rule = ("-", "-----") if encoding == "ascii" else ("·", "─────")
            assert text.startswith(f"FlashCore ladder {middle} Some GPU {middle} B=1 H=8")
            assert f"\n{rule}" in text


def test_plain_text_is_readable() -> None:
    assert _terminal.plain("3 µs · 2.5× ─ ≤ é \udce9 中", "ascii") == (
        "3 us - 2.5x - <= \\xe9 \\xe9 \\u4e2d"
    )
    assert _terminal.plain("µ · 中 \udce9", "utf-8") == "µ · 中 \\xe9"
    assert _terminal.plain("µ · 中", "latin-1") == "µ · \\u4e2d"


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
    with _steps.Steps() as steps:
        steps.start(4, "compiling")
        steps.step("scalar.cu")
        steps.phase("checking")
        time.sleep(0.3)
    assert "checking" in shown.getvalue() and "(0 s)" not in shown.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    with _steps.Steps() as steps:
        steps.start(4, "compiling")
        steps.step("scalar.cu")
        time.sleep(0.1)
    assert "compiling: 1 of 4 (0 s)\n" in shown.getvalue()


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_commands_on_a_gpu(tmp_path: Path) -> None:
    data = json_of("run", "--kernel", "fp8_wmma", "--iters", "5")
    assert data["ok"] and data["graph"]["median_us"] < data["call"]["median_us"] * 2
    assert data["check"]["quantization_error"] > 0.001
    picture, results = tmp_path / "ladder.png", tmp_path / "selftest.json"
    data = json_of("ladder", "--iters", "5", "--plot", str(picture), "--baseline-us", "22")
    assert all(rung["correct"] for rung in data["rungs"]) and png_size(picture)
    assert data["rungs"][0]["speedup"] == 1
    assert json_of("selftest", "--quick", "--output", str(results))["failed"] == 0
    assert json.loads(results.read_text())["emulated"] is False


@pytest.mark.gpu
def test_the_ladder_runs_rules_on_a_gpu() -> None:
    rules = ("--causal", "top-left", "--window", "30", "0", "--softcap", "5", "--layout", "bshd")
    data = json_of("ladder", "--S", "100", "--Dv", "32", "--iters", "5", *rules)
    assert data["problem"]["softcap"] == 5
    able = [rung["kernel"] for rung in data["rungs"] if not rung["refused"]]
    assert "mma_sm80" in able and data["ok"]
    assert all(rung["correct"] for rung in data["rungs"] if rung["kernel"] in able)
