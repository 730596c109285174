"""The command line on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases_cli import invoke, json_of, png_size

import flashcore_cupy

pytestmark = pytest.mark.usefixtures("lines_of_a_file")


def test_explain_is_the_librarys_own() -> None:
    import cupy

    q, k, v = cupy.zeros((3, 1, 512, 8, 64), cupy.float16)
    said = flashcore_cupy.explain(q, k, v, layout="bshd", causal=True, window=(99, 0))
    options = ("--layout", "bshd", "--causal", "--window", "99", "0")
    shown = invoke("explain", *options).stdout
    assert " ".join(shown.split()) == " ".join(said.split())
    o, lse = flashcore_cupy.attention(q, k, v, layout="bshd", causal=True, return_lse=True)
    said = flashcore_cupy.explain_backward(q, q, k, v, o, lse, layout="bshd", causal=True)
    shown = invoke("explain", "--backward", "--layout", "bshd", "--causal").stdout
    assert " ".join(shown.split()) == " ".join(said.split())


# --- on a GPU ----------------------------------------------------------------------------------


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


def test_the_backward_pass_on_a_gpu() -> None:
    data = json_of("run", "--backward", "--causal", "--iters", "5")
    assert data["ok"] and data["graph"]["median_us"] < data["call"]["median_us"] * 2
    assert data["tflops"] > 0 and data["builds"][0]["source"] == "bwd_rows.cu"
    for name in ("q", "k"):
        assert json_of("run", "--backward", "--gate", "ds", "--wrt", name, "--iters", "2")["ok"]
    data = json_of("ladder", "--backward", "--S", "300", "--Dv", "32", "--iters", "5")
    able = [rung for rung in data["rungs"] if not rung["refused"]]
    assert able and all(rung["correct"] and rung["latency_us"] > 0 for rung in able)


def test_the_ladder_runs_rules_on_a_gpu() -> None:
    rules = ("--causal", "top-left", "--window", "30", "0", "--softcap", "5", "--layout", "bshd")
    data = json_of("ladder", "--S", "100", "--Dv", "32", "--iters", "5", *rules)
    assert data["problem"]["softcap"] == 5
    able = [rung["kernel"] for rung in data["rungs"] if not rung["refused"]]
    assert "mma_sm80" in able and data["ok"]
    assert all(rung["correct"] for rung in data["rungs"] if rung["kernel"] in able)
