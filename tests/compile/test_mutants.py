"""Kernels with one place broken: a tenth of them is tried here, another one each day."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mutants
import pytest
from cases_mutants import KNOWN, TRIALS
from helpers import ROOT, today

from flashcore_cupy.cpu.emulator.build import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def test_a_tenth_of_the_broken_places_is_found() -> None:
    tenth = today() % 10
    script = str(ROOT / "tests" / "mutate_barriers.py")
    done = subprocess.run(
        [sys.executable, script, "--tenth", str(tenth)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"--tenth {tenth}\n{done.stdout}\n{done.stderr}"


def test_what_is_known_to_live_is_a_place(tmp_path: Path) -> None:
    names = {mutant.name for mutant in mutants.write(ROOT / "kernels", tmp_path / "kernels")}
    names |= {f"{trial.case.kernel}, {name}" for trial in TRIALS for name in names}
    assert set(KNOWN) <= names


def test_places_are_what_orders_and_what_bounds(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "some.cu").write_text(
        "__device__ void sync() { block_sync(); }\n"
        "__device__ bool has(int n, int end) { return warp_any(n < end); }\n"
        "constexpr bool FEW = N < 3;\n"
        "    if (tile + 1 <= end && at[i + 1] > 0) fence_registers(x);\n"
    )
    found = mutants.write(kernels, tmp_path / "copy")
    assert [(m.kind, m.line, m.text) for m in found] == [
        ("barrier", 1, "block_sync()"),
        (
            "bound",
            2,
            "__device__ bool has(int n, int end) { return warp_any(n < end); } [<= for <]",
        ),
        ("bound", 4, "if (tile + 1 <= end && at[i + 1] > 0) fence_registers(x); [< for <=]"),
        ("bound", 4, "if (tile + 1 <= end && at[i + 1] > 0) fence_registers(x); [>= for >]"),
        ("bound", 4, "if (tile + 1 <= end && at[i + 1] > 0) fence_registers(x); [0 for 1 in + 1]"),
    ]
    lines = (tmp_path / "copy" / "some.cu").read_text().splitlines()
    assert lines[2] == "__device__ void sync() { (mutants::is_broken(0) ? void() : block_sync()); }"
