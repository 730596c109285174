"""A checking build finds no race in the kernels, and finds those that are put into them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cases_emulator import attend, small
from helpers import ROOT

from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.cpu.emulator.build import cxx
from flashcore_cupy.cpu.emulator.run import KernelError, Schedule

pytestmark = pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: there is none")

SM80 = small("mma_sm80", seqlen_q=40, seqlen_kv=600, view="strided")
SM90 = small("wgmma_sm90", heads=14, seqlen_q=130, seqlen_kv=600)
KERNELS = [("sm_80", SM80), ("sm_90a", SM90)]


@pytest.mark.parametrize(("arch", "case"), KERNELS, ids=["mma_sm80", "wgmma_sm90"])
def test_kernels_have_no_race(arch: str, case: Case) -> None:
    result = attend(case, arch, Schedule(1, 20), checking=True)
    assert result.ok, result.reason


#: What is taken out, and what is said of it: with both places of a race.
REMOVED = {
    "sm80: the wait for a stage to be empty": (
        *("sm_80", SM80, "sm80/producer.cuh"),
        "    wait_empty(c, at, at.barriers_k);\n",
        r"race: .* writes .* at sm80/producer\.cuh:\d+.*\n.* has read at flashcore/tile/mma_sync",
    ),
    "sm80: the wait for a stage to be full": (
        *("sm_80", SM80, "fwd_sm80.cu"),
        "    wait_full(c, at, at.barriers_k);\n",
        "uninitialised|race",
    ),
    "sm80: the barrier after which all see the work": (
        *("sm_80", SM80, "fwd_sm80.cu"),
        "    block_sync();  // all threads see the work and the barriers\n",
        "uninitialised|race",
    ),
    "sm90: the release of K": (
        *("sm_90a", SM90, "sm90/consumer.cuh"),
        "    kv.release(smem.k);\n",
        r"deadlock(.*\n)*.*threads 0 to 31: wait for mbarrier at .*sm90/producer\.cuh:\d+",
    ),
}


@pytest.mark.parametrize("name", REMOVED)
def test_what_is_removed_is_missed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, case, file, text, found = REMOVED[name]
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    whole = (folder / file).read_text()
    assert text in whole
    (folder / file).write_text(whole.replace(text, "", 1))
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(folder))
    with pytest.raises(KernelError, match=found):
        attend(case, arch, Schedule(1, 20), checking=True)
