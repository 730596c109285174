"""What a checking build finds: nothing in the kernels; each fault of ``faults.cu``, with its place;
and what is missing when a barrier is taken out of a kernel.
"""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases_emulator import attend, small
from helpers import ROOT
from probe import Map, tensor_map

from flashcore_cupy.check.selftest import gradients
from flashcore_cupy.check.selftest.case import Case, packed
from flashcore_cupy.check.selftest.outcome import Emulated
from flashcore_cupy.cpu.emulator.build import Source, library, why_not
from flashcore_cupy.cpu.emulator.memory import memory_of
from flashcore_cupy.cpu.emulator.run import Grid, KernelError, Schedule, launch
from flashcore_cupy.jit.sources import kernels_digest

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

FAULTS = ROOT / "tests" / "compile" / "faults.cu"
#: What is said of each, and where: a line of its own, or one that it calls.
SAID = {
    "threads": "race: thread .* byte .* of shared memory at .*which thread .* has .* at ",
    "lanes": "race: thread .* byte .* of shared memory at .*which thread .* has .* at ",
    "shuffle": "race: thread .* byte .* of shared memory at .*which thread .* has .* at ",
    "readers": r"race: thread 3 .* writes byte 0 .*which thread \d+ of block 0 has read at ",
    "named": "race: ",
    "turns": r"bar.arrive 1: it has come to this round already, which is not over at ",
    "pipeline": "race: thread .* byte .* of shared memory at .*which thread .* has .* at ",
    "new_barrier": "uninitialised: .* reads byte 8192|race: .* reads byte 8192",
    "remade_barrier": "mbarrier: thread 0 .* makes one where one is already at ",
    "overwritten_barrier": "mbarrier: thread 0 .* writes over one at ",
    "bytes": "deadlock.*threads 0 to 63: .*mbarrier, whose phase misses 0 arrivals and 4096 bytes",
    "arrivals": "deadlock.*threads 0 to 31: .*whose phase misses 1 arrivals and 0 bytes at .*"
    "threads 32 to 63: wait for bar.sync 0, where 32 of 64 have come at ",
    "unwritten": "uninitialised: thread 0 .* reads byte 252 of shared memory",
    "same_value": "race: .* writes byte 0 .*has written",
    "banks": "slow: .* takes eight rows that all lie in the same banks",
    "copy": "race: .* reads .*which a copy of thread .*, not waited for, has written",
    "copies_of_others": "race|uninitialised",
    "counted_copies": "race: .* reads .*which a copy of thread .*, not waited for, has written",
    "beyond": "out of bounds: thread .* reads 4 bytes of x, beyond its end",
    "before": "out of bounds: thread 0 .* reads 4 bytes of x, before it begins",
    "between": "out of bounds: .* writes 4 bytes of y, between its elements",
    "nowhere": "out of bounds: .* reads 4 bytes, where no array is",
    "input": "out of bounds: .* writes 4 bytes of x, which a kernel must not write",
    "copy_beyond": "out of bounds: a copy .* reads 16 bytes of x, beyond its end",
    "misaligned": "misaligned: thread .* reads 8 bytes",
    "unwritten_output": "uninitialised: .* reads byte .* of y",
    "division": "illegal: thread .* does what C\\+\\+ leaves undefined",
    "overflow": "illegal: thread .* does what C\\+\\+ leaves undefined",
    "index": "illegal: thread .* does what C\\+\\+ leaves undefined",
    "address": "out of bounds: .* writes 4 bytes, where no array is",
    "copy_from_nowhere": "out of bounds: a copy .* reads 16 bytes, where no array is",
    "blocks": "race: thread .* of block [01] writes byte .* of y.*which thread .* has written",
    "fences": "race: .* reads byte .* of y",
    "second_fence": "race: .* reads byte .* of y",
    "peers": "race|uninitialised: .* of shared memory of block [01]",
    "barrier_elsewhere": "st.async: the barrier is in another block's shared memory at ",
    "end_of_a_block": "too soon: block [01] may end while thread .* reads its shared memory",
    "accumulators": "too soon: .* touches a register of a wgmma that is not waited for",
    "wgmma_fence": "no fence: .* has touched a register of the wgmma after its last wgmma_fence",
    "first_fence": "no fence: .* starts its first wgmma before any wgmma_fence at ",
    "operands": "race: .* writes .*which a wgmma of warp 0 of block 0 has read",
    "operands_beyond": "wgmma: an operand reaches beyond the 16384 bytes of shared memory",
    "registers": "deadlock.*setmaxnreg.inc, for which the block lacks 1024 registers at ",
    "proxies": "no fence: a wgmma .* has the asynchronous proxy read .*has written at ",
    "load_between_pieces": "TMA load: the box begins at byte 20 of its rows, no multiple of 16",
    "load_too_soon": "race: .* reads .*which a copy that an mbarrier counts has written",
    "load_never_complete": "deadlock.*whose phase misses 0 arrivals and 16 bytes",
    "load_outlives_block": "too soon: block 0 may end while a copy that an mbarrier counts writes",
    "load_over_readers": "race: a copy that an mbarrier counts writes .*has read",
    "new_barrier_unseen": "no fence: .* has the asynchronous proxy read byte 8192",
    "store_unseen": "no fence: a copy of thread 0 .* has the asynchronous proxy read",
    "store_too_soon": "(race|uninitialised): a copy of thread 0 .* has the asynchronous proxy read",
    "store_outlives_thread": "too soon: thread 0 .* ends while TMA may read its shared memory",
}
GRIDS = {
    **dict.fromkeys(("blocks", "fences", "second_fence"), Grid(2, 64)),
    **dict.fromkeys(("peers", "barrier_elsewhere", "end_of_a_block"), Grid(2, 64, 16384, 2)),
    **dict.fromkeys(
        ("accumulators", "wgmma_fence", "first_fence", "operands", "operands_beyond", "proxies"),
        Grid(1, 128, 16384),
    ),
    "registers": Grid(1, 384, 16384),
}


