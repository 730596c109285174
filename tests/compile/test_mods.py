"""A user's expressions in a kernel: what is compiled, and what is said where it does not compile.

Everything here is compiled, nothing run, so that no GPU is needed.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT

from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.jit.sources import kernels_dir
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.array_spec import spec_of
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.mods import MAX_MOD_ARGS, MOD_TYPES
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.select import selector
from flashcore_cupy.select.config import KernelConfig

ARCH = "sm_90a"


def configured(**rules: Any) -> KernelConfig:
    """What a problem with these rules is built from."""
    described = describe_rules(ScoreShape(1, 2, 64, 64), "float16", **rules)
    problem = replace(contiguous_problem(1, 2, 64, 32), rules=described)
    return selector.select(problem, ARCH).config


def compiled(**rules: Any) -> compiler.CompiledKernel:
    return compiler.compile_kernel(*builds.job_of(configured(**rules), ARCH))


def array(dtype: str) -> Any:
    return spec_of(np.ones(3, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))


@pytest.mark.parametrize("dtypes", [list(MOD_TYPES)[:5], list(MOD_TYPES)[4:]])
def test_arrays_of_every_dtype_are_read_by_element(dtypes: list[str]) -> None:
    args = {f"of_{dtype}": array(dtype) for dtype in dtypes}
    total = " + ".join(f"of_{dtype}[kv_idx % 3]" for dtype in dtypes)
    kernel = compiled(
        score_mod=f"score * fmaxf({total}, 0.5f)", mask_mod=f"{total} > b + h", mod_args=args
    )
    assert "warning" not in kernel.log


def test_sixteen_bit_floats_come_as_float() -> None:
    """Else an expression with two of them would mean nothing, or another operator."""
    args = {"x": array("float16"), "y": array("bfloat16")}
    assert compiled(score_mod="fmaf(x[h], y[h], score)", mod_args=args)


def test_expressions_may_have_lines_commas_and_comments() -> None:
    text = "kv_idx > q_idx  // the future\n    ? score - 1.0f /* each */ * h\n    : score"
    assert compiled(score_mod=text)
    assert compiled(mask_mod="min(q_idx, kv_idx) % 2 == 0 // even")


WRONG: dict[str, tuple[dict[str, str], int, str, str]] = {
    "an unknown name": (
        {"score_mod": "score + slope * kv_idx"},
        1,
        "score + slope * kv_idx",
        'identifier "slope" is undefined',
    ),
    "in the third line": (
        {"score_mod": "score\n+ 1.0f\n+ missing[kv_idx]\n+ 2.0f"},
        3,
        "+ missing[kv_idx]",
        'identifier "missing" is undefined',
    ),
    "a mask_mod beside a right score_mod": (
        {"score_mod": "score", "mask_mod": "q_idx >=\nkv_index"},
        2,
        "kv_index",
        'identifier "kv_index" is undefined',
    ),
    "no expression": ({"mask_mod": "return true"}, 1, "return true", "expected an expression"),
    "score in a mask_mod": ({"mask_mod": "score > 0"}, 1, "score > 0", '"score" is undefined'),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_shows_the_expression(name: str) -> None:
    rules, line, text, words = WRONG[name]
    with pytest.raises(nvrtc.CompileError) as caught:
        compiled(**rules)
    error, wrong = caught.value, "mask_mod" if "mask_mod" in rules else "score_mod"
    assert (error.path, error.line, error.text) == (wrong, line, text)
    first, *rest = str(error).splitlines()
    assert first == f"{wrong}, line {line}: {text!r}: the kernel does not compile for {ARCH}"
    assert words in "\n".join(rest)
    copy = pickle.loads(pickle.dumps(error))  # as it comes back from a worker process
    assert str(copy) == str(error) and copy.text == text


def test_an_error_elsewhere_shows_no_expression() -> None:
    config = configured(score_mod="score")
    source, defines, arch, headers = builds.job_of(config, ARCH)
    with pytest.raises(nvrtc.CompileError) as caught:
        compiler.compile_kernel(source, {**defines, "FC_SMEM_BYTES": 7}, arch, headers)
    assert caught.value.text is None
    assert Path(caught.value.path).is_relative_to(kernels_dir())


def test_an_unclosed_bracket_is_an_error_of_the_mods() -> None:
    with pytest.raises(nvrtc.CompileError) as caught:
        compiled(score_mod="(score + 1.0f")
    assert caught.value.path in ("score_mod", "mods.cuh")


def test_expressions_and_arrays_make_kernels_of_their_own() -> None:
    configs = [
        configured(),
        configured(score_mod="score"),
        configured(mask_mod="true"),
        configured(score_mod="score + 1"),
        configured(score_mod="score + x[0]", mod_args={"x": array("float32")}),
        configured(score_mod="score + x[0]", mod_args={"x": array("int32")}),
    ]
    assert len(set(configs)) == len(configs)
    jobs = [builds.job_of(config, ARCH) for config in configs]
    keys = [compiler._identify(*job)[0] for job in jobs]
    assert len(set(keys)) == len(keys)
    assert jobs[1][1] == jobs[3][1] and jobs[1][3] != jobs[3][3], "the header alone differs"
    assert not jobs[0][3] and jobs[1][3][0][0] == "flashcore/rules/mods.cuh"


def test_kernels_and_package_agree_on_mods() -> None:
    header = (ROOT / "kernels" / "flashcore" / "params.cuh").read_text()
    (most,) = re.findall(r"MAX_MOD_ARGS = (\d+);", header)
    assert int(most) == MAX_MOD_ARGS
    # The file that stands there otherwise declares the same two functions, with the same types.
    standing = (ROOT / "kernels" / "flashcore" / "rules" / "mods.cuh").read_text()
    generated = configured(score_mod="score").headers[0][1]
    for function in ("score_mod", "mask_mod"):
        declared = re.compile(rf"(\w+) {function}\(([^)]*)\)")
        types = [
            (found[1], re.findall(r"(?:const )?(\w+)&?(?: \w+)?(?:, |$)", found[2]))
            for found in map(declared.search, (standing, generated))
            if found
        ]
        assert len(types) == 2 and types[0] == types[1], function
