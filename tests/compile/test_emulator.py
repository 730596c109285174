"""The kernels themselves, run on the CPU: the same cases, judged as on a GPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from flashcore_cupy.check import verify
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.arrays import Placed, described, set_up
from flashcore_cupy.check.selftest.case import Case, packed
from flashcore_cupy.cpu.emulator.build import cxx, library
from flashcore_cupy.cpu.emulator.run import (
    Schedule,
    gate_arrays,
    gate_output,
    run,
)
from flashcore_cupy.problem.attention_problem import operand
from flashcore_cupy.select import selector
from flashcore_cupy.select.parameters import gate_tiles

pytestmark = pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: there is none")

POINTERS = {
    "alibi_slopes": "alibi",
    "bias": "bias",
    "mask": "mask",
    "sink": "sink",
    "cu_seqlens_q": "cu_seqlens_q",
    "cu_seqlens_k": "cu_seqlens_kv",
}


def small(kernel: str, **changes: Any) -> Case:
    return Case("emulated", kernel, **changes)


def wide(kernel: str, **changes: Any) -> Case:
    """Of enough blocks for the tile of a full grid; queries and keys that are no whole tiles."""
    sizes = {"batch": 7, "heads": 16, "heads_kv": 2, "seqlen_q": 127, "seqlen_kv": 130}
    return small(kernel, **sizes | changes)


LENGTHS = ((0, 5), (77, 100), (130, 64), (1, 1), (33, 0), (0, 0))
#: Each covers another path; those that differ in sizes alone share a build.
CASES = {
    "sm_80": [
        small("scalar", causal=True),
        small("wmma_unfused", dtype="bfloat16"),
        small("wmma_fused_32", causal=True),
        small("wmma_fused_64", causal="top-left"),
        small("wmma_cp_async"),
        small("wmma_warp_softmax", causal=True),
        small("fp8_wmma", causal=True),
        small("mma_sm80", causal=True, view="strided"),
        small("mma_sm80", seqlen_q=300, seqlen_kv=700, causal=True, view="strided"),
        small("mma_sm80", dtype="float32", sink=True),
        small("mma_sm80", heads=8, seqlen_q=3, seqlen_kv=1500, alibi="h", window=(700, -1)),
        small("mma_sm80", head_dim=256, head_dim_v=256, batch=30, seqlen_q=140),
        wide("mma_sm80", mask="bhqk", score_mod="table"),
        packed(
            small("mma_sm80", heads=4, view="misaligned"), ((0, 5), (77, 100), (130, 64), (0, 0))
        ),
        small("mma_sm80", gate="softmax", bias="bhqk", bias_fp32=True, softcap=5.0),
    ],
    "sm_90a": [
        wide("wgmma_sm90", causal=True),
        small("wgmma_sm90", seqlen_q=400, seqlen_kv=700, causal=True),
        wide("wgmma_sm90", mask="qk", mask_mod="thirds", seqlen_kv=144),
        small("wgmma_sm90", heads=8, seqlen_q=2, seqlen_kv=3000),  # clusters
        wide("wgmma_sm90", head_dim=192, head_dim_v=128, dtype="bfloat16", window=(33, 7)),
        packed(small("wgmma_sm90", heads=4), LENGTHS),
        small("wgmma_sm90", gate="qk", alibi="bh"),
    ],
}
EVERY = [(arch, case) for arch, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def built() -> None:
    """All libraries, side by side; what fails here fails again in its test."""

    def build(arch: str, case: Case) -> None:
        for config in matrix.case_config(case, arch):
            library(config, arch)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wait = [pool.submit(build, arch, case) for arch, case in EVERY]
        for each in wait:
            each.exception()


def attend(
    case: Case, arch: str, schedule: Schedule, *, checking: bool = False
) -> matrix.CaseResult:
    setup = set_up(case)
    placed, problem = Placed.of(case, setup, on_gpu=False), described(case)
    selection = selector.select(problem, arch, kernel=case.kernel)
    out = placed.out
    if out is None:  # the gate stops before it
        out = np.empty(problem.output_shape, setup.host[0].dtype)
    o = operand("o", out, "packed" if problem.packed else problem.layout, out.ctypes.data)
    selection = replace(selection, config=selection.config.stored_to(o))
    arrays = dict(zip("qkvo", (*placed.inputs, out), strict=True))
    if case.gate is None:
        arrays["lse"] = np.full(problem.lse_shape, np.nan, np.float32)
    arrays |= gate_arrays(problem, gate_tiles(problem, selection.config))
    given = placed.arguments
    for name, field in POINTERS.items():
        if given.get(name) is not None:
            is_row = name not in ("alibi_slopes", "bias", "mask")  # those have strides
            arrays[field] = np.ascontiguousarray(given[name]) if is_row else given[name]
    # Expressions are CUDA's, as on a GPU.
    mod_args = [np.ascontiguousarray(x) for x in (given.get("mod_args") or {}).values()]
    configs = selector.configs_of(selection)
    run(problem, configs, o, arrays, mod_args, arch=arch, schedule=schedule, checking=checking)
    return matrix.judge(case, setup.host, launched(case, setup, placed, selection.config, arrays))


def launched(case: Case, setup: Any, placed: Placed, config: Any, arrays: Any) -> matrix.Launched:
    problem = described(case)
    if case.gate in ("qk", "softmax"):
        results = [gate_output(problem, arrays, config.softmax_keys)]
    else:
        results = matrix.canonical(case, *(arrays[n] for n in ("o", "lse") if n in arrays))
    clean = setup.out.surroundings_are_nan(placed.out_buffer)
    quantized = None
    if config.quantizes:
        quantized = {
            one.name: verify.Quantized(
                arrays[f"{one.name}8"].view(ml_dtypes.float8_e4m3fn)[..., : one.shape[3]],
                arrays[f"{one.name}_scale"],
            )
            for one in (problem.q, problem.k, problem.v)
        }
    return matrix.Launched(
        got=results[0],
        lse=results[1] if len(results) > 1 else None,
        quantized=quantized,
        tile=config.tile.block_m,
        faults=() if clean else ("wrote beside the output",),
    )


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("schedule", [Schedule(0, 0), Schedule(1, 30), Schedule(2, 100)])
@pytest.mark.parametrize(("arch", "case"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_kernels_are_right_in_any_order(arch: str, case: Case, schedule: Schedule) -> None:
    result = attend(case, arch, schedule)
    assert result.ok, f"{case.kernel} {case.dtype}: {result.reason}"
