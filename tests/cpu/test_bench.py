"""What `run`, `ladder` and `selftest` stand on: timing, the check, the matrix of cases."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashcore_cupy import attention
from flashcore_cupy.check import inputs, verify
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.arrays import Placed, described, embed, set_up
from flashcore_cupy.check.selftest.matrix import Case
from flashcore_cupy.cpu import reference
from flashcore_cupy.launch import builds
from flashcore_cupy.measure import ladder, passes, timing
from flashcore_cupy.measure.backward import Backward
from flashcore_cupy.measure.forward import Forward
from flashcore_cupy.measure.problems import in_layout, problem_of, rules_of
from flashcore_cupy.problem.attention_problem import AttentionProblem, contiguous_problem, describe
from flashcore_cupy.problem.gradients import BackwardRequest, contiguous_gradients
from flashcore_cupy.problem.rules import NO_RULES
from flashcore_cupy.select import registry, selector

Array = NDArray[Any]
CASES = matrix.cases()
GATES = ("qk", "softmax", "pv")


def small(**changes: Any) -> AttentionProblem:
    return contiguous_problem(**({"batch": 1, "heads": 2, "seqlen": 40, "head_dim": 32} | changes))


# --- timing and peak ---------------------------------------------------------------------------


def test_calls_are_timed_one_by_one_where_they_are_slow() -> None:
    got = timing.time_calls(lambda: time.sleep(0.003), iters=5, warmup=1)
    assert got.samples == 5 and got.per_sample == 1
    assert 3000 <= got.p10_us <= got.median_us <= got.p90_us < 30_000


def test_fast_calls_are_timed_in_batches() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    got = timing.time_calls(call, iters=4, warmup=2)
    assert got.per_sample > 50
    assert calls == 2 + 6 * got.per_sample
    assert got.median_us < 10


def test_timing_stops_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_BUDGET_S", 0.02)
    got = timing.time_calls(lambda: time.sleep(0.005), iters=1000, warmup=1000)
    assert 3 <= got.samples <= 10


def test_a_call_of_seconds_is_made_once_more_and_no_oftener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "_BUDGET_S", 0.02)
    monkeypatch.setattr(timing, "_LONG_US", 1e4)
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.05)

    got = timing.time_calls(call, iters=100, warmup=10, first_us=5e4)
    assert calls == got.samples == got.per_sample == 1
    assert timing.time_calls(call, iters=100, warmup=10).samples == 1
    assert calls == 3  # what the first call takes was not known


PASSES = {
    "half": Forward(problem_of(1, 4, 1024, 64)),
    "few queries": Forward(problem_of(4, 32, 32, 256, seqlen_kv=128)),
    "float32": Forward(problem_of(2, 2, 512, 128, seqlen_kv=2048, dtype="float32", layout="bshd")),
    "probabilities": Forward(problem_of(1, 2, 1024, 64, gate="softmax")),
    "scores": Forward(problem_of(1, 2, 512, 64, gate="qk", seqlen_kv=3000)),
    "gradients": Backward(problem_of(1, 4, 1024, 64)),
    "gradients of some heads": Backward(problem_of(4, 8, 1024, 32, layout="bshd"), ("k",)),
    "dS": Backward(problem_of(1, 2, 512, 64, seqlen_kv=2000), gate="ds"),
}


@pytest.mark.parametrize("name", PASSES)
def test_the_memory_of_a_job_is_what_it_takes(name: str) -> None:
    import tracemalloc

    wanted = PASSES[name]
    tracemalloc.start()
    trial = wanted.trial(0)
    assert trial.check_call(trial.by_numpy()()).ok
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 < most / wanted.memory_needed < 2, most


def test_what_needs_more_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (Forward(problem_of(1, 4, 2048, 64)), Backward(problem_of(1, 4, 2048, 64))):
        needed = wanted.memory_needed
        monkeypatch.setattr(passes, "free_memory", lambda needed=needed: needed)
        wanted.check_memory()
        monkeypatch.setattr(passes, "free_memory", lambda: 2**20)
        with pytest.raises(ValueError, match=r"GiB of memory, and 0\.000977 GiB are free"):
            wanted.check_memory()
        monkeypatch.setattr(passes, "free_memory", lambda: None)
        wanted.check_memory()


def test_a_backward_pass_counts_two_and_a_half_times_the_forward() -> None:
    problem = problem_of(2, 4, 100, 64, seqlen_kv=130, causal=True, window=(40, -1))
    flops = Forward(problem).flops
    assert Backward(problem).flops == 2.5 * flops
    assert Backward(problem, ("q",)).flops == 1.5 * flops


def test_a_machine_says_what_memory_is_free() -> None:
    free = timing.free_memory()
    assert free is None or 2**24 < free < 2**50


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_problem_is_that_of_its_arrays(layout: Any) -> None:
    problem = problem_of(
        2, 4, 40, 24, heads_kv=2, seqlen_kv=50, head_dim_v=8, dtype="bfloat16", layout=layout,
        causal="top-left", window=(3, -1), softcap=2,
    )  # fmt: skip
    arrays = in_layout(problem, *inputs.inputs(problem, 0))
    rules = {"layout": layout, "causal": "top-left"}
    assert dataclasses.replace(problem, rules=NO_RULES) == describe(*arrays, **rules)
    o, lse = attention(*arrays, return_lse=True, **rules_of(problem))
    assert o.shape == problem.output_shape
    do = in_layout(problem, inputs.output_gradient(problem, 0))[0]
    described = contiguous_gradients(dataclasses.replace(problem, rules=NO_RULES))
    request = BackwardRequest.taken(rules)
    operands = dict(zip("qkv", arrays, strict=True)) | {"do": do, "o": o, "lse": lse, "dlse": None}
    call = request.call(operands, {}, on_gpu=False, empty=np.empty)
    shapes = [result.shape for result in call.problem.results]
    assert shapes == [array.shape for array in arrays]
    assert (call.problem.do, call.problem.o) == (described.do, described.o)
    for found, expected in zip(call.problem.results, described.results, strict=True):
        assert found.operand == expected.operand and found.dtype == expected.dtype


def test_peak_of_an_h200() -> None:
    tensor = timing.peak_of("float16", 90, 132, 1.98e9)
    assert tensor is not None and tensor.tflops == pytest.approx(1070, rel=0.001)
    assert tensor.formula == "132 SMs x 1.98 GHz x 4096 tensor FLOP/clock"
    plain = timing.peak_of("float32", 90, 132, 1.98e9)
    assert plain is not None and plain.tflops == pytest.approx(66.9, rel=0.001)


def test_peak_of_an_unknown_gpu_is_unknown() -> None:
    assert timing.peak_of("float16", 999, 132, 1.98e9) is None
    assert timing.peak_of("float16", 90, 132, 0.0) is None


def test_inputs_depend_on_the_seed_alone() -> None:
    problem = small(heads_kv=1, seqlen_kv=7, dtype="bfloat16")
    first, again, other = (inputs.inputs(problem, seed) for seed in (1, 1, 2))
    assert [x.shape for x in first] == [(1, 2, 40, 32), (1, 1, 7, 32), (1, 1, 7, 32)]
    assert all(x.dtype.name == "bfloat16" for x in first)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(first, again, strict=True))
    assert first[0].tobytes() != other[0].tobytes()


# --- the check ---------------------------------------------------------------------------------


def test_a_short_problem_is_checked_whole() -> None:
    assert np.array_equal(verify.sample_rows(small(), 64), np.arange(40))


def test_a_sample_of_rows_has_the_edges_and_stays_within_its_budget() -> None:
    problem = small(heads=4, seqlen=5000)
    rows = verify.sample_rows(problem, 64, budget=100 * 4 * 5000)
    assert len(rows) == 100 and np.array_equal(rows, np.unique(rows))
    last = 5000 // 64 * 64
    assert {0, 63, 64, 65, last - 1, last, last + 1, 4999} <= set(rows.tolist())
    assert rows.max() < 5000


def result_of(problem: AttentionProblem, host: tuple[Array, Array, Array]) -> Array:
    got: Array = attention(*host, causal=problem.causal, gate=problem.gate)
    return got


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("gate", [None, *GATES])
def test_a_right_result_passes_and_a_wrong_element_fails(dtype: str, gate: Any) -> None:
    problem = small(dtype=dtype, gate=gate, causal=True)
    host = inputs.inputs(problem, 0)
    got = result_of(problem, host)
    expectation = verify.expect(problem, *host)
    check = expectation.judge(got)
    assert check.ok, check.reason
    assert check.rows_checked == check.rows_total == 40
    wrong = got.copy()
    wrong[0, 1, 37, 3] += got.dtype.type(0.02 + 4 * check.comparison.allowed_error)
    check = expectation.judge(wrong)
    assert not check.ok
    assert check.comparison.worst_index == (0, 1, 37, 3)
    assert "(0, 1, 37, 3)" in check.reason


def test_scores_are_held_to_fp32_accuracy() -> None:
    problem = small(gate="qk", head_dim=64)
    expectation = verify.expect(problem, *inputs.inputs(problem, 0))
    assert expectation.allowed is not None and expectation.allowed < 1e-4


def test_nan_and_a_visible_masked_score_fail() -> None:
    problem = small(gate="qk", causal=True)
    host = inputs.inputs(problem, 0)
    expectation = verify.expect(problem, *host)
    for value in (np.nan, 0.5):
        got = result_of(problem, host).copy()
        got[0, 0, 0, 39] = value  # masked: -inf
        check = expectation.judge(got)
        assert not check.ok and "misplaced" in check.reason


def test_a_sampled_check_names_the_real_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SCORE_BUDGET", 20 * 2 * 300)
    problem = small(seqlen=300)
    host = inputs.inputs(problem, 0)
    got = result_of(problem, host)
    expectation = verify.expect(problem, *host)
    assert (len(expectation.rows), expectation.rows_total) == (20, 300)
    assert expectation.judge(got).ok
    got[0, 0, 299, 5] = 100
    check = expectation.judge(got)
    assert check.comparison.worst_index == (0, 0, 299, 5)
    assert "299" in check.reason


def test_a_wrong_log_sum_exp_fails() -> None:
    problem = small(causal=True, seqlen_kv=20)  # the first queries see no key: -inf
    host = inputs.inputs(problem, 0)
    got, lse = attention(*host, causal=True, return_lse=True)
    expectation = verify.expect(problem, *host)
    assert np.isneginf(lse).any()
    assert expectation.judge(got, lse).ok
    check = expectation.judge(got, np.where(np.isneginf(lse), np.float32(0), lse))
    assert not check.ok and check.reason.startswith("lse: ")
    check = expectation.judge(got, lse * np.float32(1.001))
    assert not check.ok and check.comparison.ok


# --- fp8 ---------------------------------------------------------------------------------------


def test_quantize_uses_the_whole_range_of_each_head() -> None:
    x = np.stack([np.linspace(-3, 2, 24), np.linspace(-0.01, 0.02, 24)]).reshape(1, 2, 4, 6)
    found = verify.quantize(x.astype(np.float16))
    largest = np.abs(found.values.astype(np.float32)).max(axis=(2, 3))
    assert np.array_equal(largest, [[448, 448]])
    assert found.scale[0, 0] == np.float32(3) / np.float32(448)
    error = np.abs(found.dequantized() - x)
    assert (error <= np.abs(x) / 16 + found.scale[:, :, None, None] * 2.0**-10 + 1e-5).all()


def test_quantize_leaves_zeros_and_keeps_nan() -> None:
    x = np.zeros((1, 2, 2, 2), np.float16)
    x[0, 1, 1] = [np.nan, 2]
    found = verify.quantize(x)
    assert found.scale[0, 0] == 1 and not found.values[0, 0].astype(np.float32).any()
    got = found.dequantized()[0, 1, 1]
    assert np.isnan(got[0]) and got[1] == pytest.approx(2)


@pytest.mark.parametrize("gate", [None, *GATES])
def test_fp8_is_judged_on_its_quantised_inputs(gate: Any) -> None:
    problem = small(gate=gate, heads=4, heads_kv=2)
    host = inputs.inputs(problem, 0)
    found = {name: verify.quantize(x) for name, x in zip("qkv", host, strict=True)}
    expectation, faults = verify.expect_quantized(problem, *host, found)
    assert faults == []
    exact = expectation.values.astype(np.float32 if gate in ("qk", "softmax") else np.float16)
    assert expectation.judge(exact).ok
    if gate is None:
        assert expectation.quantization_error is not None
        assert 0.005 < expectation.quantization_error < 0.3
        unquantised = result_of(problem, host)
        assert not expectation.judge(unquantised).ok


def test_a_wrong_quantiser_is_found() -> None:
    problem = small()
    host = inputs.inputs(problem, 0)
    found = {name: verify.quantize(x) for name, x in zip("qkv", host, strict=True)}
    values = found["k"].values.copy()
    values[0, 0, 3, 4] = values[0, 0, 3, 4] * -1
    broken = found | {
        "k": verify.Quantized(values, found["k"].scale),
        "v": verify.Quantized(found["v"].values, found["v"].scale * np.float32(2)),
    }
    _, faults = verify.expect_quantized(problem, *host, broken)
    assert len(faults) == 2
    assert "1 of 2560 e4m3 values of k" in faults[0] and "v_scale" in faults[1]


# --- the ladder's data -------------------------------------------------------------------------


def test_speedups_are_over_the_first_timed_rung() -> None:
    rungs = [ladder.Rung("rung", "", latency_us=us) for us in (None, 80, 20)]
    assert [rung.speedup for rung in ladder._with_speedup(rungs)] == [None, 1, 4]


def test_a_ladder_comes_back_from_its_json() -> None:
    rung = ladder.Rung("scalar", "idea", builds=True, latency_us=3.0, spill_bytes=0)
    baselines = (ladder.Baseline("other", 2.5),)
    problem = {"B": 1, "H": 2, "Hkv": 1, "S": 8, "Skv": 9, "D": 4, "dtype": "x", "causal": False}
    original = ladder.Ladder(problem, {"gpu": None, "arch": "sm_80"}, (rung,), baselines, 8)
    assert ladder.Ladder.from_json(original.to_json()) == original
    for change, told in (
        ({"rungs": None}, "NoneType"),
        ({"problem": {}}, "'B'"),
        ({"machine": {}}, "'arch'"),
        ({"rungs": [{"kernel": "scalar", "idea": "", "latency_us": "3"}]}, "latency_us is '3'"),
        ({"rungs": [{"kernel": "scalar"}]}, "idea"),
        ({"baselines": [{"name": "other"}]}, "us"),
    ):
        with pytest.raises(ValueError, match=told):
            ladder.Ladder.from_json(original.to_json() | change)


def test_combined_resources_of_several_builds() -> None:
    entries = {"a": builds.compiler.EntryResources(10, 100, 8, 4)}
    more = {
        "b": builds.compiler.EntryResources(20, 0, 0, 2),
        "c": builds.compiler.EntryResources(5, 50, 0, 1),
    }
    made = [
        builds.Build("k", "k.cu", "sm_80", False, 0.1, dynamic, e)
        for dynamic, e in ((1000, entries), (500, more))
    ]
    combined = builds.combined(made)
    assert combined == {
        "registers": 20,
        "shared_bytes": 1100,
        "local_bytes": 8,
        "spill_bytes": 7,
    }


# --- the matrix of cases -----------------------------------------------------------------------


def test_cases_are_many_distinct_and_runnable_on_hopper() -> None:
    assert 110 <= len(CASES) / len(registry.KERNELS) <= 220
    assert len(set(CASES)) == len(CASES)
    assert matrix.runnable(CASES, "sm_90a") == CASES
    fewer = matrix.runnable(CASES, "sm_75")
    assert fewer and not any(case.dtype == "bfloat16" and "wmma" in case.kernel for case in fewer)


@pytest.mark.parametrize("kernel", registry.KERNELS)
def test_every_choice_meets_every_kernel(kernel: str) -> None:
    mine = [case for case in CASES if case.kernel == kernel]
    assert {case.dtype for case in mine} == set(registry.KERNELS[kernel].dtypes)
    assert {case.causal for case in mine} == {False, True, "top-left"}
    assert {case.gate for case in mine} == {None, *GATES}
    assert {case.kind for case in mine} == set(reference.INPUT_KINDS)
    views = {"contiguous", "strided", "align8", "align4", "misaligned", "transposed"}
    if registry.KERNELS[kernel].family.row_align > 1:
        views -= {"align8", "align4", "misaligned"}
    layouts = ("bhsd", "bshd")
    assert {(c.view, c.layout) for c in mine} >= set(itertools.product(views, layouts))
    assert {case.head_dim for case in mine} >= {row.head_dim for row in selector.rows_of(kernel)}
    tile = next(row for row in selector.rows_of(kernel) if row.head_dim >= 64).tile
    lengths = {case.seqlen_q for case in mine}
    assert {tile.block_m - 1, tile.block_m, tile.block_m + 1, 1, 77, 512, 1000} <= lengths
    assert any(case.heads == 4 * case.heads_kv for case in mine)
    assert any(case.repeats > 5 for case in mine)


VIEWS = [case for case in CASES if case.group == "memory" and case.kernel == "wmma_fused_64"]


@pytest.mark.parametrize("case", VIEWS, ids=lambda case: case.name)
def test_a_case_compiles_ahead_what_it_will_launch(case: Case) -> None:
    setup = set_up(case)
    arrays, addresses = [], []
    for placed in setup.embedded:
        view = placed.on_host()
        contiguous = case.view == "transposed"
        arrays.append(np.ascontiguousarray(view) if contiguous else view)
        addresses.append(0 if contiguous else placed.offset * placed.buffer.itemsize)
    rules: Any = {"causal": case.causal, "gate": case.gate, "layout": case.layout}
    assert describe(*arrays, addresses=addresses, **rules) == described(case)


@pytest.mark.parametrize("view", ["contiguous", "strided", "misaligned", "transposed"])
def test_arrays_lie_among_nan_and_writes_beside_them_are_seen(view: str) -> None:
    x = np.arange(24, dtype=np.float16).reshape(1, 2, 3, 4)
    placed = embed(x.shape, np.float16, view, like=x)
    assert np.array_equal(placed.on_host(), x)
    assert int(np.isnan(placed.buffer).sum()) == placed.buffer.size - x.size
    assert placed.surroundings_are_nan(placed.buffer)
    outside = np.flatnonzero(np.isnan(placed.buffer))
    for place in (outside[0], outside[63], outside[-1]):
        written = placed.buffer.copy()
        written[place] = 1
        assert not placed.surroundings_are_nan(written)


def emulated(case: Case, setup: Any) -> matrix.Launched:
    """A launch's outcome by NumPy: exact and rounded for fp8, else the tiled attention."""
    problem = case.problem()
    if registry.KERNELS[case.kernel].quantizes:
        q, k, v = setup.host
        seen = {"q": q, "k": verify._visible(problem, k), "v": verify._visible(problem, v)}
        found = {name: verify.quantize(x) for name, x in seen.items()}
        expectation, _ = verify.expect_quantized(problem, *setup.host, found)
        plain = case.gate in ("qk", "softmax")
        got = expectation.values.astype(np.float32 if plain else case.numpy_dtype())
        return matrix.Launched(got, expectation.lse, found, 64)
    placed = Placed.of(case, setup, on_gpu=False)
    wanted: Any = {"out": placed.out} if case.gate in (None, "pv") else {}
    wanted |= {"return_lse": case.gate is None, **placed.arguments}
    got = attention(*placed.inputs, **wanted)
    if case.gate in ("qk", "softmax"):
        return matrix.Launched(got, None, None, 64)
    o, *lse = matrix.canonical(case, *(got if isinstance(got, tuple) else (got,)))
    return matrix.Launched(o, lse[0] if lse else None, None, 64)


