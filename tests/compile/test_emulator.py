"""The kernels themselves, run on the CPU: the same cases, judged as on a GPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cases_emulator import attend, small

from flashcore_cupy.check.selftest import matrix
from flashcore_cupy.check.selftest.case import Case, packed
from flashcore_cupy.cpu.emulator.build import Source, cxx, library
from flashcore_cupy.cpu.emulator.run import Schedule

pytestmark = pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: there is none")


def wide(kernel: str, **changes: Any) -> Case:
    """Of enough blocks for the tile of a full grid; queries and keys that are no whole tiles."""
    sizes = {"batch": 7, "heads": 16, "heads_kv": 2, "seqlen_q": 127, "seqlen_kv": 130}
    return small(kernel, **sizes | changes)


LENGTHS = ((0, 5), (77, 100), (130, 64), (1, 1), (33, 0), (0, 0))
#: Each covers another path; those that differ in sizes alone share a build.
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
    ],
    "sm_90a": [
        wide("wgmma_sm90", causal=True),
        small("wgmma_sm90", seqlen_q=400, seqlen_kv=700, causal=True),
        wide("wgmma_sm90", mask="qk", mask_mod="thirds", seqlen_kv=144),
        small("wgmma_sm90", heads=8, seqlen_q=2, seqlen_kv=3000),  # clusters
        wide("wgmma_sm90", head_dim=192, head_dim_v=128, dtype="bfloat16", window=(33, 7)),
        packed(small("wgmma_sm90", heads=4), LENGTHS),
        small("wgmma_sm90", gate="qk", alibi="bh"),
    ],
}
EVERY = [(arch, case) for arch, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def built() -> None:
    """All libraries, side by side; what fails here fails again in its test."""

    def build(arch: str, case: Case) -> None:
        for config in matrix.case_config(case, arch):
            library(Source.of(config, arch))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wait = [pool.submit(build, arch, case) for arch, case in EVERY]
        for each in wait:
            each.exception()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("schedule", [Schedule(0, 0), Schedule(1, 30), Schedule(2, 100)])
@pytest.mark.parametrize(("arch", "case"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_kernels_are_right_in_any_order(arch: str, case: Case, schedule: Schedule) -> None:
    result = attend(case, arch, schedule)
    assert result.ok, f"{case.kernel} {case.dtype}: {result.reason}"