def faults(macro: str) -> list[str]:
    return re.findall(rf"^{macro}\((\w+)\)", FAULTS.read_text(), re.MULTILINE)


def build(*, checking: bool) -> Any:
    names = faults("FAULT") + faults("TMA_FAULT")
    entries = tuple(f"{which}_{name}" for name in names for which in ("right", "wrong"))
    source = Source(str(FAULTS), entries, "sm_90a", {"KERNELS": kernels_digest()})
    return library(source, checking=checking)


@pytest.fixture(scope="module")
def built() -> Any:
    return build(checking=True)


@pytest.fixture(scope="module")
def unchecked() -> Any:
    return build(checking=False)


def run(built: Any, which: str, name: str, schedule: Schedule) -> np.ndarray:
    y, n = np.full((32, 40), np.nan, np.float32)[:, :32], np.zeros(64, np.int32)
    if name in faults("TMA_FAULT"):
        x = np.ones((1, 1, 32, 32), np.float32)
        everything = (slice(None),) * 4
        words = tensor_map(Map(x, everything, 128, 32).view, x.ctypes.data)
        params = words.tobytes() + np.array([y.ctypes.data]).tobytes()
        grid, inputs = Grid(1, 32, 16384), {"n" if "store" in name else "x"}
    else:
        x = np.arange(1024, dtype=np.float32)
        params = np.array([a.ctypes.data for a in (x, y, n)]).tobytes()
        grid, inputs = GRIDS.get(name, Grid(1, 64, 16384)), {"x"}
    memory = memory_of({"x": x, "y": y, "n": n}, inputs, {"x", "n"})
    launch(built, f"{which}_{name}", params, grid, schedule, keep=(x, y, n), memory=memory)
    return y


def test_every_fault_has_its_words() -> None:
    assert set(SAID) == set(faults("FAULT") + faults("TMA_FAULT"))


@pytest.mark.parametrize("name", SAID)
def test_faults_are_found_in_any_order(name: str, built: Any) -> None:
    for schedule in (Schedule(0, 0), Schedule(1, 30), Schedule(2, 100), Schedule(3, 30)):
        run(built, "right", name, schedule)
        with pytest.raises(KernelError) as error:
            run(built, "wrong", name, schedule)
        text = str(error.value).replace("\n", " ")
        assert re.search(SAID[name], text), text
        lines = [int(n) for n in re.findall(r"faults\.cu:(\d+)", text)]
        assert any(name in line for line in around(lines)), text


def around(lines: list[int]) -> list[str]:
    """The first lines of the definitions that lines of ``faults.cu`` are in."""
    text = FAULTS.read_text().split("\n")
    return [next(x for x in text[n - 1 :: -1] if "FAULT(" in x) for n in lines]


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "division": "illegal: thread .* divides by 0",
        "address": "illegal: thread .* touches address 0x100000000.*, where nothing is",
        "copy_from_nowhere": "illegal: .* touches address",
    }.items(),
)
def test_what_would_end_the_process_is_an_error(name: str, said: str, unchecked: Any) -> None:
    if name == "division" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("a division by 0 is 0 here")
    for _ in range(2):
        with pytest.raises(KernelError, match=said):
            run(unchecked, "wrong", name, Schedule(1, 30))
        run(unchecked, "right", name, Schedule(1, 30))


