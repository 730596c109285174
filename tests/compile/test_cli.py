"""The command line where it compiles: run, ladder, warmup, cache, and the pages of all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases_cli import COMMAND, FAST, SMALL, invoke, json_of, pages, png_size, waits
from click.testing import CliRunner
from helpers import ROOT, gpu_skip_reason

from flashcore_cupy.check import verify
from flashcore_cupy.check.verify_gradients import ExpectedGradient
from flashcore_cupy.cli import commands
from flashcore_cupy.cli.commands import main
from flashcore_cupy.launch import builds
from flashcore_cupy.measure import backward, forward, problems
from flashcore_cupy.select import registry, selector
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS, ROWS

ON_GPU = gpu_skip_reason() is None

without_gpu = pytest.mark.skipif(ON_GPU, reason="shows what happens without a GPU")


pytestmark = pytest.mark.usefixtures("lines_of_a_file")


# --- run ---------------------------------------------------------------------------------------


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
def test_run_without_a_gpu_says_so_in_one_line_and_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits(monkeypatch, 600, 600)  # for a busy machine
    result = invoke("run", *SMALL, *FAST, "--kernel", "scalar", "--arch", "sm_80")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("no GPU (") and "NumPy" in result.stderr
    assert "scalar.cu for sm_80" in result.stdout and "built for sm_80, not run" in result.stdout


def test_run_as_json() -> None:
    data = json_of("run", *SMALL, *FAST, "--causal", "--Skv", "50", "--Hkv", "1", "--seed", "7")
    assert data["ok"] and data["check"]["ok"]
    assert data["check"]["max_error"] <= data["check"]["allowed_error"]
    assert data["problem"] == {
        "B": 1, "H": 2, "Hkv": 1, "S": 40, "Skv": 50, "D": 32, "Dv": 32, "dtype": "float16",
        "layout": "bhsd", "causal": True, "window": [-1, -1], "softcap": 0.0, "dropout_p": 0.0,
        "gate": None, "seed": 7,
    }  # fmt: skip
    assert data["ran"] == (data["kernel"] if ON_GPU else "numpy")
    (build,) = data["builds"]
    assert build["arch"] == data["machine"]["arch"]
    assert build["registers"] > 16 and build["shared_bytes"] > 1000 and build["spill_bytes"] == 0
    assert data["call"]["median_us"] > 0 and data["tflops"] > 0
    assert (data["graph"] is not None) == ON_GPU == (data["no_gpu"] is None)


def test_run_checks_every_gradient() -> None:
    job = ("run", "--backward", *SMALL, *FAST, "--causal", "--Skv", "50", "--Hkv", "1")
    data = json_of(*job, "--seed", "7", "--arch", "sm_80")
    assert data["ok"] and data["check"]["ok"] and data["problem"]["wrt"] == ["q", "k", "v"]
    assert list(data["check"]["each"]) == ["dq", "dk", "dv"]
    for found in data["check"]["each"].values():
        assert 0 < found["max_error"] <= found["allowed_error"]
    assert data["ran"] == (data["kernel"] if ON_GPU else "numpy") and data["tflops"] > 0
    sources = [build["source"] for build in data["builds"]]
    assert sources in [["bwd_rows.cu", *[f"bwd_{arch}.cu"] * 2] for arch in ("sm80", "sm90")]
    assert all(build["spill_bytes"] == 0 for build in data["builds"])
    text = invoke(*job, "--wrt", "k").stdout
    assert "backward for k, seed" in text and "dk: max error" in text and "dq: max" not in text
    assert "1 of 1 heads of k and v" in text and "latency" in text


@pytest.mark.parametrize("gate", ["dp", "ds"])
def test_run_checks_a_gate_of_the_backward_pass(gate: str) -> None:
    options = ("--layout", "bshd", "--softcap", "2", "--window", "9", "3", "--wrt", "k")
    data = json_of("run", "--backward", *SMALL, *FAST, "--gate", gate, *options)
    assert data["ok"] and data["problem"]["gate"] == gate and data["tflops"] is None
    assert list(data["check"]["each"]) == [gate] and data["problem"]["wrt"] == ["k"]


def test_a_wrong_gradient_is_shown_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ExpectedGradient.judge

    def judge_moved(known: ExpectedGradient, got: Any) -> Any:
        wrong = got.copy()
        wrong[-1, 1, 17, 3] += 5
        return judge(known, wrong)

    monkeypatch.setattr(ExpectedGradient, "judge", judge_moved)
    job = ("run", "--backward", *SMALL, *FAST, "--H", "4", "--Hkv", "2", "--wrt", "q")
    text = invoke(*job, code=1).stdout
    assert "FAILED" in text and "dq: max error" in text
    assert "worst element: b=0 h=3 row=17 column=3: got" in text
    assert not json_of(*job, code=1)["ok"]


@without_gpu  # where the first run's kernel would still be loaded
def test_the_second_run_takes_the_kernel_from_the_cache() -> None:
    job = ("run", *SMALL, *FAST, "--kernel", "wmma_fused_64")
    json_of(*job)
    (build,) = json_of(*job)["builds"]
    assert build["from_cache"]
    assert "from the cache" in invoke(*job).stdout


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
    "dropout": (("--dropout-p", "0.25"), "dropout 0.25", {"dropout_p": 0.25}),
    "layout": (("--layout", "bshd"), "bshd", {"layout": "bshd"}),
    "Dv": (("--Dv", "64"), "D=32 Dv=64 float16", {"Dv": 64}),
    "together": (
        ("--causal", "--window", "3", "0", "--softcap", "9", "--layout", "bshd", "--Dv", "16"),
        "D=32 Dv=16 float16 causal window 3,0 softcap 9 bshd",
        {"causal": True, "window": [3, 0], "softcap": 9.0, "layout": "bshd", "Dv": 16},
    ),
}


@pytest.mark.parametrize(("options", "line", "told"), RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("gate", ["none", "softmax", "pv"])
def test_run_takes_rules_and_shows_them(
    options: tuple[str, ...], line: str, told: dict[str, Any], gate: str
) -> None:
    job = ("run", *SMALL, *FAST, *options, "--gate", gate)
    data = json_of(*job)
    assert data["ok"] and told.items() <= data["problem"].items()
    assert f"{line}, " in invoke(*job).stdout


@pytest.mark.parametrize("rule", ["causal", "window", "softcap", "layout"])
def test_run_computes_the_rule_that_it_names(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle, which takes its rules from the problem, finds a run without one of them wrong."""
    rules_of = problems.rules_of
    for module in (forward, backward):
        monkeypatch.setattr(
            module, "rules_of", lambda p: {n: x for n, x in rules_of(p).items() if n != rule}
        )
    options = ("--causal", "top-left", "--window", "5", "5", "--softcap", "0.5")
    shape = ("--layout", "bshd", "--S", "32", "--H", "32", "--Skv", "40")
    if rule == "layout":  # heads and rows change places, which other sizes would refuse
        shape = ("--layout", "bshd", "--S", "32", "--H", "32")
    invoke("run", "--D", "32", *FAST, *options, *shape, code=1)
    if rule != "layout":  # which a gradient's own array has, too
        invoke("run", "--backward", "--D", "32", *FAST, *options, *shape, code=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_run_takes_other_dtypes(dtype: str) -> None:
    assert json_of("run", *SMALL, *FAST, "--dtype", dtype)["problem"]["dtype"] == dtype


def test_set_changes_the_configuration() -> None:
    job = ("run", *SMALL, *FAST, "--no-graph", "--kernel", "wmma_fused_64")
    data = json_of(*job, "--set", "block_m=32", "--set", "warps_m=2,num_stages=2 cp_async=true")
    assert data["config"].startswith("32x64 tile, 4 warps (2x2), 2 stages, cp_async")
    assert data["graph"] is None


def test_fp8_reports_both_of_its_kernels() -> None:
    data = json_of("run", *SMALL, *FAST, "--kernel", "fp8_wmma")
    assert [build["source"] for build in data["builds"]] == [
        "ladder/fp8_quantize.cu",
        "ladder/wmma_fused.cu",
    ]
    assert (data["check"]["quantization_error"] is not None) == ON_GPU


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


@pytest.mark.parametrize("command", ["run", "ladder", "warmup"])
def test_a_target_that_the_compiler_does_not_know(command: str) -> None:
    result = invoke(command, "--arch", "sm_31", code=2)
    assert "sm_31" in result.stderr and "sm_90a" in result.stderr


def test_a_target_in_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_31")
    assert "sm_31" in invoke("run", *SMALL, code=2).stderr
    assert "sm_31" in invoke("emulate", *SMALL, code=2).stderr


# --- ladder ------------------------------------------------------------------------------------


def test_ladder_shows_every_rung() -> None:
    result = invoke("ladder", *SMALL, *FAST)
    lines = result.stdout.splitlines()
    starts = [
        line.split()[0] for line in lines if line.split() and line.split()[0] in registry.KERNELS
    ]
    assert starts[: len(registry.KERNELS)] == list(registry.KERNELS)
    for word in ("builds", "launches", "correct", "speed-up", "registers", "shared", "spills"):
        assert word in result.stdout


def test_ladder_as_json() -> None:
    data = json_of("ladder", *SMALL, *FAST)
    assert data["ok"]
    assert [rung["kernel"] for rung in data["rungs"]] == list(registry.KERNELS)
    for rung in data["rungs"]:
        if not registry.KERNELS[rung["kernel"]].runs_on(data["machine"]["arch"]):
            assert "sm_90a alone" in rung["refused"]
            continue
        assert rung["builds"] and rung["registers"] > 16 and rung["spill_bytes"] == 0
        assert rung["shared_bytes"] > 1000
        assert rung["launches"] is rung["correct"] is (True if ON_GPU else None)
        assert (rung["latency_us"] is not None) == (rung["speedup"] is not None) == ON_GPU


def test_ladder_says_why_a_rung_refuses() -> None:
    data = json_of("ladder", *SMALL, *FAST, "--dtype", "float32")
    assert data["ok"]
    for rung in data["rungs"]:
        if "float32" in registry.KERNELS[rung["kernel"]].dtypes:
            assert rung["builds"] and rung["refused"] is None
        else:
            assert "not float32" in rung["refused"]
    shown = invoke("ladder", *SMALL, *FAST, "--dtype", "float32").stdout
    assert "wmma_unfused: takes float16 and bfloat16, not float32" in shown


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


def test_ladder_of_the_backward_pass(tmp_path: Path) -> None:
    data = json_of("ladder", "--backward", *SMALL, *FAST)
    stored = tmp_path / "backward.json"
    stored.write_text(json.dumps(data | {"rows_checked": 40, "heads_checked": 1}))
    again = invoke("ladder", "--from", str(stored)).stdout
    assert "D=32 float16 backward\n" in again and "over 1 of 2 heads of k and v" in again
    kernels = [rung["kernel"] for rung in data["rungs"]]
    assert data["ok"] and kernels == [*reversed(BACKWARD_KERNELS)]
    for rung in data["rungs"]:
        if rung["kernel"] == "bwd_sm80" or data["machine"]["arch"] == "sm_90a":
            assert rung["builds"] and rung["registers"] > 16 and rung["spill_bytes"] == 0
            one_pass = rung["kernel"] != "bwd_sm80"
            assert rung["config"].startswith("dq, dk, dv: " if one_pass else "dk, dv: ")
            assert ("; dq: " in rung["config"]) is not one_pass
            assert rung["correct"] is (True if ON_GPU else None)
    shown = invoke("ladder", "--backward", *SMALL, *FAST, "--dtype", "float32").stdout
    assert "bwd_sm90: does not take float32" in shown and "float32 backward\n" in shown


@without_gpu
def test_a_ladder_without_a_gpu_is_drawn_from_what_is_known(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ladder.png"
    invoke("ladder", *SMALL, *FAST, "--plot", str(picture))
    assert png_size(picture)[0] >= 1200


def test_warmup_reports_resources() -> None:
    data = json_of("warmup", "--kernel", "wmma_fused_32", "--arch", "sm_80", "--arch", "sm_90a")
    assert list(data) == ["kernels", "left_out"] and data["left_out"] == []
    rows = list(selector.rows_of("wmma_fused_32"))
    assert len(data["kernels"]) == 2 * 2 * 2 * len(rows)  # targets, dtypes, causal
    keys = {"kernel", "arch", "registers", "shared_bytes", "local_bytes", "spill_bytes"}
    for build in data["kernels"]:
        assert set(build) == keys
        assert build["kernel"] == "wmma_fused_32" and build["arch"] in ("sm_80", "sm_90a")
        assert build["registers"] > 16 and build["local_bytes"] == build["spill_bytes"] == 0
    shown = invoke("warmup", "--kernel", "wmma_fused_32", "--arch", "sm_80").stdout
    assert "wmma_fused_32" in shown and "sm_80" in shown


def test_warmup_builds_the_backward_pass() -> None:
    data = json_of("warmup", "--kernel", "bwd_sm90", "--arch", "sm_90a")
    assert {row.dims[0] for row in ROWS if row.kernel == "bwd_sm90"} == {64, 96, 128}
    # For each dtype: one pass, causal or not, a kernel ahead and one behind; two passes for 96.
    assert len(data["kernels"]) == 2 * (2 * (2 + 2) + (2 * 2 + 1))
    assert {build["kernel"] for build in data["kernels"]} == {"bwd_sm90"}
    assert not any(build["spill_bytes"] for build in data["kernels"])
    ahead = set(builds.table_configs(builds.KERNELS, "sm_90a"))
    assert {config.kernel for config in ahead} >= {*registry.KERNELS, *BACKWARD_KERNELS}


@pytest.mark.parametrize(
    ("kernel", "arch", "why"),
    [
        ("wmma_cp_async", "sm_75", "needs cp.async"),
        ("wgmma_sm90", "sm_80", "needs wgmma"),
        ("bwd_sm90", "sm_80", "needs wgmma"),
        ("bwd_sm90_wide", "sm_80", "needs wgmma"),
        ("bwd_sm80", "sm_75", "needs cp.async"),
    ],
)
def test_warmup_says_why_there_is_nothing_to_compile(kernel: str, arch: str, why: str) -> None:
    data = json_of("warmup", "--kernel", kernel, "--arch", arch)
    (left_out,) = data["left_out"]
    assert data["kernels"] == [] and (left_out["kernel"], left_out["arch"]) == (kernel, arch)
    assert why in left_out["reason"]
    text = invoke("warmup", "--kernel", kernel, "--arch", arch).stdout
    assert text.startswith(f"{kernel} for {arch}: nothing to compile, for it {why}")


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
def test_a_long_run_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = forward.attention

    def slow(*arguments: Any, **rules: Any) -> Any:
        time.sleep(0.3)
        return attention(*arguments, **rules)

    waits(monkeypatch, 0.01, 0.1)
    monkeypatch.setattr(forward, "attention", slow)
    monkeypatch.setattr(commands, "_LONG_FLOPS", 1)
    lines = invoke("run", *SMALL, *FAST).stderr.splitlines()
    assert lines[0].startswith("no GPU (") and lines[1].startswith("that is ")
    told = " ".join(lines[2:])
    assert "attention on the CPU, once (" in told and "timing calls (" in told


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
