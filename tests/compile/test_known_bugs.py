"""The bugs that kernels here once had, put back: the emulator notices each."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cases_bugs import BUGS, Bug, emulated, put_back
from cases_emulator import attend, small
from helpers import ROOT

from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.cpu.emulator.build import why_not
from flashcore_cupy.cpu.emulator.plan import emulated_plan
from flashcore_cupy.cpu.emulator.run import KernelError, Schedule
from flashcore_cupy.select import ladder
from flashcore_cupy.select.sm90 import Sm90

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@cache
def is_right(bug: Bug, kernel: str) -> bool:
    return not bug.is_wrong(emulated, kernel)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_results_show_it(bug: Bug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {bug.kernels[0], bug.kernels[-1]}
    assert all(is_right(bug, kernel) for kernel in kernels)
    put_back(bug, tmp_path, monkeypatch)
    for kernel in kernels:
        assert bug.is_wrong(emulated, kernel), f"{kernel}: the bug was put back and not noticed"


#: What results need not show: the file, its text and the bug's, a case, what the emulator says.
SEEN: dict[str, tuple[str, str, str, Case, str]] = {
    "several warps add to one tile of O": (
        "ladder/block_wide.cuh",
        "const int d = c.warp_n + i * WARPS_N;",
        "const int d = i;",
        small("wmma_fused_64"),
        r"race: .* of shared memory at .*block_wide\.cuh:\d+",
    ),
    "rows of shared memory without padding": (
        "ladder/tile_load.cuh",
        "int padded_row(int cols) { return cols + 8; }",
        "int padded_row(int cols) { return cols; }",
        small("wmma_fused_64"),
        r"slow: .* eight rows that all lie in the same banks at ladder/wmma_tile\.cuh:\d+",
    ),
    "16 bytes at a time, whatever the rows begin at": (
        "config.cuh",
        "constexpr int ALIGN_BYTES = FC_ALIGN_BYTES;",
        "constexpr int ALIGN_BYTES = 16;",
        small("mma_sm80", view="align8"),
        r"cp\.async 16: global address .* is no multiple of 16 at .*tile_copy\.cuh:\d+",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_the_checking_build_sees_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, right, wrong, case, said = SEEN[name]
    assert attend(case, "sm_80", Schedule(1, 30), checking=True).ok
    kernels = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", kernels)
    text = (kernels / file).read_text()
    assert text.count(right) == 1
    (kernels / file).write_text(text.replace(right, wrong))
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(kernels))
    if "padded_row" in right:  # the host reckons with the same rows
        monkeypatch.setattr(ladder, "padded_row", lambda columns: columns)
    with pytest.raises(KernelError, match=said):
        attend(case, "sm_80", Schedule(1, 30), checking=True)


@pytest.mark.parametrize("checking", [False, True])
def test_a_section_of_all_heads_and_more(checking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal, without keys: K and V take no room in L2, so a section had 2**25 heads. Multiplied by
    the blocks of a head that is 0 in 32 bits, by which the scheduler divides.
    """
    q = np.zeros((1, 1, 128 * 192, 64), np.float16)
    k = q[:, :, :0]

    def plan() -> object:
        made = emulated_plan(q, k, k, "sm_90a", kernel="wgmma_sm90", causal=True)
        (step,) = made.steps
        assert step.params["m_blocks"] == 128
        made.launch(checking=checking)
        return made

    plan()
    monkeypatch.setattr(Sm90, "section", lambda *_: 1 << 25)
    with pytest.raises(KernelError, match="illegal: thread"):
        plan()
