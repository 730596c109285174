"""Each stage of each kernel alone, by the debug gates."""

from __future__ import annotations

from cases_gates import *  # noqa: F403
from cases_gates import inputs

from flashcore_cupy.check import verify


def test_gates_of_fp8_are_those_of_the_quantised_inputs() -> None:
    from flashcore_cupy.attention import plan
    from flashcore_cupy.measure.job import to_gpu

    for gate in ("qk", "softmax", "pv", None):
        q, k, v = inputs(100, 130)
        bound = plan(*to_gpu(q, k, v), kernel="fp8_wmma", gate=gate)
        bound.launch()
        result = verify.check_plan(bound, q, k, v)
        assert result.ok, f"{gate}: {result.reason}"
