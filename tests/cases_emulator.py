"""Cases of the matrix, attended to by kernels that run on the CPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes

from flashcore_cupy.check import verify
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.arrays import Placed, Setup, set_up
from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.cpu.emulator.plan import EmulatedPlan, bind
from flashcore_cupy.cpu.emulator.run import Schedule
from flashcore_cupy.problem.request import Request


def small(kernel: str, **changes: Any) -> Case:
    return Case("emulated", kernel, **changes)


def planned(case: Case, arch: str, placed: Placed) -> EmulatedPlan:
    request = Request.of({**placed.arguments, "kernel": case.kernel})
    call = request.call(*placed.inputs, placed.out, on_gpu=False)
    return bind(call, arch, want_lse=case.gate is None)


def attend(
    case: Case, arch: str, schedule: Schedule, *, checking: bool = False
) -> matrix.CaseResult:
    setup = set_up(case)
    placed = Placed.of(case, setup, on_gpu=False, in_kernel=True)
    plan = planned(case, arch, placed)
    plan.launch(schedule, checking=checking)
    return matrix.judge(case, setup.host, launched(case, setup, placed, plan))


def launched(case: Case, setup: Setup, placed: Placed, plan: EmulatedPlan) -> matrix.Launched:
    problem, config, arrays = plan.problem, plan.selection.config, plan.arrays
    if case.gate in ("qk", "softmax"):
        results = [plan.gate_output()]
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
