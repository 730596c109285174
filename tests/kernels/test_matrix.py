"""Cases of the correctness matrix, judged as ``flashcore-cupy selftest`` judges them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from cases_emulator import small
from helpers import today
from places import RULED, Place, each

from flashcore_cupy.attention import plan
from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.arrays import Placed, set_up
from flashcore_cupy.check.selftest.backward_cases import backward_cases
from flashcore_cupy.check.selftest.case import Case, packed
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds
from flashcore_cupy.select import registry
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

# It is of every kernel, and of every path.
pytestmark = pytest.mark.every_day

#: Two launches: copies end as late as they may, and at once.
EMULATED = matrix.Emulated(HOPPER, seed=1)
GROUPS = ("rules", "packed", "rules gate", "decode", "invariant")


@each("kernel", registry.KERNELS)
def test_matrix(on: Place, kernel: str) -> None:
    """Every case of ``flashcore-cupy selftest``, and which of them fail; emulated, a few."""
    mine = [case for case in matrix.cases() if case.kernel == kernel]
    assert len(mine) > 50
    if on.is_emulated:
        few = [case for case in mine if scores_of(case) < 100_000 and not case.batch_invariant]
        few = some_of(few, 4 if kernel in RULED else 1)
        results = [matrix.run_case(case, EMULATED) for case in few]
    else:
        arch = compiler.device_arch()
        mine = matrix.runnable(mine, arch)
        configs = [config for case in mine for config in matrix.case_config(case, arch)]
        builds.build_each([(config, arch) for config in dict.fromkeys(configs)])
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(matrix.run_case, mine))
    failed = [f"{r.case.dtype} {r.case.name}: {r.reason}" for r in results if not r.ok]
    assert not failed, f"{len(failed)} of {len(results)} cases fail:\n" + "\n".join(failed)


@each("kernel", BACKWARD_KERNELS)
def test_matrix_of_the_backward_pass(on: Place, kernel: str) -> None:
    mine = [case for case in backward_cases() if case.kernel == kernel]
    if on.is_emulated:
        few = [case for case in mine if scores_of(case) < 100_000]
        results = [matrix.run_case(case, EMULATED) for case in some_of(few, 4)]
    else:
        arch = compiler.device_arch()
        mine = matrix.runnable(mine, arch)
        configs = [config for case in mine for config in matrix.case_config(case, arch)]
        builds.build_each([(config, arch) for config in dict.fromkeys(configs)])
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(matrix.run_case, mine))
    failed = [f"{r.case.dtype} {r.case.name}: {r.reason}" for r in results if not r.ok]
    assert not failed, f"{len(failed)} of {len(results)} cases fail:\n" + "\n".join(failed)


def some_of(cases: list[Case], count: int) -> list[Case]:
    """As many cases, evenly spaced; others each day."""
    step = len(cases) // count
    return cases[today() % step :: step]


def scores_of(case: Case) -> int:
    return case.batch * case.heads * case.seqlen_q * case.seqlen_kv


def test_a_case_compiles_ahead_what_it_will_launch(on: Place) -> None:
    arch = HOPPER if on.is_emulated else compiler.device_arch()
    some = [case for case in matrix.cases() if case.group in GROUPS][::12]
    ahead = {case: matrix.case_config(case, arch) for case in some}
    if not on.is_emulated:  # where a plan compiles nothing yet
        builds.build_each([(config, arch) for configs in ahead.values() for config in configs])
    for case, configs in ahead.items():
        placed = Placed.of(case, set_up(case), on_gpu=not on.is_emulated, in_kernel=True)
        bound = plan(*placed.inputs, out=placed.out, kernel=case.kernel, **placed.arguments)
        assert bound.selection.config == configs[-1], case.name


def wide(kernel: str, **changes: Any) -> Case:
    """Of enough blocks for the tile of a full grid; queries and keys that are no whole tiles."""
    sizes = {"batch": 7, "heads": 16, "heads_kv": 2, "seqlen_q": 127, "seqlen_kv": 130}
    return small(kernel, **sizes | changes)


LENGTHS = ((0, 5), (77, 100), (130, 64), (1, 1), (33, 0), (0, 0))
#: Each covers another path.
CASES = {
    "sm_80": [
        small("scalar", causal=True),
        small("wmma_unfused", dtype="bfloat16"),
        small("wmma_fused_32", causal=True),
        small("wmma_fused_64", causal="top-left"),
        small("wmma_cp_async"),
        small("wmma_warp_softmax", causal=True),
        small("fp8_wmma", causal=True),
        small("mma_sm80", causal=True, view="strided"),
        small("mma_sm80", seqlen_q=300, seqlen_kv=700, causal=True, view="strided"),
        small("mma_sm80", dtype="float32", sink=True),
        small("mma_sm80", heads=8, seqlen_q=3, seqlen_kv=1500, alibi="h", window=(700, -1)),
        small("mma_sm80", head_dim=256, head_dim_v=256, batch=30, seqlen_q=140),
        wide("mma_sm80", mask="bhqk", score_mod="table"),
        packed(
            small("mma_sm80", heads=4, view="misaligned"), ((0, 5), (77, 100), (130, 64), (0, 0))
        ),
        small("mma_sm80", gate="softmax", bias="bhqk", bias_fp32=True, softcap=5.0),
        small("mma_sm80", dropout_p=0.3, causal=True, sink=True, alibi="bh"),
    ],
    "sm_90a": [
        wide("wgmma_sm90", causal=True),
        small("wgmma_sm90", seqlen_q=400, seqlen_kv=700, causal=True),
        wide("wgmma_sm90", mask="qk", mask_mod="thirds", seqlen_kv=144),
        small("wgmma_sm90", heads=8, seqlen_q=2, seqlen_kv=3000),  # clusters
        wide("wgmma_sm90", head_dim=192, head_dim_v=128, dtype="bfloat16", window=(33, 7)),
        packed(small("wgmma_sm90", heads=4), LENGTHS),
        small("wgmma_sm90", gate="qk", alibi="bh"),
        small("cluster_sm90", heads=8, heads_kv=8, seqlen_q=130, seqlen_kv=500, causal=True),
        small("cluster_sm90", batch=5, heads=8, seqlen_q=3, seqlen_kv=1000, sink=True),
        small("cluster_sm90", seqlen_q=70, seqlen_kv=250, dtype="bfloat16", alibi="h"),
        wide("wgmma_sm90", dropout_p=0.2, sink=True),
    ],
}
EVERY = [(arch, case) for arch, cases in CASES.items() for case in cases]


@each("arch, case", EVERY)
def test_each_path(on: Place, arch: str, case: Case) -> None:
    if not on.takes(case.kernel):
        pytest.skip(f"{case.kernel} is for another GPU")
    result = matrix.run_case(case, replace(EMULATED, arch=arch) if on.is_emulated else None)
    assert result.ok, f"{case.kernel} {case.dtype}: {result.reason}"


def test_bits_that_depend_on_the_batch_are_noticed(on: Place) -> None:
    """Without ``batch_invariant``, a grid this full gets another tile than a sequence alone."""
    emulated = EMULATED if on.is_emulated else None
    case = next(case for case in matrix.cases() if case.group == "invariant" and not case.lengths)
    assert matrix.run_case(case, emulated).ok
    result = matrix.run_case(replace(case, batch=13, batch_invariant=False), emulated)
    assert not result.ok and "alone gives other bits" in result.reason
