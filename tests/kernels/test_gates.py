"""Each stage of each kernel alone, by the debug gates."""

from __future__ import annotations

from cases_gates import *  # noqa: F403
from cases_gates import Place, inputs

from flashcore_cupy.check import verify


def test_gates_of_fp8_are_those_of_the_quantised_inputs(on: Place) -> None:
    for gate in ("qk", "softmax", "pv", None):
        q, k, v = inputs(100, 130)
        bound = on.by("fp8_wmma").launched(q, k, v, gate=gate, causal=on.is_emulated)
        result = verify.check_plan(bound, q, k, v)
        assert result.ok, f"{gate}: {result.reason}"
