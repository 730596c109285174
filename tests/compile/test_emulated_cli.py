"""The command line without a GPU: kernels run, are checked, and no latency is claimed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cases_cli import SMALL, invoke, json_of
from helpers import ROOT, gpu_skip_reason

from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.case import Case, packed
from flashcore_cupy.cpu.emulator.build import cxx
from flashcore_cupy.select import registry
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

pytestmark = [
    pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: there is none"),
    pytest.mark.usefixtures("lines_of_a_file"),
]
without_gpu = pytest.mark.skipif(
    gpu_skip_reason() is None, reason="shows what happens without a GPU"
)
ONE = ("--kernel", "mma_sm80", *SMALL)


@without_gpu
def test_run_checks_the_kernel_itself() -> None:
    data = json_of("run", *ONE)
    assert data["ok"] and data["emulated"] and data["ran"] == data["kernel"] == "mma_sm80"
    assert data["not_emulated"] is None and data["emulated_seconds"] > 0
    assert data["graph"] is data["call"] is data["tflops"] is data["share_of_peak"] is None
    assert data["check"]["lse_error"] is not None and data["builds"][0]["registers"] > 16
    result = invoke("run", *ONE)
    assert result.stderr.splitlines()[0].endswith("): emulated on the CPU")
    for word in ("CPU, emulated: ", "ok  max error", "which tells nothing of its time on a GPU"):
        assert word in result.stdout
    for word in ("latency", "TFLOP", " us", "not run"):
        assert word not in result.stdout


@without_gpu
@pytest.mark.parametrize("options", [("--gate", "softmax", "--layout", "bshd"), ("--causal",)])
def test_run_takes_gates_and_rules(options: tuple[str, ...]) -> None:
    data = json_of("run", *ONE, *options)
    assert data["ok"] and data["emulated"]


@without_gpu
def test_a_wrong_kernel_fails_its_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels = changed(tmp_path, "fwd_sm80.cu", "block_sync();", "if (FC_DIM_QK) return;")
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(kernels))
    assert not json_of("run", *ONE, code=1)["ok"]


@without_gpu
def test_ladder_checks_every_rung() -> None:
    data = json_of("ladder", *SMALL, "--dtype", "float32")
    assert data["ok"] and data["emulated"]
    for rung in data["rungs"]:
        able = "float32" in registry.KERNELS[rung["kernel"]].dtypes
        assert rung["launches"] is rung["correct"] is (True if able else None)
        assert rung["latency_us"] is rung["speedup"] is None
    text = invoke("ladder", *SMALL, "--dtype", "float32").stdout
    assert "emulated on the CPU, built for sm_90a" in text and "CUDA graph" not in text


@without_gpu
@pytest.mark.parametrize("kernel", BACKWARD_KERNELS)
def test_the_backward_pass_is_emulated(kernel: str) -> None:
    job = ("--backward", *SMALL, "--kernel", kernel, "--causal")
    data = json_of("run", *job)
    assert data["ok"] and data["emulated"] and data["ran"] == data["kernel"] == kernel
    assert data["graph"] is data["call"] is data["tflops"] is None
    assert data["not_emulated"] is None and data["emulated_seconds"] > 0
    data = json_of("emulate", *job, "--check", "races", "--schedules", "2")
    assert data["ok"] and data["checking"] and data["schedules"] == 2
    data = json_of("run", *job, "--D", "64", "--no-deterministic")
    assert data["ok"] and data["problem"]["deterministic"] is False
    for gate, name in (("dp", "k"), ("ds", "q")):
        data = json_of("run", *job, "--gate", gate, "--wrt", name)
        assert data["ok"] and data["emulated"] and list(data["check"]["each"]) == [gate]


@without_gpu
def test_ladder_checks_the_backward_kernels() -> None:
    data = json_of("ladder", "--backward", *SMALL, "--B", "2", "--layout", "bshd")
    assert data["ok"] and data["emulated"] and data["heads_checked"] == 4
    for rung in data["rungs"]:
        assert rung["launches"] and rung["correct"] and rung["max_error"] > 0
        assert rung["latency_us"] is rung["speedup"] is None
    text = invoke("ladder", "--backward", *SMALL, "--B", "2", "--layout", "bshd").stdout
    assert "over 4 of 4 heads of k and v" in text and "CUDA graph" not in text


def test_emulate_finds_a_race_of_the_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = "mbarrier_wait(&c.smem.tiles.empty[stage], nth / NUM_STAGES % 2 ^ 1);"
    kernels = changed(tmp_path, "sm80_backward/producer.cuh", wait, "")
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(kernels))
    sizes: Any = ("--H", "1", "--S", "300", "--D", "32", "--wrt", "k", "--check", "races")
    job = ("emulate", "--backward", "--kernel", "bwd_sm80", *sizes, "--schedules", "3")
    data = json_of(*job, code=1)
    assert not data["ok"] and "race" in data["failure"] and data["check"] is None


@without_gpu
def test_selftest_emulates_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("some", "mma_sm80", head_dim=32, head_dim_v=32, view="strided", repeats=3)
    invariant = Case("invariant", "mma_sm80", seqlen_kv=40, batch_invariant=True)
    every = [case, packed(invariant, ((5, 9), (0, 3), (3, 40)))]
    every += [Case("backward", "bwd_sm80", head_dim=32, head_dim_v=32, view="misaligned")]
    monkeypatch.setattr(matrix, "every_case", lambda: every)
    report = json_of("selftest")
    assert report["passed"] == 3 and report["failed"] == 0 and report["emulated"]
    text = invoke("selftest").stdout
    assert "3 passed, 0 failed emulated for sm_90a" in text and "\nbwd_sm80" in text


def changed(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of kernels/ in which the first ``old`` of a file is ``new``."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "kernels", kernels)
    text = (kernels / file).read_text()
    assert old in text
    (kernels / file).write_text(text.replace(old, new, 1))
    return kernels


def test_emulate_says_what_is_wrong_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: Any = ("--H", "1", "--S", "40", "--Skv", "300", "--D", "32")
    job = ("emulate", "--kernel", "mma_sm80", *sizes, "--check", "races", "--seed", "3")
    kernels = changed(tmp_path, "sm80/producer.cuh", "wait_empty(c, at, at.barriers_k);", "")
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(kernels))
    data = json_of(*job, "--schedules", "3", code=1)
    assert not data["ok"] and data["checking"] and "race" in data["failure"]
    assert data["check"] is None and 1 <= data["schedules"] <= 3
    text = invoke(*job, "--schedules", "3", code=1).stdout
    assert "race" in text and "fwd_sm80" in text


@pytest.mark.parametrize("command", ["run", "emulate"])
def test_pages_keep_to_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 80, 240):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = invoke(command, *ONE).stdout.splitlines()
        assert max(map(len, lines)) <= columns and "…" not in "".join(lines)
        assert not [line for line in lines if line != line.rstrip()]


def test_emulate_runs_several_schedules() -> None:
    data = json_of("emulate", *ONE, "--schedules", "2", "--seed", "5")
    assert data["ok"] and data["schedules"] == 2 and data["check"]["ok"] and not data["checking"]
    text = invoke("emulate", *ONE, "--schedules", "2", "--seed", "5").stdout
    assert "schedules of seeds 5 to 6" in text and "ok  max error" in text
