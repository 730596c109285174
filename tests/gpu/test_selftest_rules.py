"""The matrix's cases of rules on a GPU: what they compile, and whether they see errors."""

from __future__ import annotations

from dataclasses import replace

from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.arrays import Placed, set_up
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds

GROUPS = ("rules", "packed", "rules gate", "decode", "invariant")
CASES = [case for case in matrix.cases() if case.group in GROUPS]


def test_a_case_compiles_ahead_what_it_will_launch() -> None:
    from flashcore_cupy.attention import plan

    arch = compiler.device_arch()
    some = CASES[::12]
    ahead = {case: matrix.case_config(case, arch) for case in some}
    builds.build_each([(config, arch) for configs in ahead.values() for config in configs])
    for case, configs in ahead.items():
        placed = Placed.of(case, set_up(case), on_gpu=True)
        bound = plan(*placed.inputs, out=placed.out, kernel=case.kernel, **placed.arguments)
        assert bound.selection.config == configs[-1], case.name


def test_bits_that_depend_on_the_batch_are_noticed() -> None:
    """Without ``batch_invariant``, a grid this full gets another tile than a sequence alone."""
    case = next(c for c in CASES if c.group == "invariant" and not c.lengths)
    assert matrix.run_case(case).ok
    result = matrix.run_case(replace(case, batch=13, batch_invariant=False))
    assert not result.ok and "alone gives other bits" in result.reason
