"""What the tests of the command line call, and the results that they show."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flashcore_cupy.cli import progress
from flashcore_cupy.cli.commands import main
from flashcore_cupy.select import registry

SMALL = ("--B", "1", "--H", "2", "--S", "40", "--D", "32")
#: Without a GPU, NumPy: to build a kernel for the CPU takes seconds.
FAST = ("--iters", "2", "--warmup", "0", "--no-emulate")
COMMAND = (sys.executable, "-m", "flashcore_cupy")


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
        for number, kernel in enumerate(registry.KERNELS)
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


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def waits(monkeypatch: pytest.MonkeyPatch, first: float, every: float) -> None:
    monkeypatch.setattr(progress, "_FIRST_S", first)
    monkeypatch.setattr(progress, "_EVERY_S", every)


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