def test_cases_pass_when_numpy_plays_the_gpu() -> None:
    few_heads = [case for case in CASES if case.batch * case.heads <= 16]  # the oracle takes time
    for case in few_heads[::13]:
        setup = set_up(case)
        result = matrix.judge(case, setup.host, emulated(case, setup))
        assert result.ok, (case, result.reason)
        assert setup.out.surroundings_are_nan(setup.out.buffer)


@pytest.mark.parametrize("gate", [None, *GATES])
def test_a_scale_applied_twice_or_a_dropped_key_fails(gate: Any) -> None:
    case = Case("x", "wmma_fused_64", gate=gate, causal=True)
    setup = set_up(case)
    q, k, v = (x.copy() for x in setup.host)
    if gate == "pv":
        v[:, :, 5] = 0
    else:
        q = (q * np.float16(0.5)).astype(q.dtype)
    got = result_of(case.problem(), (q, k, v))
    result = matrix.judge(case, setup.host, matrix.Launched(got, None, None, 64))
    assert not result.ok and result.reason


def test_the_report_counts_and_names_what_failed() -> None:
    good = matrix.CaseResult(CASES[0], True, 0.1, 0.2, "")
    bad = dataclasses.replace(good, case=CASES[1], ok=False, reason="because")
    report = matrix.report([good, bad, good], "sm_90a")
    assert (report["passed"], report["failed"], report["emulated"]) == (2, 1, False)
    assert {"kernels_digest", "gpu", "driver", "nvrtc", "cupy", "date", "rows"} <= set(report)
    row = report["rows"][1]
    assert {"kernel", "dtype", "head_dim", "case", "ok", "max_error", "allowed_error"} <= set(row)
    assert not row["ok"] and row["reason"] == "because"
