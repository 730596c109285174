"""What the examples have in CUDA compiles."""

from __future__ import annotations

import ast
from dataclasses import replace

from helpers import ROOT

from flashcore_cupy.jit import compiler
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.mods import Mods
from flashcore_cupy.problem.rules import Rules
from flashcore_cupy.select import selector

SCORE_MOD = ROOT / "examples" / "score_mod.py"


def test_the_cuda_expressions_compile() -> None:
    """Without a GPU the example itself takes the callables."""
    found = {
        target.id: node.value.value
        for node in ast.walk(ast.parse(SCORE_MOD.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("score_mod", "mask_mod")
    }
    mods = Mods(**found, args=(("rate", "float32"), ("document", "int32")))
    problem = replace(contiguous_problem(2, 4, 512, 64), rules=Rules(mods=mods))
    config = selector.select(problem, "sm_80").config
    compiled = compiler.compile_kernel(config.source, config.defines(), "sm_80", config.headers)
    assert "fwd_sm80" in compiled.entries