def test_a_product_ends_late_or_soon(unchecked: Any) -> None:
    """Who looks at accumulators too soon finds NaN, or, in another order, the result."""
    seen = [
        run(unchecked, "wrong", "accumulators", Schedule(seed, eager))[0]
        for seed in range(4)
        for eager in (0, 100)
    ]
    assert all(np.isnan(row).any() for row in seen[::2])
    assert any((row == 16).any() for row in seen[1::2])


# ---- kernels -----------------------------------------------------------------------------------

SM80 = small("mma_sm80", seqlen_q=40, seqlen_kv=600, view="strided")
SM90 = small("wgmma_sm90", heads=14, seqlen_q=130, seqlen_kv=600)
LISTED = {"block_mask": "64x128 1h", "mask_mod": "thirds", "seqlen_q": 200, "seqlen_kv": 300}
KERNELS = {
    "mma_sm80": ("sm_80", SM80),
    "split keys": ("sm_80", small("mma_sm80", heads=8, seqlen_q=3, seqlen_kv=1500)),
    "masks": ("sm_80", small("mma_sm80", mask="bhqk")),
    "wgmma_sm90": ("sm_90a", SM90),
    "clusters": ("sm_90a", small("wgmma_sm90", heads=8, seqlen_q=2, seqlen_kv=3000)),
    "packed": ("sm_90a", packed(small("wgmma_sm90", heads=4), ((77, 100), (33, 0), (0, 5)))),
    "lists, mma_sm80": ("sm_80", small("mma_sm80", **LISTED)),
    "lists, wgmma_sm90": ("sm_90a", small("wgmma_sm90", batch_invariant=True, **LISTED)),
    "peers": ("sm_90a", small("cluster_sm90", heads=8, seqlen_q=2, seqlen_kv=300)),
    "warpgroups": (
        "sm_90a",
        small("cluster_sm90", batch=5, heads=8, seqlen_q=3, seqlen_kv=1000, causal=True),
    ),
    "ladder": ("sm_80", small("wmma_warp_softmax", causal=True)),
    "three kernels": ("sm_80", small("wmma_unfused")),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_have_no_fault(name: str) -> None:
    arch, case = KERNELS[name]
    result = attend(case, arch, Schedule(1, 20), checking=True)
    assert result.ok, result.reason


#: Blocks of keys of grouped heads, each of which has lists of its own.
GRADIENTS = {
    "lists, bwd_sm80": ("sm_80", small("bwd_sm80", **LISTED)),
    "lists and positions, bwd_sm80": ("sm_80", small("bwd_sm80", causal=True, **LISTED)),
    "lists, bwd_sm90": ("sm_90a", small("bwd_sm90", **LISTED)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_kernels_of_gradients_have_no_fault(name: str) -> None:
    arch, case = GRADIENTS[name]
    result = gradients.run_case(case, Emulated(arch, seed=1, checking=True))
    assert result.ok, result.reason


#: What is taken out, and what is said of it: with both places of a race.
REMOVED: dict[str, tuple[str, Case, str, str, str]] = {
    "sm80: the wait for a stage to be empty": (
        *("sm_80", SM80, "sm80/producer.cuh"),
        "    wait_empty(c, at, at.barriers_k);\n",
        r"race: .* writes .* at .*sm80/producer\.cuh:\d+.*has read at flashcore/tile/mma_sync",
    ),
    "sm80: the wait for a stage to be full": (
        *("sm_80", SM80, "fwd_sm80.cu"),
        "    wait_full(c, at, at.barriers_k);\n",
        r"(uninitialised|race): .* reads .* at flashcore/tile/mma_sync_tile\.cuh:\d+",
    ),
    "sm80: the barrier after which all see the work": (
        *("sm_80", SM80, "fwd_sm80.cu"),
        "    block_sync();  // all threads see the work and the barriers\n",
        r"(uninitialised|race): .* reads .* at .*fwd_sm80\.cu:\d+",
    ),
    "sm90: the release of K": (
        *("sm_90a", SM90, "sm90/consumer.cuh"),
        "    kv.release(smem.k);\n",
        r"deadlock.*threads 0 to 31: wait for mbarrier.* at .*sm90/producer\.cuh:\d+",
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
    with pytest.raises(KernelError) as error:
        attend(case, arch, Schedule(1, 20), checking=True)
    said = str(error.value).replace("\n", " ")
    assert re.search(found, said), said
