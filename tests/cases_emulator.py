"""Cases of the matrix, attended to by kernels that run on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from flashcore_cupy.check import verify
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.arrays import Placed, described, set_up
from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.cpu.emulator.run import Schedule, run
from flashcore_cupy.problem.attention_problem import operand
from flashcore_cupy.select import gates, selector

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
    arrays |= gates.allocate(problem, selection.config, np)
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
        results = [gates.output(problem, config, arrays, np)]
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
