"""The search for a tile: all of it without a GPU, by a stand-in for CuPy; one search with one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases_tune import ARCH, SMALL, invoke, kinds_of, row_of, search_of, tune
from click.testing import CliRunner
from side_by_side.results import Entry

from flashcore_cupy.cpu import reference
from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.attention_problem import contiguous_problem
from flashcore_cupy.select import registry, selector
from flashcore_cupy.select.config import Tile
from flashcore_cupy.select.row import Row
from flashcore_cupy.select.table import ROWS

# --- what is tried -------------------------------------------------------------------------------


def test_the_cells_are_the_forward_grid() -> None:
    problems = tune.cells_of((128, 128), "bfloat16", tune.LENGTHS, (False, True))
    assert list(problems)[:3] == ["512", "512c", "1024"] and len(problems) == 12
    for name, problem in problems.items():
        assert problem.batch * problem.seqlen_q == 16384 and problem.heads_q * 128 == 2048
        assert name == f"{problem.seqlen_q}{'c' * problem.causal}"
    (wide,) = tune.cells_of((192, 128), "float16", (20000,), (True,)).values()
    assert (wide.batch, wide.heads_q, wide.head_dim_v) == (1, 10, 128)


@pytest.mark.parametrize(
    ("kernel", "dims"),
    [
        *(("wgmma_sm90", dims) for dims in ((64, 64), (128, 128), (192, 128), (256, 256))),
        *(("mma_sm80", dims) for dims in ((64, 64), (128, 128), (256, 256), (512, 512))),
    ],
)
def test_every_candidate_is_legal_or_told_why_not(kernel: str, dims: tuple[int, int]) -> None:
    lengths = [n for n in tune.LENGTHS if n > 512]  # wgmma_sm90 at D=256: up to 512, another row
    problems = tune.cells_of(dims, "bfloat16", lengths, (False, True))
    search = tune.begin(kernel, problems, tune.SPACES[kernel], ARCH)
    assert search.current.is_current and search.current.row in ROWS
    assert len(search.candidates) > 100
    assert len({c.name for c in search.candidates}) == len(search.candidates)
    for c in search.candidates:
        if c.dropped is None:
            config = selector.configure_row(c.row, next(iter(problems.values())))
            assert config.smem_bytes <= targets.smem_limit(ARCH) and c.row.tile == config.tile
            asked = c.arguments(True)["config"]  # what attention makes of it is the same kernel
            chosen = selector.select(problems["1024"], ARCH, kernel=kernel, overrides=asked)
            assert chosen.config == config
        else:
            assert c.dropped[0] in ("illegal", "too large") and c.dropped[1]
    assert replace(search.current.row, tile=search.candidates[-1].row.tile).dims == dims


def test_given_values_restrict_the_space() -> None:
    space = tune.SPACES["wgmma_sm90"].restricted(block_m=(128,), block_n=(24, 112), num_stages=())
    found = search_of("wgmma_sm90", 128, space)
    assert len(found.candidates) == 1 + 2 * 4
    assert found.candidates[0].row.tile == selector.select(found.cells["1024"], ARCH).config.tile
    kinds = kinds_of(found)
    assert kinds["128x24 s1"] == "illegal" and kinds["128x112 s2"] is None
    assert kinds["128x112 s4"] == "too large"


def test_lengths_of_several_rows_are_refused() -> None:
    problems = tune.cells_of((64, 64), "float16", (8, 512), (False,))
    with pytest.raises(ValueError, match=r"several rows .* take those of one: 8 or 512$"):
        tune.begin("mma_sm80", problems, SMALL, ARCH)
    problems_256 = tune.cells_of((256, 256), "float16", tune.LENGTHS, (False, True))
    with pytest.raises(ValueError, match="those of one: 512 or 1024, 2048, "):
        tune.begin("wgmma_sm90", problems_256, SMALL, ARCH)
    with pytest.raises(ValueError, match="sm_90a alone"):
        tune.begin("wgmma_sm90", {"512": problems["512"]}, SMALL, "sm_80")


def test_what_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    search = search_of(masks=(True,))
    fake_compiler(monkeypatch, fails=True)
    tune.compile_all(search)
    assert search.alive == [search.current]
    assert search.candidates[1].dropped == ("does not compile", "x.cu(1): error: no")


def fake_compiler(monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    """Compiles nothing; ``fails``: all but the first job."""

    def compile_each(jobs: Any, on_done: Any) -> list[Any]:
        results: list[Any] = []
        for number, (source, defines, arch, _) in enumerate(jobs):
            entries = build().entries
            made = compiler.CompiledKernel(
                source, arch, defines, Path("x"), False, 1.0, entries, ""
            )
            error = nvrtc.CompileError("x.cu", arch, defines, "x.cu(1): error: no\nmore")
            results.append(error if fails and number else made)
        return results

    monkeypatch.setattr(compiler, "compile_each", compile_each)


# --- what the GPU says ---------------------------------------------------------------------------


class FakeGpu:
    """As much of CuPy as the search uses, on NumPy arrays; each launch takes its tile's time."""

    int8 = np.int8
    empty = staticmethod(np.empty)
    asnumpy = staticmethod(np.asarray)

    def __init__(self) -> None:
        self.us, self.done, self.launched = 0.0, True, list[str]()
        self.wrong = self.slow = ""
        self.cuda = SimpleNamespace(
            Event=lambda: FakeEvent(self), get_elapsed_time=lambda a, b: (b.us - a.us) / 1e3
        )

    def plan(self, q: Any, k: Any, v: Any, *, out: Any, config: Any, **asked: Any) -> Any:
        tile, bshd = Tile(**config), asked.get("layout") == "bshd"
        name = f"{tile.block_m}x{tile.block_n}"
        o = out
        lse = np.empty(q.shape[:3], np.float32)

        def launch() -> None:
            self.launched.append(name)
            self.us += 50.0 if name == self.slow else 100.0 * 64 / tile.block_n
            if bshd:
                return
            rows = np.arange(q.shape[2])
            rules = {"softmax_scale": q.shape[3] ** -0.5, "causal": asked["causal"]}
            o[:] = reference.naive(q, k, v, rows=rows, **rules)
            lse[:] = reference.oracle(q, k, v, rows=rows, **rules)[1]
            if name == self.wrong:
                o[0, 0, 1, 0] = 7

        dims, seqlen = (q.shape[3], v.shape[3]), q.shape[2]
        problem = contiguous_problem(*q.shape[:2], seqlen, dims[0], head_dim_v=dims[1])
        kernel = registry.KERNELS[asked["kernel"]]
        selection = SimpleNamespace(kernel=kernel, config=SimpleNamespace(tile=tile))
        arrays = {"o": o, "lse": lse} if asked.get("return_lse") else {"o": o}
        return SimpleNamespace(launch=launch, problem=problem, selection=selection, arrays=arrays)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.us = gpu, 0.0

    @property
    def done(self) -> bool:
        return self.gpu.done

    def record(self) -> None:
        self.us = self.gpu.us

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    monkeypatch.setitem(sys.modules, "cupy", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(tune, "plan", fake.plan)
    monkeypatch.setattr(tune, "to_gpu", lambda arrays: [x.copy() for x in arrays])
    sizes = {"TOKENS": 4096, "COLUMNS": 128, "CHECKED": (1, 2, 67)}  # small arrays, many blocks
    for name, value in {**sizes, "FLUSH_BYTES": 16, "_PATIENCE_S": 0.05}.items():
        monkeypatch.setattr(tune, name, value)
    yield fake


def build(spilled: int = 0, stack: int = 0) -> builds.Build:
    entry = nvrtc.EntryResources(168, 0, stack, spilled)
    return builds.Build("mma_sm80", "x.cu", ARCH, True, 1.0, 2048, {"x": entry})


def test_faults_of_a_build() -> None:
    info = "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are "
    serialized = info + "serialized due to insufficient register resources for the function 'x'"
    assert list(tune.faults(build(), "ptxas info    : Used 168 registers")) == []
    assert list(tune.faults(build(stack=8), "")) == [("spills", "8 bytes")]
    assert list(tune.faults(build(), serialized)) == [("serialised", "C7512")]
    assert next(tune.faults(build(576, 176), serialized)) == ("spills", "576 bytes")


def test_the_current_row_may_be_slow_but_not_wrong() -> None:
    current = search_of().current
    current.drop("spills", "8 bytes")
    assert current.dropped is None
    with pytest.raises(RuntimeError, match=r"the current row, 128x128.*: wrong: nan"):
        current.drop("wrong", "nan")


def built(masks: Any = (False, True)) -> tune.Search:
    """A search of which all has been compiled, as it were: three tiles of 64 rows and 8 warps."""
    problems = tune.cells_of((64, 64), "bfloat16", (64,), masks)
    space = tune.Space((64,), (32, 64, 128), (1,))
    search = tune.begin("mma_sm80", problems, space, ARCH)
    for candidate in search.candidates:
        candidate.builds = {causal: build() for causal in masks}
    return search


def test_tiles_are_checked_and_raced(gpu: FakeGpu) -> None:
    gpu.wrong = "64x32"
    search = built()
    told: list[str] = []
    shown = tune.measure(search, top=1, rounds=3, step=told.append)
    assert [c.name for c in shown] == ["64x128 s1", search.current.name]
    assert shown[0].speed == pytest.approx(2.0) and shown[1].speed == 1.0
    assert shown[0].entries["64c"].samples == 3 and shown[0].entries["64"].us == 50.0
    assert 0 < (shown[0].error or 0) < 1
    assert kinds_of(search)["64x32 s1"] == "wrong" and not search.candidates[1].ratios
    other = next(c for c in search.candidates if c.name == "64x64 s1")
    assert other.entries["64"].samples == 5  # those of the first pass
    assert told[0] == "checking " + search.current.name and "timing 3 tiles at 64" in told


def test_a_kernel_that_hangs_is_named(gpu: FakeGpu) -> None:
    gpu.done = False
    search = built()
    with pytest.raises(RuntimeError, match=r"128x64 s2.*causal=True: still running"):
        tune.measure(search, 2, 2, lambda _: None)


def test_what_fails_in_the_race_is_dropped() -> None:
    search = built((False,))
    entries = {c.name: Entry(10.0) for c in search.candidates}
    entries["64x64 s1"] = Entry(reason="no memory")
    tune.record(search, search.candidates, "64", entries)
    failed = next(c for c in search.candidates if c.name == "64x64 s1")
    assert failed.dropped == ("fails", "64: no memory") and failed.speed is None
    entries[search.current.name] = Entry(reason="no memory")
    with pytest.raises(RuntimeError, match="the current row"):
        tune.record(search, search.candidates, "64", entries)


# --- what is printed -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kernel}-{row.head_dim}")
def test_a_row_survives_its_own_source(row: Row) -> None:
    assert row_of(tune.source_of(row)) == row


def test_a_row_is_written_as_in_the_table() -> None:
    row = Row("x", 64, Tile(64, 32, warps_m=4, cp_async=True), above_blocks=9, dtypes=("float32",))
    assert tune.source_of(row) == (
        'Row("x", 64, Tile(64, 32, warps_m=4, cp_async=True), above_blocks=9, dtypes=("float32",))'
    )


def test_with_a_gpu_the_row_is_printed(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = SimpleNamespace(gpu="NVIDIA X", to_json=lambda: {"gpu": "NVIDIA X"})
    monkeypatch.setattr(tune.machine, "machine", lambda arch: machine)
    monkeypatch.setattr(compiler, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(builds, "target", lambda arch, on_gpu: ARCH)
    fake_compiler(monkeypatch, fails=False)
    gpu.slow = "64x96"
    path = tmp_path / "x.json"
    asked = ("--kernel", "mma_sm80", "--D", "64", "--S", "64", "--S", "32", "--json", str(path))
    done = invoke(*asked, "--block-m", "64", "--block-n", "96", "--block-n", "32", "--top", "3")
    lines = done.stdout.splitlines()
    row = row_of(lines[-1])
    assert row.tile.block_n == 96 and row.kernel == "mma_sm80"
    selector.configure_row(row, contiguous_problem(1, 1, 64, 64))
    assert max(map(len, lines[:-1])) <= 110
    header = next(line for line in lines if line.startswith("tile  "))
    assert header.split() == ["tile", "speed", "regs", "KiB", "64", "64c", "32", "32c"]
    first = lines[lines.index(header) + 2]
    assert first.startswith("64x96") and " 2.000 " in first
    data = json.loads(path.read_text())
    assert row_of(data["best"]) == row and data["machine"] == {"gpu": "NVIDIA X"}
    best = next(c for c in data["candidates"] if c["row"] == data["best"])
    assert best["speed"] == pytest.approx(2.0) and best["error"] < 1 and best["dropped"] is None
    assert set(best["cells"]) == set(data["cells"]) == {"64", "64c", "32", "32c"}
    assert {"us", "p10_us", "p90_us", "samples", "speed"} <= set(best["cells"]["64"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--kernel", "wmma_unfused"), "Invalid value for '--kernel'"),
        (("--D", "512"), "takes head dims up to"),
        (("--dtype", "float32"), "not float32"),
        (("--block-n", "0"), "use a whole number from 1"),
    ],
)
def test_what_cannot_be_searched_is_one_message(asked: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(tune.main, asked)
    assert done.exit_code != 0 and told in " ".join(done.output.split())
    assert "Traceback" not in done.output
