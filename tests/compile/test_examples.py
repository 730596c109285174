"""The examples run as they stand."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, compiler_skip_reason

from flashcore_cupy.jit import compiler
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.mods import Mods
from flashcore_cupy.problem.rules import Rules
from flashcore_cupy.select import selector

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[1])"


def _run(*command: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(script: Path) -> None:
    assert _run(str(script)).strip()


def test_the_torch_example_says_that_torch_is_missing() -> None:
    assert "torch is not installed" in _run("-c", WITHOUT_TORCH, str(_example("torch_tensors")))


def test_the_cuda_expressions_compile() -> None:
    """Without a GPU the example itself takes the callables."""
    if reason := compiler_skip_reason():
        pytest.skip(reason)
    found = {
        target.id: node.value.value
        for node in ast.walk(ast.parse(_example("score_mod").read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("score_mod", "mask_mod")
    }
    mods = Mods(**found, args=(("rate", "float32"), ("document", "int32")))
    problem = replace(contiguous_problem(2, 4, 512, 64), rules=Rules(mods=mods))
    config = selector.select(problem, "sm_80").config
    compiled = compiler.compile_kernel(config.source, config.defines(), "sm_80", config.headers)
    assert "fwd_sm80" in compiled.entries


def _example(name: str) -> Path:
    return ROOT / "examples" / f"{name}.py"
