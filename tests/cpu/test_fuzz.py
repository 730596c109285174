"""Random problems by NumPy, and what all of them are compiled for."""

from __future__ import annotations

from fuzz import CONFIGURATIONS, KERNEL, SETTINGS, compiled_for, configurations, problems, run
from hypothesis import given, settings
from places import Place

from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.select import registry
from flashcore_cupy.select.sm90 import Sm90


def test_draws_compile_nothing_but_the_configurations() -> None:
    known = {compiled_for(case, "sm_90a") for case in configurations()}
    assert 150 <= len(known) <= CONFIGURATIONS

    @settings(SETTINGS, max_examples=400, derandomize=True)
    @given(problems())
    def belongs(case: Case) -> None:
        assert compiled_for(case, "sm_90a") in known, case.name

    belongs()


def test_configurations_have_everything() -> None:
    cases = configurations()
    assert sum(bool(case.lengths) for case in cases) >= 10
    assert {case.gate for case in cases} == {None, "qk", "softmax", "pv"}
    assert {case.dtype for case in cases} == set(registry.KERNELS[KERNEL].dtypes)
    built = [compiled_for(case, "sm_90a") for case in cases]
    for rule in RULES:
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
