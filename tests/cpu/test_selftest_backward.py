"""The matrix's cases of the backward pass: what they try, and whether they see errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashcore_cupy.backward import attention_backward
from flashcore_cupy.check.selftest import gradients, matrix
from flashcore_cupy.check.selftest.backward_cases import backward_cases
from flashcore_cupy.check.selftest.case import MASK_MODS, SCORE_MODS, Case, packed
from flashcore_cupy.cpu.reference import INPUT_KINDS
from flashcore_cupy.problem.gradients import INPUTS
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS, ROWS

CASES = backward_cases()
HOPPER = "sm_90a"


def test_cases_are_distinct_and_run_on_hopper() -> None:
    assert len(set(CASES)) == len(CASES) and 200 < len(CASES) < 800
    assert matrix.runnable(CASES, HOPPER) == CASES
    assert {case.kernel for case in matrix.runnable(CASES, "sm_80")} == {"bwd_sm80"}
    assert matrix.runnable(CASES, "sm_75") == []
    assert backward_cases() == CASES
    assert matrix.every_case() == [*matrix.cases(), *CASES]
    named = {(case.kernel, case.dtype, case.name) for case in CASES}
    assert len(named) >= len(CASES) - 5  # seeds do not show


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS)
def test_every_choice_meets_every_kernel(kernel: str) -> None:
    mine = [case for case in CASES if case.kernel == kernel]
    rows = [row for row in ROWS if row.kernel == kernel]
    wanted: dict[str, set[Any]] = {
        "dtype": {dtype for row in rows for dtype in row.dtypes},
        "causal": {False, True, "top-left"},
        "kind": set(INPUT_KINDS),
        "layout": {"bhsd", "bshd"},
        "gate": {None, "dp", "ds"},
        "stored": {"", "fp32", "added"},
        "deterministic": {True, kernel == "bwd_sm80"},
        "dlse": {False, True},
        "softcap": {0.0, 5.0, 20.0},
        "alibi": {"", "h", "bh"},
        "bias": {"", "1h1k", "bhqk", "qk", "b1q1", "1hqk"},
        "sink": {False, True},
        "dropout_p": {0.0, 0.2, 0.3, 0.6},
        "score_mod": {"", *SCORE_MODS},
        "mask": {"", "bhqk", "b11k", "qk"},
        "mask_mod": {"", *MASK_MODS},
        "softmax_scale": {None, -0.2, 0.0},
        "only": {"", *INPUTS},
        "boundaries": {"host", "device"},
    }
    if kernel == "bwd_sm90_wide":  # no rule that changes scores or hides keys, no dropout
        lacking = {"softcap": 0.0, "dropout_p": 0.0, "boundaries": "host"}
        lacking |= dict.fromkeys(("alibi", "bias", "score_mod", "mask", "mask_mod"), "")
        wanted |= {name: {value} for name, value in lacking.items()}
        wanted["only"] = {"", "q", "k", "v", "sink"}
    for name, values in wanted.items():
        assert {getattr(case, name) for case in mine} == values, name
    dims = {(case.head_dim, case.head_dim_v) for case in mine}
    assert dims >= {row.dims for row in rows if "float32" not in row.dtypes}
    tiles = {config.tile for case in mine for config in gradients.configs_of(case, HOPPER)}
    first = {row.dims: row for row in reversed(rows)}.values()
    assert tiles >= {tile for row in first for tile in (row.keys, row.queries)}
    assert any(case.repeats > 5 for case in mine)
    assert any(case.heads == 4 * case.heads_kv for case in mine)


BASE = Case("x", "bwd_sm80", dtype="bfloat16", heads=4, heads_kv=2, batch=2, seed=3)
PACKED = packed(BASE, ((30, 50), (0, 9), (60, 40)))
WITH_AND_WITHOUT: dict[str, tuple[Case, dict[str, Any]]] = {
    "window": (replace(BASE, window=(20, -1)), {"window": (-1, -1)}),
    "softcap": (replace(BASE, softcap=2.0), {"softcap": 0.0}),
    "alibi": (replace(BASE, alibi="bh"), {"alibi": "", "only": "q"}),
    "mask": (replace(BASE, mask="bhqk"), {"mask": ""}),
    "score_mod": (replace(BASE, score_mod="table"), {"score_mod": ""}),
    "mask_mod": (replace(BASE, mask_mod="thirds"), {"mask_mod": ""}),
    "scale": (replace(BASE, softmax_scale=-0.2), {"softmax_scale": 0.2}),
    "dlse": (replace(BASE, dlse=True), {"dlse": False}),
    "boundaries": (PACKED, {"lengths": ((31, 50), (0, 9), (59, 40))}),
}


def by_numpy(case: Case, setup: gradients.GradientSetup, **change: Any) -> dict[str, np.ndarray]:
    """What NumPy makes of a case's arrays, under the rules of a changed case."""
    changed = replace(case, **change)
    arguments = changed.arguments(changed.rule_arrays(), cuda=False)
    host = {n: x for n, x in setup.host.items() if n != "dlse" or changed.dlse}
    made = attention_backward(**host, wrt=changed.wrt, **arguments)
    if changed.gate:
        return {changed.gate: made}
    return {name: x for name, x in made._asdict().items() if x is not None}


@pytest.mark.parametrize("name", WITH_AND_WITHOUT)
@pytest.mark.parametrize("gate", [None, "ds"])
def test_a_rule_that_is_left_out_is_noticed(name: str, gate: Any) -> None:
    case, change = WITH_AND_WITHOUT[name]
    if gate and case.lengths:
        return  # gates are not for packed batches
    case = replace(case, gate=gate, only="q" if name == "alibi" or gate else "")
    setup = gradients.lay_out(case)
    assert gradients.judge(case, setup, by_numpy(case, setup), []).ok
    result = gradients.judge(case, setup, by_numpy(case, setup, **change), [])
    assert not result.ok and result.reason


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink", "alibi_slopes"])
def test_each_gradient_is_judged(name: str) -> None:
    case = replace(BASE, bias="1h1k", sink=True, alibi="h")
    setup = gradients.lay_out(case)
    got = by_numpy(case, setup)
    assert set(got) == {f"d{n}" for n in INPUTS}
    assert gradients.judge(case, setup, got, []).ok
    wrong = got | {f"d{name}": got[f"d{name}"] * got[f"d{name}"].dtype.type(1.1)}
    assert f"d{name}: max error" in gradients.judge(case, setup, wrong, []).reason


def test_cases_pass_when_numpy_plays_the_gpu() -> None:
    for case in CASES[::11]:
        setup = gradients.lay_out(case)
        result = gradients.judge(case, setup, by_numpy(case, setup), [])
        assert result.ok, (case, result.reason)


@pytest.mark.parametrize("stored", ["", "fp32", "added"])
def test_results_lie_among_nan(stored: Any) -> None:
    case = replace(BASE, stored=stored, view="misaligned", sink=True, layout="bshd")
    setup = gradients.lay_out(case)
    assert list(setup.results) == ["dq", "dk", "dv", "dsink"]
    for name, embedded in setup.results.items():
        inside = embedded.on_host().astype(np.float32)
        assert np.isfinite(inside).all() if stored == "added" else np.isnan(inside).all()
        outside = int(np.isnan(embedded.buffer.astype(np.float32)).sum())
        assert outside >= embedded.buffer.size - inside.size
        own = np.float32 if stored or name == "dsink" else case.numpy_dtype()
        assert embedded.buffer.dtype == own
    assert set(setup.beside) == {"do", "o", "lse"}
