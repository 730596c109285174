"""Random problems by NumPy, and what all of them are compiled for."""

from __future__ import annotations

import re

import fuzz_backward
import numpy as np
import pytest
from fuzz import CONFIGURATIONS, KERNEL, SETTINGS, compiled_for, configurations, problems, run
from hypothesis import given, settings
from places import Place

from flashcore_cupy.check.selftest import gradients
from flashcore_cupy.check.selftest.case import MASK_MODS, SCORE_MODS, Case
from flashcore_cupy.check.selftest.outcome import Emulated
from flashcore_cupy.problem.attention_problem import DTYPES
from flashcore_cupy.problem.gradients import INPUTS
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.select import registry
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS
from flashcore_cupy.select.sm90 import Sm90


def test_draws_compile_nothing_but_the_configurations() -> None:
    known = {compiled_for(case, "sm_90a") for case in configurations()}
    assert 150 <= len(known) <= CONFIGURATIONS

    @settings(SETTINGS, max_examples=400, derandomize=True)
    @given(problems())
    def belongs(case: Case) -> None:
        assert compiled_for(case, "sm_90a") in known, case.name

    belongs()


#: Lists of blocks are drawn in test_block_masks.py.
DRAWN = [rule for rule in RULES if rule.name != "block_mask"]


def test_configurations_have_everything() -> None:
    cases = configurations()
    assert sum(bool(case.lengths) for case in cases) >= 10
    assert {case.gate for case in cases} == {None, "qk", "softmax", "pv"}
    assert {case.dtype for case in cases} == set(registry.KERNELS[KERNEL].dtypes)
    built = [compiled_for(case, "sm_90a") for case in cases]
    for rule in DRAWN:
        with_it = [c for c in built if not rule.codes.keys().isdisjoint(c.rules)]
        assert len(with_it) >= 10 or not rule.codes, rule.name
    assert sum(c.bounded_left for c in built) >= 10
    on_hopper = {(c.kernel, c.tile.block_m) for c in built}
    assert on_hopper >= {("wgmma_sm90", 64), ("wgmma_sm90", 128), ("wgmma_sm90", 192)}
    assert {c.packed for c in built if isinstance(c, Sm90) and c.tile.pack_gqa} == {False, True}
    assert {c.tile.cluster for c in built} == {1, 2, 4, 8}
    assert on_hopper >= {(KERNEL, 16), (KERNEL, 32), (KERNEL, 64), (KERNEL, 128)}


def test_numpy(on: Place) -> None:
    run(20, on, derandomize=True)


# ---- the backward pass ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_backward_draws_compile_nothing_but_the_configurations(arch: str) -> None:
    cases = fuzz_backward.configurations(arch)
    assert len(cases) == fuzz_backward.CONFIGURATIONS
    kernels = {case.kernel for case in cases}
    assert kernels == ({"bwd_sm80"} if arch == "sm_80" else set(BACKWARD_KERNELS))
    drawn = [fuzz_backward.problem(arch, 0, n) for n in range(2 * len(cases))]
    for configuration, case in list(zip(cases * 2, drawn, strict=True))[::15]:
        known = fuzz_backward.compiled_for(configuration, arch)
        assert fuzz_backward.compiled_for(case, arch) == known, case.name
    assert len(set(drawn)) == len(drawn)
    assert drawn == [fuzz_backward.problem(arch, 0, n) for n in range(2 * len(cases))]
    assert drawn[0] != fuzz_backward.problem(arch, 1, 0)


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS)
def test_backward_configurations_have_everything(kernel: str) -> None:
    every = fuzz_backward.configurations("sm_90a")
    cases = [case for case in every if case.kernel == kernel]
    assert len(cases) == len(every) // len(BACKWARD_KERNELS)
    general, wide = kernel == "bwd_sm80", kernel == "bwd_sm90_wide"
    wanted: dict[str, set[object]] = {
        "dtype": set(DTYPES) - (set() if general else {"float32"}),
        "causal": {False, True, "top-left"},
        "layout": {"bhsd", "bshd"},
        "stored": {"", "fp32", "added"},
        "deterministic": {True, False},
        "dlse": {True, False},
        "alibi": {"", "h", "bh"},
        "bias": {"", "bhqk", "1h1k", "qk", "b1q1", "1h11", "k", "1"},
        "sink": {True, False},
        "dropout_p": {0.0, 0.1, 0.5},
        "score_mod": {"", *SCORE_MODS},
        "only": {"", *INPUTS},
        "batch_invariant": {True, False},
        "boundaries": {"host", "device"},
    }
    if wide:  # no rule that changes scores, no dropout
        lacking = {"alibi": "", "bias": "", "dropout_p": 0.0, "score_mod": ""}
        wanted |= {name: {value} for name, value in lacking.items()}
        wanted["only"] = {"", "q", "k", "v", "sink"}
    if general:
        wanted |= {"mask": {"", "bhqk", "b11k", "1hqk", "k", "q1"}, "mask_mod": {"", *MASK_MODS}}
    for name, values in wanted.items():
        assert {getattr(case, name) for case in cases} == values, name
    built = {word for c in cases for x in gradients.configs_of(c, "sm_90a") for word in x.rules}
    absent = [
        str(rule.name) for rule in DRAWN if rule.codes and rule.codes.keys().isdisjoint(built)
    ]
    of_scores = ["softcap", "alibi_slopes", "bias", "score_mod"]
    assert absent == ([*of_scores, "mask", "mask_mod", "dropout_p"] if wide else [])
    assert sum(bool(case.lengths) for case in cases) >= (10 if general else 0)
    assert any(case.head_dim != case.head_dim_v for case in cases) or not general
    assert {case.window[0] for case in cases} == {case.window[1] for case in cases} == {-1, 0}
    drawn = [fuzz_backward.problem("sm_90a", 0, n) for n in range(len(every))]
    assert {case.heads // case.heads_kv for case in drawn} == {1, 2, 3, 4, 8}
    assert any((0, 0) in case.lengths for case in drawn) or not general


def test_a_wrong_gradient_is_a_fault(on: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its problem, from which it can be tried again; so is a kernel that fails."""

    def sevens(bound: object, case: Case, *rest: object) -> dict[str, np.ndarray]:
        setup = gradients.lay_out(case)
        like = {**setup.host, **case.rule_arrays()}
        return {f"d{name}": np.full(like[name].shape, 7.0, np.float32) for name in case.wrt}

    monkeypatch.setattr(gradients, "_outputs", sevens)
    failed = fuzz_backward.run(range(7, 10), Place("emulated"), seed=5)
    assert len(failed) == 3 and all("max error" in text for text in failed)
    assert re.match(r"seed 5, number 7: d\w+: ", failed[0])
    case = eval(failed[0].splitlines()[1], {"Case": Case})
    emulated = Emulated("sm_90a")
    assert fuzz_backward.fault(case, emulated) in failed[0]

    def broken(*_: object) -> None:
        raise ValueError("too few registers")

    monkeypatch.setattr(gradients, "_outputs", broken)
    assert fuzz_backward.fault(case, emulated) == "ValueError: too few registers"
