"""The matrix's cases of windows, score rules, masks, sinks, packed batches: do they see errors?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore_cupy import attention
from flashcore_cupy.check import verify
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.arrays import Placed, set_up
from flashcore_cupy.check.selftest.case import MASK_MODS, SCORE_MODS, Case, packed
from flashcore_cupy.check.selftest.rule_cases import pairwise
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.problem.rules import RULES, Rules
from flashcore_cupy.select import registry, selector

GROUPS = ("rules", "packed", "rules gate", "decode", "invariant")
CASES = [case for case in matrix.cases() if case.group in GROUPS]


RULED = [name for name, kernel in registry.KERNELS.items() if kernel.has_rules]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_every_two_choices_meet(sizes: list[int]) -> None:
    factors = {str(n): [f"{n}:{i}" for i in range(size)] for n, size in enumerate(sizes)}
    rows = pairwise(factors)
    for (a, ones), (b, others) in itertools.combinations(factors.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(ones, others))
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 3 * largest[0] * largest[1] + 2
    assert rows == pairwise(factors)


@pytest.mark.parametrize("kernel", RULED)
def test_every_rule_meets_every_dtype_and_tile(kernel: str) -> None:
    mine = [case for case in CASES if case.kernel == kernel]
    assert 200 <= len(mine) <= 500
    wanted = {
        "softcap": {0.0, 5.0, 20.0},
        "alibi": {"", "h", "bh"},
        "bias": {"", "1h1k", "bhqk", "qk", "b1q1"},
        "mask": {"", "bhqk", "b11k", "qk"},
        "sink": {False, True},
        "score_mod": {"", *SCORE_MODS},
        "mask_mod": {"", *MASK_MODS},
        "softmax_scale": {None, -0.2, 0.0},
        "causal": {False, True, "top-left"},
        "batch_invariant": {False, True},
    }
    tiles_of = {case: matrix.case_config(case, "sm_90a")[-1].tile for case in mine}
    tiles = set(tiles_of.values())
    assert len(tiles) >= min(5, len({row.tile for row in selector.rows_of(kernel)}))
    for name, values in wanted.items():
        for dtype in registry.KERNELS[kernel].dtypes:
            found = {getattr(case, name) for case in mine if case.dtype == dtype}
            assert found == values, (name, dtype)
    if registry.KERNELS[kernel].family.takes_packed:
        assert {case.boundaries for case in mine if case.lengths} == {"host", "device"}
        assert any((0, 0) in case.lengths for case in mine)
    assert {case.gate for case in mine} == {None, "qk", "softmax", "pv"}
    configs = {config for case in mine for config in matrix.case_config(case, "sm_90a")}
    assert len(configs) <= 300


def takes_blocks(kernel: str) -> bool:
    return bool(getattr(registry.KERNELS[kernel].family, "takes_blocks", False))


@pytest.mark.parametrize("kernel", RULED)
def test_every_record_has_cases(kernel: str) -> None:
    packed_too = [rule for rule in RULES if rule.when_packed is None]
    groups = [("rules", RULES), ("rules gate", RULES)]
    if registry.KERNELS[kernel].family.takes_packed:
        groups.append(("packed", packed_too))
    for group, rules in groups:
        mine = [case for case in CASES if (case.kernel, case.group) == (kernel, group)]
        configs = [config for case in mine for config in matrix.case_config(case, "sm_90a")]
        built = {name for config in configs for name in config.rules}
        taken = [rule for rule in rules if rule.takes != "blocks" or takes_blocks(kernel)]
        missing = [rule.name for rule in taken if rule.codes and built.isdisjoint(rule.codes)]
        assert not missing, group


BASE = Case("x", "mma_sm80", dtype="bfloat16", heads=4, heads_kv=2, batch=2, seed=3)
PACKED = packed(BASE, ((30, 50), (0, 9), (60, 40)))
WITH_AND_WITHOUT: dict[str, tuple[Case, dict[str, Any]]] = {
    "window left": (replace(BASE, window=(20, -1)), {"window": (-1, -1)}),
    "window right": (replace(BASE, window=(-1, 5)), {"window": (-1, 6)}),
    "softcap": (replace(BASE, softcap=2.0), {"softcap": 0.0}),
    "alibi": (replace(BASE, alibi="bh"), {"alibi": ""}),
    "bias": (replace(BASE, bias="1h1k"), {"bias": ""}),
    "mask": (replace(BASE, mask="bhqk"), {"mask": ""}),
    "sink": (replace(BASE, sink=True), {"sink": False}),
    "score_mod": (replace(BASE, score_mod="halves"), {"score_mod": ""}),
    "mask_mod": (replace(BASE, mask_mod="thirds"), {"mask_mod": ""}),
    "scale": (replace(BASE, softmax_scale=-0.2), {"softmax_scale": 0.2}),
    "boundaries": (PACKED, {"lengths": ((31, 50), (0, 9), (59, 40))}),
    "keys": (PACKED, {"lengths": ((30, 51), (0, 9), (60, 39))}),
    "packed alibi": (replace(PACKED, alibi="bh"), {"alibi": ""}),
    "packed mod": (replace(PACKED, mask_mod="thirds"), {"mask_mod": "allowed"}),
}


def by_numpy(case: Case) -> matrix.Launched:
    setup = set_up(case)
    placed = Placed.of(case, setup, on_gpu=False)
    wanted = {"return_lse": case.gate is None, **placed.arguments}
    got = attention(*placed.inputs, **wanted)
    if case.gate in ("qk", "softmax"):
        return matrix.Launched(got, None, None, 64)
    o, *lse = matrix.canonical(case, *(got if isinstance(got, tuple) else (got,)))
    return matrix.Launched(o, lse[0] if lse else None, None, 64)


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        (name, gate)
        for name, (case, _) in WITH_AND_WITHOUT.items()
        for gate in (None, "qk", "softmax", "pv")
        if gate is None or not case.lengths  # gates are not for packed batches
    ],
)
def test_a_rule_that_is_left_out_is_noticed(name: str, gate: Any) -> None:
    case, change = WITH_AND_WITHOUT[name]
    case = replace(case, gate=gate)
    host = set_up(case).host
    assert matrix.judge(case, host, by_numpy(case)).ok
    hides = name in ("window left", "window right", "mask", "mask_mod")
    shows = {None: True, "qk": name != "sink", "softmax": True, "pv": hides}[gate]
    result = matrix.judge(case, host, by_numpy(replace(case, **change)))
    assert result.ok != shows, result.reason


@pytest.mark.parametrize("name", ["bias", "alibi", "softcap", "score_mod"])
def test_scores_are_held_to_the_accuracy_of_fp32(name: str) -> None:
    case = replace(WITH_AND_WITHOUT[name][0], gate="qk")
    launched = by_numpy(case)
    seen = np.isfinite(launched.got)
    moved = np.where(seen, launched.got + np.float32(1e-3), launched.got)
    result = matrix.judge(case, set_up(case).host, replace(launched, got=moved))
    assert not result.ok and result.allowed_error is not None and result.allowed_error < 3e-4


def test_an_expectation_asks_for_what_the_problem_does_not_hold() -> None:
    problem = replace(contiguous_problem(1, 2, 8, 32), rules=Rules(sink=True, softcap=2.0))
    host = set_up(Case("x", "auto", seqlen_q=8, seqlen_kv=8, head_dim=32, head_dim_v=32)).host
    with pytest.raises(ValueError, match="rules: the problem has sink; pass"):
        verify.expect(problem, *host)
    verify.expect(problem, *host, rules={"sink": np.zeros(2, np.float32)})


def test_names_tell_cases_apart() -> None:
    named = {(case.kernel, case.dtype, case.name) for case in CASES}
    assert len(named) >= len(CASES) - 5  # seeds do not show
