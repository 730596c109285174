"""Timing on a GPU, and the quick correctness matrix."""

from __future__ import annotations

from flashcore_cupy.check import inputs
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.measure import timing
from flashcore_cupy.problem.attention_problem import contiguous_problem


def test_a_plan_is_timed_in_a_graph() -> None:
    import cupy

    from flashcore_cupy.attention import plan

    q, k, v = (cupy.asarray(x) for x in inputs.inputs(contiguous_problem(1, 2, 256, 64), 0))
    bound = plan(q, k, v)
    got = timing.time_graph(bound, iters=10, warmup=2)
    assert got.samples == 10 and got.per_sample > 1
    assert 0.5 < got.p10_us <= got.median_us <= got.p90_us < 1000
    peak = timing.peak("float16")
    assert peak is None or peak.tflops > 1


def test_quick_selftest_passes() -> None:
    report = matrix.run_all(quick=True)
    failed = [row for row in report["rows"] if not row["ok"]]
    assert report["passed"] > 20 and not failed
