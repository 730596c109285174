"""Each bug that is put back still compiles."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases_bugs import BUGS, Bug, put_back

from flashcore_cupy.jit import compiler
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.select import selector


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_still_compiles(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next test would catch a compile error and prove nothing."""
    put_back(bug, tmp_path, monkeypatch)
    for kernel in bug.kernels:
        wanted = contiguous_problem(1, 2, 200, 64, gate=bug.gate, causal=bug.causal)
        c = selector.select(wanted, "sm_90a", kernel=kernel).config
        compiler.compile_kernel(c.source, c.defines(), "sm_90a")
