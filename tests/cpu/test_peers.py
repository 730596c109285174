"""The benchmarks beside torch, as far as they go without a GPU."""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT
from rich.console import Console

sys.path.insert(0, str(ROOT / "benchmarks"))

import errors
import peers
from side_by_side import (
    backends,
    cells,
    error_cases,
    gate,
    gradient_gate,
    measure,
    patterns,
    plots,
    tables,
    timing,
)
from side_by_side.cells import Cell
from side_by_side.results import (
    BACKENDS,
    CUDNN,
    FA4,
    FA4_FIXED,
    FLASH2,
    FLASH2_FIXED,
    FLEX,
    LOAD,
    OURS,
    OURS_ANY,
    SDPA,
    VARLEN,
    Entry,
    Load,
    Report,
    Row,
    geometric_mean,
)

from flashcore_cupy.cpu import reference
from flashcore_cupy.cpu.emulator.backward import emulated_backward
from flashcore_cupy.select import selector
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS


def cell_of(name: str) -> Cell:
    """The first of this name: the backward pass has the same names."""
    return next(c for group in cells.GROUPS for c in cells.cells(group) if c.name == name)


def text_of(renderable: Any, width: int = 150) -> str:
    console = Console(width=width, record=True, file=open_null())
    console.print(renderable)
    return console.export_text()


def open_null() -> Any:
    return SimpleNamespace(write=lambda _: None, flush=lambda: None, isatty=lambda: False)


# --- cells ---------------------------------------------------------------------------------------


def test_the_grid_is_every_head_dim_length_and_mask() -> None:
    grid = cells.cells("grid")
    expected = {
        f"D{d}S{s}c{c}"
        for d in (64, 128, 256)
        for s in (512, 1024, 2048, 4096, 8192, 16384)
        for c in (0, 1)
    }
    assert {c.name for c in grid} == expected and len(grid) == len(expected)
    for c in grid:
        assert c.batch * c.seqlen_q == 16384 and c.heads * c.head_dim == 2048
        assert c.heads == c.heads_kv and c.seqlen_q == c.seqlen_kv
        assert c.name == f"D{c.head_dim}S{c.seqlen_q}c{c.causal:d}"


def test_the_other_groups() -> None:
    shapes = ("B1H8S512D64", "B1H8S128D64", "B1H8S1024D64", "B4H16S512D64", "B1H8S512D128")
    shapes += ("B2H8S256D64", "B1H16S256D128")
    assert [c.name for c in cells.cells("small")] == [s + c for s in shapes for c in ("c0", "c1")]
    assert {(c.batch, c.seqlen_kv) for c in cells.cells("decode")} == {
        *((1, 1024), (1, 8192), (1, 65536)),
        *((16, 1024), (16, 8192), (16, 65536)),
        *((128, 1024), (128, 8192)),
    }
    assert all(c.q_shape == (c.batch, 1, 32, 128) for c in cells.cells("decode"))
    assert all(
        c.k_shape == c.v_shape == (c.batch, c.seqlen_kv, 8, 128) for c in cells.cells("decode")
    )
    variants = {c.name: c for c in cells.cells("variants")}
    assert {name: c.window for name, c in variants.items() if c.window != (-1, -1)} == {
        "B2Hq64Hk8S8192D64c1w1024": (1024, 0),
        "B1Hq32Hk8S16384D128c1w4096": (4096, 0),
    }
    assert {c.head_dim for c in variants.values()} == {64, 80, 96, 128, 192}
    assert {c.heads // c.heads_kv for c in variants.values()} == {1, 4, 8}
    three = variants["B4Hq16Hk2S3000D128c1wNone"]
    assert three.q_shape == (4, 3000, 16, 128) and three.k_shape == (4, 3000, 2, 128)
    assert three.causal and not variants["B2Hq16Hk16S6000D96c0wNone"].causal
    assert cells.cells("percall")[0].q_shape == (1, 512, 8, 64)


def test_packed_sequences_are_many_few_and_middling() -> None:
    varlen = cells.cells("varlen")
    assert [c.causal for c in varlen] == [False, True] * 3
    assert [c.lengths for c in varlen[::2]] == [c.lengths for c in varlen[1::2]]
    found = {(c.batch, c.head_dim): c.lengths for c in varlen}
    assert set(found) == {(128, 64), (7, 128), (32, 128)}
    assert 8 <= min(found[128, 64]) < max(found[128, 64]) <= 510
    assert found[7, 128].count(8192) == 1 and sorted(found[7, 128])[-2] <= 2048
    assert 512 <= min(found[32, 128]) < max(found[32, 128]) <= 2048
    for c in varlen:
        assert c.batch == len(c.lengths) and c.seqlen_q == c.seqlen_kv == max(c.lengths)
        assert (
            c.q_shape == c.k_shape == c.v_shape == (sum(c.lengths), 2048 // c.head_dim, c.head_dim)
        )
    assert cells.drawn(5, 1, 9) == cells.drawn(5, 1, 9) and len(set(cells.drawn(50, 1, 9))) == 9


def test_the_backward_cells_are_the_grids_other_dims_grouped_and_packed() -> None:
    found = {c.name: c for c in cells.cells("backward")}
    grid = {c.name: c for c in cells.cells("grid") if c.head_dim < 256}
    assert len(grid) == 24 and len(found) == 42 and all(c.is_backward for c in found.values())
    for name, c in grid.items():
        assert replace(found[name], group="grid") == c and not c.is_backward
        assert found[name].flops == 2.5 * c.flops
    others = [c for name, c in found.items() if name not in grid and not c.lengths]
    of_dims = [c for c in others if c.heads == c.heads_kv]
    assert {(c.head_dim, c.head_dim_v, c.seqlen_q, c.causal) for c in of_dims} == {
        (dim, dim_v, seqlen, causal)
        for dim, dim_v in ((256, 0), (192, 128))
        for seqlen in (2048, 8192)
        for causal in (False, True)
    }
    uneven = found["D192-128S2048c0"]
    assert uneven.q_shape == uneven.k_shape == (8, 2048, 16, 192)
    assert uneven.v_shape == uneven.o_shape == (8, 2048, 16, 128)
    assert uneven.flops == 2.5 * 2 * 8 * 16 * 2048**2 * (192 + 128)
    grouped = [c for c in others if c.heads != c.heads_kv]
    assert {(c.heads, c.heads_kv, c.head_dim, c.seqlen_q, c.causal) for c in grouped} == {
        (heads, 8, 128, 4096, causal) for heads in (32, 64) for causal in (False, True)
    }
    packed = [c for c in found.values() if c.lengths]
    assert [replace(c, group="varlen") for c in packed] == cells.cells("varlen")


def test_the_work_of_packed_sequences_is_that_of_each_alone() -> None:
    lengths = (5, 1, 12)
    sizes = 3, 4, 4, 12, 12, 8
    for causal, pairs in ((False, 25 + 1 + 144), (True, 15 + 1 + 78)):
        cell = Cell("varlen", "x", *sizes, causal, lengths=lengths)
        assert cell.pairs == pairs and cell.flops == 4 * 4 * 8 * pairs
    rows = np.arange(18)
    assert [rows[cell.sequence(b)].tolist() for b in range(3)] == [
        *([0, 1, 2, 3, 4], [5], list(range(6, 18))),
    ]
    dense = replace(cell, lengths=())
    assert dense.q_shape == (3, 12, 4, 8) and dense.sequence(2) == 2


@pytest.mark.parametrize(
    ("name", "us", "rate"),  # published side-by-side figures on an H200
    [
        ("D64S512c0", 260.85, 263.4),
        ("D64S512c1", 225.09, 152.7),
        ("D256S16384c1", 1800.59, 610.6),
        ("B1Hq32Hk8S8192D128c1wNone", 1708.86, 321.7),
        ("B2Hq64Hk8S8192D64c1w1024", 648.61, 397.7),
        ("B1Hq32Hk8S16384D128c1w4096", 1414.66, 680.2),
        ("B1Skv1024Hq32Hk8D128", 15.78, 265.9),
        ("B16Skv65536Hq32Hk8D128", 970.99, 4423.3),
    ],
)
def test_rates_are_counted_as_published_ones(name: str, us: float, rate: float) -> None:
    assert cell_of(name).figure(us) == pytest.approx(rate, rel=1e-3)


def test_visible_pairs_are_those_of_the_mask() -> None:
    for causal in (False, True):
        for window in ((3, 0), (3, 2), (-1, 1), (0, -1)):
            cell = Cell("variants", "x", 1, 1, 1, 9, 14, 8, causal, window)
            at = np.arange(9)[:, None] + 14 - 9
            keys = np.arange(14)[None]
            seen = (window[0] < 0) | (keys >= at - window[0])
            seen &= (window[1] < 0) | (keys <= at + window[1])
            seen &= (keys <= at) | (not causal)
            assert cell.pairs == seen.sum(), (causal, window)


def test_cells_survive_json() -> None:
    for group in cells.GROUPS:
        for cell in cells.cells(group):
            assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def test_results_that_are_kept_are_read() -> None:
    for path in sorted((ROOT / "benchmarks/results").glob("*/peers*.json")):
        report = Report.load(path)
        assert report.ok
        assert all(entry.load is None for row in report.rows for entry in row.entries.values())
        for row, known in zip(report.rows, json.loads(path.read_text())["rows"], strict=True):
            assert row.cell.flops == known["flops"]
            assert row.speedup_to_best() == known["speedup_to_best"]
        told = text_of(tables.report_tables(report))
        for group in {row.cell.group for row in report.rows}:
            count = sum(row.cell.group == group for row in report.rows)
            assert f"geometric mean of {count}" in told


@pytest.mark.parametrize("group", cells.GROUPS)
def test_every_cell_is_compiled_ahead(group: str) -> None:
    for cell in cells.cells(group):
        problem = backends.problem_of(backends.call_of(cell))
        assert problem.window == (cell.window[0], 0 if cell.causal else cell.window[1])
        assert problem.output_shape == cell.o_shape and problem.batch == cell.batch
        assert selector.select(problem, "sm_90a").configs


def test_what_is_compiled_ahead_is_what_a_cell_asks_for() -> None:
    problem = backends.problem_of(backends.call_of(cell_of("D64S512c1")))
    assert (problem.batch, problem.heads_q, problem.seqlen_q) == (32, 32, 512)
    assert problem.causal is True and problem.align_bytes == 16
    assert problem.q.strides == (512 * 32 * 64, 64, 32 * 64)
    assert selector.select(problem, "sm_90a").configs


# --- timing and statistics -----------------------------------------------------------------------


def test_an_entry_has_median_and_spread() -> None:
    entry = Entry.of([10.0, 12.0, 11.0, 90.0, 8.0], note="x")
    assert entry.us == 11.0 and entry.samples == 5 and entry.note == "x"
    assert entry.p10_us == pytest.approx(8.8) and entry.p90_us == pytest.approx(58.8)
    assert entry.spread == pytest.approx(50 / 11)
    assert Entry(reason="no").spread is None


def test_ratios_and_means() -> None:
    entries = {OURS: Entry(2.0), "torch-flash2": Entry(6.0), "torch-cudnn": Entry(3.0)}
    row = Row(cell_of("D64S512c0"), {**entries, "torch-efficient": Entry(reason="cannot")})
    assert row.speedup_to_best() == 1.5 and row.speedup("torch-flash2") == 3.0
    assert row.speedup("torch-efficient") is None
    alone = Row(row.cell, {OURS: Entry(2.0)})
    assert alone.speedup_to_best() is None
    assert geometric_mean([2.0, None, 8.0]) == (pytest.approx(4.0), 2)
    assert geometric_mean([None]) == (None, 0)


def test_backends_take_turns_in_an_order_that_rotates() -> None:
    order: list[str] = []

    def timer(name: str) -> Callable[[], float]:
        def once() -> float:
            order.append(name)
            return float(len(order))

        return once

    found = timing.take_turns({name: timer(name) for name in "abc"}, rounds=4, budget_s=60)
    assert ["".join(order[i : i + 3]) for i in range(6, 18, 3)] == ["abc", "bca", "cab", "abc"]
    assert len(order) == 18 and {entry.samples for entry in found.values()} == {4}
    assert found["a"].us == np.median([7, 12, 14, 16])  # the two rounds before do not count


def test_a_timer_that_raises_drops_out_and_says_why() -> None:
    calls = iter(range(100))

    def breaks() -> float:
        if next(calls) == 4:
            raise RuntimeError("misaligned address\nwith details")
        return 1.0

    found = timing.take_turns({"bad": breaks, "good": lambda: 2.0}, rounds=6, budget_s=60)
    assert found["bad"] == Entry(reason="misaligned address")
    assert found["good"].us == 2.0 and found["good"].samples == 6


def test_rounds_end_when_the_time_is_up() -> None:
    found = timing.take_turns({"a": lambda: 1.0}, rounds=1000, budget_s=0.0)
    assert found["a"].samples == 5


def test_reasons_are_one_line() -> None:
    assert timing.reason_of(RuntimeError("no kernel\nat all")) == "no kernel"
    assert timing.reason_of(KeyError("x")) == "KeyError: 'x'"
    assert timing.reason_of(RuntimeError()) == "RuntimeError: "


def test_torchs_warning_is_the_reason() -> None:
    def run() -> None:
        for text in (
            "Memory efficient kernel not used because: (Triggered internally at x.cpp:1)",
            "Flash attention has been runtime disabled. (Triggered internally at x.cpp:2)",
            "Head dims must be alike (Triggered internally at x.cpp:3)",
        ):
            warnings.warn(text, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    with pytest.raises(RuntimeError, match=r"^Head dims must be alike$"):
        backends.first_result(run, nullcontext)


# --- one row, with stand-ins for the GPU and the backends ----------------------------------------


class FakeGpu:
    torch = None
    l2_bytes = 60 << 20

    def synchronize(self) -> None:
        pass

    def cold(self, run: Callable[[], Any]) -> Callable[[], float]:
        return lambda: float(run())

    def replayed(self, replay: Callable[[], Any], calls: int) -> Callable[[], float]:
        return lambda: float(replay()) / calls

    def from_python(self, run: Callable[[], Any], calls: int, selected: Any) -> Callable[[], float]:
        return lambda: float(run()) * 10


class FakeBackend:
    def __init__(self, name: str, us: float, fails: str = "") -> None:
        self.name, self.us, self.fails = name, us, fails
        self.captured = 0

    def takes(self, cell: Cell) -> bool:
        return bool(cell.lengths) if self.name == VARLEN else True

    def bind(self, cell: Cell, inputs: Any) -> Callable[[], float]:
        self._fail_at("bind")

        def run() -> float:
            self._fail_at("run")
            return self.us

        return run

    def public_call(self, cell: Cell, inputs: Any) -> Callable[[], float]:
        return self.bind(cell, inputs)

    def capture(self, runs: Any) -> Callable[[], float]:
        self._fail_at("capture")
        self.captured = len(runs)
        return lambda: sum(run() for run in runs)

    def selected(self) -> Any:
        return nullcontext()

    def note(self) -> str:
        return f"{self.name}'s kernel"

    def _fail_at(self, place: str) -> None:
        if self.fails == place:
            raise RuntimeError(f"cannot {place}")


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the correctness gate, which lets everything pass."""
    calls: list[Any] = []

    def check(*arguments: Any) -> gate.Judged:
        calls.append(arguments)
        return gate.Judged("fine", {})

    monkeypatch.setattr(measure, "random_inputs", lambda *_: None)
    for of_pass in (gate, gradient_gate):
        monkeypatch.setattr(of_pass, "check", check)
    return calls


def bench_of(*fakes: FakeBackend) -> measure.Bench:
    """The same of both passes."""
    return measure.Bench(FakeGpu(), fakes, rounds=5, backward=fakes)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", cells.GROUPS)
def test_a_failing_backend_leaves_its_reason_and_the_others_their_figures(
    group: str, judged: list[Any]
) -> None:
    cell = cells.cells(group)[0]
    row = bench_of(
        FakeBackend(OURS, 2.0),
        FakeBackend("torch-flash2", 3.0, fails="bind"),
        FakeBackend("torch-cudnn", 4.0),
        FakeBackend("torch-efficient", 5.0, fails="run"),
        FakeBackend(VARLEN, 6.0),
        FakeBackend(FA4, 7.0, fails="capture"),
    ).row(cell)
    assert row.entries["torch-flash2"] == Entry(reason="cannot bind")
    assert row.entries["torch-efficient"] == Entry(reason="cannot run")
    assert row.us("torch-cudnn") == 2 * row.us(OURS) and row.check == "fine"
    assert row.speedup_to_best() == (None if cell.is_backward else 2.0)
    assert row.entries[OURS].note == "ours's kernel"
    assert list(row.entries) == [
        n for n in BACKENDS if n != FLEX and (n != VARLEN or group == "varlen")
    ]
    if group == "percall":
        assert (row.us(OURS), row.entries[OURS].gpu_us) == (20.0, 2.0)
    else:
        assert row.us(OURS) == 2.0
    assert judged[0][3] == 2.0  # ours, beside all that gave a result
    assert judged[0][4].items() >= {"torch-cudnn": 4.0, FA4: 7.0}.items()
    assert "torch-efficient" not in judged[0][4]


def test_a_graph_that_cannot_be_captured_is_a_reason(judged: list[Any]) -> None:
    row = bench_of(FakeBackend(OURS, 2.0), FakeBackend("torch-cudnn", 1.0, fails="capture")).row(
        cells.cells("small")[0]
    )
    assert row.entries["torch-cudnn"] == Entry(reason="cannot capture") and row.us(OURS) == 2.0


def test_decode_rotates_over_three_times_the_l2(judged: list[Any]) -> None:
    for cell in cells.cells("decode"):
        fake = FakeBackend(OURS, 2.0)
        bench_of(fake).row(cell)
        copies = min(fake.captured, -(-3 * FakeGpu.l2_bytes // cell.kv_bytes))
        assert fake.captured >= 8 and fake.captured % copies == 0
        assert copies * cell.kv_bytes >= 3 * FakeGpu.l2_bytes


def test_a_wrong_result_is_not_timed(judged: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: Any) -> str:
        raise gate.WrongResultError("wrong: b=0 h=0")

    monkeypatch.setattr(gate, "check", check)
    row = bench_of(FakeBackend(OURS, 2.0), FakeBackend("torch-cudnn", 4.0)).row(
        cell_of("D64S512c0")
    )
    assert row.us(OURS) is None and "wrong: b=0 h=0" in (row.entries[OURS].reason or "")
    assert row.us("torch-cudnn") == 4.0


def test_a_wrong_peer_is_not_timed(judged: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "check", lambda *_: gate.Judged("fine", {FA4: "wrong: differs"}))
    row = bench_of(FakeBackend(OURS, 2.0), FakeBackend(FA4, 1.0), FakeBackend("torch-cudnn", 4.0))
    found = row.row(cell_of("D64S512c0"))
    assert found.entries[FA4] == Entry(reason="wrong: differs")
    assert found.us(OURS) == 2.0 and found.speedup_to_best() == 2.0


def test_cells_of_gradients_have_backends_and_a_gate_of_their_own(judged: list[Any]) -> None:
    forward, own = FakeBackend(OURS, 2.0), FakeBackend(OURS, 3.0)
    fakes = [own, FakeBackend(OURS_ANY, 2.5), FakeBackend(FA4, 2.0), FakeBackend(FA4_FIXED, 6.0)]
    bench = measure.Bench(FakeGpu(), [forward], 5, None, fakes)  # type: ignore[arg-type,list-item]
    row = bench.row(cells.cells("backward")[0])
    assert (forward.captured, own.captured) == (0, 1) and row.us(OURS) == 3.0
    assert row.speedup_to_best() == row.speedup(FA4) == 2 / 2.5  # no bits are promised
    assert row.speedup_with_bits() == 2.0 and row.speed_kept_with_bits() == 2.5 / 3
    assert judged[0][3] == 3.0 and list(judged[0][4]) == [OURS_ANY, FA4, FA4_FIXED]
    assert bench.row(cell_of("D64S512c0")).us(OURS) == 2.0
    report = Report({}, {}, {}, [row])
    assert report.ok
    report.rows = [replace(row, entries={**row.entries, OURS_ANY: Entry(reason="wrong")})]
    assert not report.ok


@pytest.mark.parametrize("group", ["grid", "variants", "varlen", "blocks", "backward"])
def test_long_calls_are_timed_as_graphs_of_one(group: str, judged: list[Any]) -> None:
    fake = FakeBackend(OURS, 2.0)
    assert bench_of(fake).row(cells.cells(group)[0]).us(OURS) == 2.0
    assert fake.captured == 1 and "graph" in measure.METHODS[group]


class FakeJoules:
    """Everybody takes 1 W per us; who is slower than 3 us is not put under load."""

    method = "replayed for 2 s"

    def loads(self, replays: Any, us: Any, flops: float) -> dict[str, Load]:
        assert replays.keys() == us.keys()
        times = {name: replay() for name, replay in replays.items()}
        return {n: Load(x, x, 1500.0, x * x * 1e6 / flops) for n, x in times.items() if x <= 3}


class FakeGraphs(FakeBackend):
    """Its graphs know what they run, and do not keep it."""

    def capture(self, runs: Any) -> Callable[[], float]:
        held = [weakref.ref(run) for run in runs]

        def replay() -> float:
            assert all(run() is not None for run in held), "replayed on freed memory"
            return self.us

        return replay


def test_load_stands_beside_the_times(judged: list[Any]) -> None:
    fakes = (
        *(FakeGraphs(OURS, 2.0), FakeBackend("torch-flash2", 4.0)),
        *(FakeBackend("torch-cudnn", 2.5, fails="capture"), FakeBackend(FA4, 3.0)),
    )
    bench = measure.Bench(FakeGpu(), fakes, 5, FakeJoules())  # type: ignore[arg-type]
    row = bench.row(cell_of("D64S512c0"))
    ours = row.load(OURS)
    assert ours is not None and ours.pj_per_flop == 4e6 / row.cell.flops
    assert row.load("torch-flash2") is None and row.us("torch-flash2") == 4.0
    assert row.entries["torch-cudnn"] == Entry(reason="cannot capture")
    assert row.energy_to_best() == pytest.approx(9 / 4)
    assert bench.row(cells.cells("small")[0]).load(OURS) is None


def test_energy_has_no_ratio_without_a_peer() -> None:
    load = Load(1.0, 500.0, 1500.0, 1.2)
    cell = cell_of("D64S512c0")
    assert Row(cell, {OURS: Entry(2.0, load=load)}).energy_to_best() is None
    assert Row(cell, {OURS: Entry(2.0), FA4: Entry(2.0, load=load)}).energy_to_best() is None


# --- the correctness gate ------------------------------------------------------------------------


class Tensor(np.ndarray):  # type: ignore[type-arg]
    """As much of a torch tensor as the gate uses."""

    device = "cpu"

    def float(self) -> Tensor:
        return self.astype(np.float64)

    def norm(self) -> Any:
        return np.linalg.norm(np.asarray(self).ravel())


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Cell, backends.Inputs, Any]:
    """Stand-in for torch, a cell with a window and grouped heads, its inputs and right output."""
    torch = SimpleNamespace(isfinite=np.isfinite, as_tensor=lambda rows, device: rows)
    monkeypatch.setattr(gate, "to_numpy", lambda _, x: np.asarray(x))
    cell = Cell("variants", "x", 2, 4, 2, 300, 300, 16, True, (70, 0))
    host = reference.make_inputs(
        "normal", batch=2, heads=4, heads_kv=2, seqlen=300, head_dim=16, dtype="bfloat16"
    )
    got = reference.naive(*host, **cell.rules).view(Tensor)
    inputs = backends.Inputs(*(x.transpose(0, 2, 1, 3).view(Tensor) for x in host))
    return torch, cell, inputs, got


def test_the_gate_passes_what_is_right(result: Any) -> None:
    torch, cell, inputs, got = result
    text, wrong = gate.check(torch, cell, inputs, got, {FA4: got.copy()})
    assert "max error" in text and "differs from fa4 by 0 (relative RMS)" in text and not wrong
    assert gate.check(torch, cell, inputs, got, {}).text.endswith("in sampled rows")


def test_who_differs_from_those_that_agree_is_wrong(result: Any) -> None:
    torch, cell, inputs, got = result
    odd, broken = got * got.dtype.type(1.25), got.copy()
    broken[0, 0, 0, 0] = np.nan
    peers = {"torch-cudnn": odd, FA4: got.copy(), "torch-flash2": broken}
    text, wrong = gate.check(torch, cell, inputs, got, peers)
    assert "differs from fa4 by 0" in text and list(wrong) == ["torch-cudnn", "torch-flash2"]
    assert wrong["torch-cudnn"] == "wrong: differs from ours by 0.2 (relative RMS)"
    with pytest.raises(gate.WrongResultError, match=r"^wrong: differs from torch-cudnn by 0\.2"):
        gate.check(torch, cell, inputs, got, {"torch-cudnn": odd, "torch-flash2": broken})


@pytest.mark.parametrize("row", [0, 128, 299])
def test_the_gate_stops_a_wrong_sampled_row(result: Any, row: int) -> None:
    torch, cell, inputs, got = result
    got[1, 3, row, 5] += got.dtype.type(1)
    with pytest.raises(gate.WrongResultError, match="b=1 h=3"):
        gate.check(torch, cell, inputs, got, {})


@pytest.mark.parametrize(("number", "head"), [(0, 0), (1, 0), (3, 3), (4, 3)])
def test_the_gate_looks_at_the_shortest_and_the_longest_sequence(number: int, head: int) -> None:
    torch = SimpleNamespace(isfinite=np.isfinite, as_tensor=lambda rows, device: rows)
    lengths = (40, 3, 90, 200, 30)
    cell = Cell("varlen", "x", 5, 4, 2, 200, 200, 16, True, lengths=lengths)
    host = reference.make_inputs(
        "normal", batch=1, heads=4, heads_kv=2, seqlen=363, head_dim=16, dtype="bfloat16"
    )
    q, k, v = (x[0].transpose(1, 0, 2) for x in host)
    starts = np.cumsum([0, *lengths])
    right = reference.naive_varlen(q, k, v, starts, starts, causal=True)
    got = right.transpose(1, 0, 2).copy().view(Tensor)
    inputs = backends.Inputs(*(x.view(Tensor) for x in (q, k, v)), starts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "to_numpy", lambda _, x: np.asarray(x))
        assert "max error" in gate.check(torch, cell, inputs, got, {}).text
        got[head, starts[number + 1] - 1, 3] += got.dtype.type(1)
        with pytest.raises(gate.WrongResultError, match=f"b={number} h={head}"):
            gate.check(torch, cell, inputs, got, {})


def test_the_gate_stops_what_the_sample_misses(result: Any) -> None:
    torch, cell, inputs, got = result
    peer = got.copy()
    got[0, 2] *= got.dtype.type(1.25)  # a head that is not sampled
    with pytest.raises(gate.WrongResultError, match="differs from torch-cudnn by"):
        gate.check(torch, cell, inputs, got, {"torch-cudnn": peer})
    got[0, 2, 7, 7] = np.nan
    with pytest.raises(gate.WrongResultError, match="NaN"):
        gate.check(torch, cell, inputs, got, {})


def test_sampled_rows_fit_any_length() -> None:
    assert gate.sample_rows(1).tolist() == [0]
    rows = gate.sample_rows(16384)
    assert {0, 127, 128, 16383} <= set(rows.tolist()) and np.array_equal(rows, np.unique(rows))


# --- tables, pictures, JSON ----------------------------------------------------------------------


def made_up() -> Report:
    """A figure for everything but torch-efficient at head dim 256, and ours once."""
    rows = []
    speeds = dict(zip(BACKENDS, (620.0, 330.0, 600.0, 210.0, 340.0, 250.0, 610.0), strict=True))
    speeds |= {OURS_ANY: 640.0, FLASH2_FIXED: 220.0, FA4_FIXED: 500.0}
    packed = (OURS, "torch-flash2", VARLEN, FA4)
    backward = (OURS, OURS_ANY, FLASH2, CUDNN, FA4, FLASH2_FIXED, FA4_FIXED)
    for group in cells.GROUPS:
        for cell in cells.cells(group):
            entries = {}
            there = packed if cell.lengths else (OURS, *SDPA, FA4)
            there = backward if cell.is_backward else there
            there = (OURS, FLEX) if cell.pattern else there
            for name, speed in ((name, speeds[name]) for name in there):
                rate = speed * min(1.0, 0.4 + cell.seqlen_q / 8192) * (0.8 if cell.causal else 1)
                us = {"GB/s": cell.kv_bytes / 4.2e6, "us": 4 + 4e3 / speed}.get(
                    cell.unit, cell.flops / rate / 1e6
                )
                if cell.unit == "GB/s":
                    us = us * (1 + 300 / speed / cell.batch) + 6
                gpu_us = us / 2 if group == "percall" else None
                is_loaded = group in ("grid", "backward")
                load = Load(us, 690.0, 1480.0, 640 / speed) if is_loaded else None
                shown = {"note": f"{name}'s kernel", "load": load if speed > 500 else None}
                entries[name] = Entry(us, us * 0.98, us * 1.03, 20, gpu_us, **shown)
            if cell.head_dim == 256 and not cell.is_backward:
                entries["torch-efficient"] = Entry(reason="no kernel for head dim 256")
            if (group, cell.name) == ("grid", "D128S512c1"):
                entries[OURS] = Entry(reason="wrong: b=0 h=0")
            rows.append(Row(cell, entries, "max error 0.001 in sampled rows"))
    machine = {"gpu": "NVIDIA H200", "driver": "580", "kernels_digest": "abc", "torch": "2.11"}
    machine["fa4"] = "4.0.0b36"
    methods = {**measure.METHODS, LOAD: "replayed for 2 s"}
    return Report(machine, {"matmul_tflops": 680.0, "copy_gbs": 4262.0}, methods, rows)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "deeper" / "peers.json"
    made_up().save(path)
    return path


def test_a_report_survives_json(saved: Path) -> None:
    assert Report.load(saved) == made_up()
    data = json.loads(saved.read_text())
    assert data["ok"] is False and data["machine"]["kernels_digest"] == "abc"
    first = data["rows"][0]
    assert first["speedup_to_best"] == pytest.approx(620 / 610) and first["flops"] > 1e10
    assert first["energy_to_best"] == pytest.approx(620 / 610)
    assert first["backends"][FA4]["load"] == {
        **{"us": first["backends"][FA4]["us"], "watts": 690.0, "sm_mhz": 1480.0},
        "pj_per_flop": 640 / 610,
    }


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("[]", "{}", "nonsense"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json: not a result of this benchmark"):
            Report.load(path)


def test_the_table_shows_figures_ratios_and_reasons() -> None:
    text = text_of(tables.report_tables(made_up()))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    speeds = [line.split() for line in text.splitlines() if line.startswith("D64S16384c0 ")]
    assert speeds[2][1:13] == [
        *("620", "640", "330", "600", "610", "220", "500"),
        *("1.05", "1.94", "1.24", "0.97", "5.0"),
    ]
    assert speeds[0][1:8] == ["620", "330", "600", "210", "610", "1.02", "1.88"]
    packed = next(line.split() for line in text.splitlines() if line.startswith("N128S8-510D64c0 "))
    assert packed[1:7] == ["286", "152", "157", "281", "1.02", "1.88"]
    assert lines["B1H8S512D64c0"].count("10.5") == 1  # ours, us; the percall row adds brackets
    assert "none [1]" in text and "[1] ours: wrong: b=0 h=0" in text
    assert "torch-efficient: no kernel for head dim 256" in text
    assert "geometric mean of 35" in text and "NVIDIA H200" in text
    assert "matmul 680 TFLOP/s, copy 4262 GB/s" in text and "FlashAttention-4 4.0.0b36" in text
    for group in cells.GROUPS:
        assert measure.METHODS[group] in " ".join(text.split())


def test_the_table_of_a_load_has_speed_power_clock_and_energy() -> None:
    text = text_of(tables.report_tables(made_up()))
    title = "Forward, 16384 tokens, H x D = 2048, under load: TFLOP/s, W, SM MHz, pJ/FLOP"
    shown = text.partition(title)[2].partition("Small problems")[0]
    (line,) = (x for x in shown.splitlines() if x.startswith("D128S16384c0 "))
    expected = "620 690 1480 1.03", "600 690 1480 1.07", "610 690 1480 1.05", "1.02"
    assert line.split()[1:] == " ".join(expected).split()
    headers = " ".join(shown.splitlines()[1:3]).split()
    assert headers == ["vs", "case", "ours", "cudnn", "fa4", "best"]
    assert "replayed for 2 s. The ratio is of energies" in " ".join(shown.split())
    assert "geometric mean of 35" in shown and text.count("under load") == 2
    of_gradients = text.rpartition("under load")[2]
    (line,) = (x for x in of_gradients.splitlines() if x.startswith("D128S16384c0 "))
    assert line.split()[1:4] == ["620", "690", "1.03"] and line.split()[-1] == "1.05"


def test_the_table_fits_a_file() -> None:
    text = text_of(tables.report_tables(made_up()), 110)
    assert max(map(len, text.splitlines())) <= 110
    assert "D256S16384c1" in text and "…" not in text


def test_the_pictures_show_every_backend(saved: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    written = plots.draw(Report.load(saved), tmp_path / "plots")
    names = ["grid_d64.png", "grid_d128.png", "grid_d256.png"]
    names += ["backward_d64.png", "backward_d128.png", "decode.png", "varlen.png"]
    assert [path.name for path in written] == names
    absent = {
        "grid_d256.png": ("torch-efficient", VARLEN, FLEX),
        "varlen.png": ("torch-cudnn", "torch-efficient", FLEX),
        **{f"backward_d{dim}.png": ("torch-efficient", VARLEN, FLEX) for dim in (64, 128)},
    }
    for path in written:
        picture = imread(path)[..., :3]
        for name in BACKENDS:
            drawn = name not in absent.get(path.name, (VARLEN, FLEX))
            color = [int(plots._COLORS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
            seen = int((np.abs(picture - color).max(axis=-1) < 0.01).sum())
            assert (seen > 200) == drawn, (path.name, name, seen)


@pytest.mark.parametrize("group", ["decode", "varlen"])
def test_no_line_runs_through_a_figure_of_the_pictures(group: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    report = made_up()
    draw = {"decode": plots._decode_figure, "varlen": plots._varlen_figure}[group]
    figure = draw(report, report.of_group(group))
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    bars = [bar.get_window_extent() for bar in axes.patches]
    assert len(axes.lines) == (group == "decode")
    assert all(line.get_zorder() < axes.patches[0].get_zorder() for line in axes.lines)
    assert len(axes.texts) == len(bars) > 20
    for label in axes.texts:
        box = label.get_window_extent()
        held = [bar for bar in bars if bar.x0 <= box.x0 and box.x1 <= bar.x1 and box.y1 <= bar.y1]
        behind = label.get_bbox_patch()
        # Inside a bar, which hides the lines, or on white.
        assert held or (behind is not None and behind.get_alpha() is None)


def test_the_pictures_name_problem_and_dtype() -> None:
    report = made_up()
    rows = [row for row in report.of_group("grid") if row.cell.head_dim == 64]
    figure = plots._grid_figure(report, rows)
    assert "head dim 64, bfloat16" in figure.get_suptitle()
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["32 heads, not causal", "32 heads, causal"]
    rows = plots._by_head_dim(report.of_group("backward"))[128]
    gradients = plots._grid_figure(report, rows)
    assert gradients.get_suptitle().startswith("Backward, head dim 128, bfloat16")
    lines = {x.get_label(): x for x in gradients.axes[0].lines}
    ours, free = lines["FlashCore"], lines["FlashCore, in any order"]
    assert ours.get_color() == free.get_color() and free.get_linestyle() == "--"
    assert len(lines) == 8 and len(ours.get_xdata()) == 6  # one is the ceiling
    figure = plots._decode_figure(report, report.of_group("decode"))
    assert "bfloat16" in figure.get_suptitle()
    assert "Hq=32 Hkv=8 D=128" in figure.axes[0].get_title("left")
    varlen = plots._varlen_figure(report, report.of_group("varlen"))
    assert "bfloat16" in varlen.get_suptitle()
    below = [label.get_text() for label in varlen.axes[0].get_xticklabels()]
    assert below[:2] == ["128 of 8 to 503\nD=64", "128 of 8 to 503\nD=64, causal"]


# --- the command lines ---------------------------------------------------------------------------


def run(command: Any, *arguments: str) -> Any:
    return CliRunner().invoke(command, arguments)


def test_a_result_is_drawn_again_without_a_gpu(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    done = run(peers.main, "grid", "--from", str(saved), "--plots", str(folder))
    assert done.exit_code == 1  # ours is wrong in one cell
    assert "D64S512c0" in done.output and "B1H8S512D64c0" not in done.output
    assert sorted(p.name for p in folder.iterdir()) == [
        "grid_d128.png",
        "grid_d256.png",
        "grid_d64.png",
    ]
    assert run(peers.main, "decode", "--from", str(saved)).exit_code == 0


def test_cells_are_chosen_by_name(saved: Path) -> None:
    done = run(peers.main, "grid", "--from", str(saved), "--cells", "D256*c1")
    assert done.exit_code == 0, done.output
    assert "D256S512c1" in done.output and "geometric mean of 6" in done.output
    assert "D256S512c0" not in done.output and "D64S512c1" not in done.output
    none = run(peers.main, "small", "--from", str(saved), "--cells", "D256*")
    assert none.exit_code == 1 and "small has no cell whose name matches D256*" in none.output


@pytest.mark.parametrize("seconds", [None, 2.0])
def test_what_a_run_measures_is_what_was_asked_for(
    seconds: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, judged: list[Any]
) -> None:
    class Gpu(FakeGpu):
        bus_id = "0000:1B:00.0"
        ceilings = staticmethod(lambda: {"matmul_tflops": 680.0})
        machine = staticmethod(lambda: {"gpu": "NVIDIA H100"})

        def __init__(self, torch: Any) -> None:
            pass

    class Timed(FakeJoules):
        def __init__(self, gpu: Any, meter: Any, asked: float) -> None:
            assert (meter, asked) == (Gpu.bus_id, 2.0)

    fa4 = FakeBackend(FA4, 3.0)
    fa4.version = "4.0.0b36"  # type: ignore[attr-defined]
    compiled: list[Any] = []
    monkeypatch.setattr(peers, "Gpu", Gpu)
    monkeypatch.setattr(peers, "Joules", Timed)
    monkeypatch.setattr(peers, "meter_of", lambda bus_id: bus_id)
    monkeypatch.setattr(backends, "require_torch", lambda: None)
    monkeypatch.setattr(backends, "compile_ahead", lambda calls, _: compiled.extend(calls))
    monkeypatch.setattr(backends, "Ours", lambda torch, kernel: FakeBackend(OURS, 2.0))
    monkeypatch.setattr(backends, "torchs", lambda torch: [FakeBackend("torch-cudnn", 4.0)])
    monkeypatch.setattr(backends, "FlashAttention4", lambda torch: fa4)
    monkeypatch.setattr(peers.backward, "compared", lambda torch, kernel: [])
    path = tmp_path / "peers.json"
    asked = ["varlen", "--cells", "N7*", "--json", str(path), "--rounds", "5"]
    done = run(peers.main, *asked, *([] if seconds is None else ["--joules", str(seconds)]))
    assert done.exit_code == 0, done.output
    report = Report.load(path)
    assert [row.cell.name for row in report.rows] == ["N7S64-8192D128c0", "N7S64-8192D128c1"]
    assert len(compiled) == 2 and report.machine["fa4"] == "4.0.0b36"
    assert set(report.methods) == {"varlen", *([] if seconds is None else [LOAD])}
    assert [row.speedup_to_best() for row in report.rows] == [1.5, 1.5]
    assert all((row.load(FA4) is None) == (seconds is None) for row in report.rows)


def test_a_wrong_file_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    for command in (peers.main, errors.main):
        done = run(command, "--from", str(path))
        assert done.exit_code == 1 and "not a result of this benchmark" in done.output
        assert "Traceback" not in done.output


@pytest.mark.parametrize("command", [peers.main, errors.main], ids=["peers", "errors"])
def test_without_torch_the_cure_is_told(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ImportError
    done = run(command)
    assert done.exit_code == 1
    assert "torch is missing" in done.output and "pip install torch" in done.output


def test_without_a_gpu_torch_is_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no GPU"):
        backends.require_torch()


def test_torch_is_imported_nowhere_else() -> None:
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert "import torch" not in path.read_text(), path


# --- errors --------------------------------------------------------------------------------------


def test_the_error_cases_cover_what_torch_can_express() -> None:
    found = error_cases.cases()
    assert 60 <= len(found) <= 100 and len({case.name for case in found}) == len(found)
    for dtype in ("float16", "bfloat16", "float32"):
        some = [case for case in found if case.dtype == dtype]
        assert {case.head_dim for case in some} == {32, 64, 96, 128, 192, 256}
        assert {case.kind for case in some} == {"normal", "outliers", "large"}
        for name in ("causal", "mask", "bias", "scale"):
            assert any(getattr(case, name) for case in some), (dtype, name)
        assert any(case.heads_kv < case.heads for case in some)
        assert any(case.seqlen_q % 16 for case in some)
    assert max(max(case.seqlen_q, case.seqlen_kv) for case in found) <= 1024


def test_a_case_is_the_attention_that_torch_is_asked_for() -> None:
    masked = error_cases.Case(
        "float32", 8, 5, 7, heads=2, heads_kv=2, batch=1, mask=True, scale=0.3
    )
    biased = replace(masked, mask=False, bias=True)
    top_left = replace(masked, mask=False, causal=True)
    for case in (masked, biased, top_left):
        q, k, v = case.arrays()
        scores = 0.3 * q.astype(float) @ k.astype(float).swapaxes(-1, -2)
        seen = np.tri(5, 7, dtype=bool) if case.causal else np.ones((5, 7), bool)
        scores += case.operands().get("bias", 0.0)
        seen = seen & case.operands().get("mask", True)
        p = np.where(seen, np.exp(scores), 0)
        expected = p @ v.astype(float) / p.sum(-1, keepdims=True)
        assert np.abs(errors.oracle(case) - expected).max() < 1e-12
    assert masked.operands()["mask"].any(axis=-1).all()
    assert biased.operands()["bias"].dtype == np.float32


def test_errors_are_measured() -> None:
    expected = np.zeros((1, 1, 2, 2))
    found = errors.errors(np.array([[[[0.0, 3.0], [-4.0, 0.0]]]], np.float32), expected)
    assert found == {"max": 4.0, "mean": 1.75, "rms": 2.5}
    odd = errors.errors(np.array([[[[np.nan, 0], [np.inf, 0]]]]), expected)
    assert odd == {"reason": "2 values are NaN or infinite"}


def test_the_error_table(tmp_path: Path) -> None:
    rows = []
    for number, case in enumerate(error_cases.cases()):
        found = {name: {"max": 4e-3, "mean": 1e-4, "rms": 2e-4} for name in (errors.TORCH, *SDPA)}
        found[OURS] = {"max": 1e-3, "mean": 1e-4, "rms": 1e-4 * (1 + number % 2 * 3)}
        if case.dtype == "float32":
            found["torch-flash2"] = {"reason": "half precision alone"}
        rows.append({**case.to_json(), "backends": found, "torch_chose": "torch-cudnn"})
    means = {m: geometric_mean(errors.ratio(row, m) for row in rows)[0] for m in ("rms", "max")}
    assert means == {"rms": pytest.approx(1.0), "max": pytest.approx(0.25)}
    machine = {"gpu": "NVIDIA H200"}
    path = tmp_path / "errors.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows, "ours_by_torch": means}))
    done = run(errors.main, "--from", str(path))
    assert done.exit_code == 0, done.output
    line = next(x for x in done.output.splitlines() if x.startswith("fp16 D32 S512  "))
    assert line.split()[3:5] == ["1.0e-3", "1.0e-4"] and line.split()[-1] == "cudnn"
    assert line.split()[-3:-1] == ["0.50", "0.25"]
    assert "torch-flash2: half precision alone" in done.output
    assert max(map(len, done.output.splitlines())) <= 110
    rows[0]["backends"][OURS] = {"reason": "1 values are NaN or infinite"}
    path.write_text(json.dumps({"machine": machine, "rows": rows, "ours_by_torch": means}))
    assert run(errors.main, "--from", str(path)).exit_code == 1


def test_error_results_are_kept_by_gpu() -> None:
    assert errors.default_path("NVIDIA H200") == ROOT / "benchmarks/results/h200/errors.json"


@pytest.mark.parametrize(("kernel", "built"), [("auto", "wgmma_sm90"), ("mma_sm80", "mma_sm80")])
def test_what_is_compiled_ahead_is_of_the_kernel_that_is_measured(
    monkeypatch: pytest.MonkeyPatch, kernel: str, built: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(backends.compiler, "device_arch", lambda: "sm_90a")
    monkeypatch.setattr(backends.builds, "build_each", lambda jobs, on_done: asked.extend(jobs))
    wanted = cells.cells("grid")
    backends.compile_ahead([backends.call_of(cell, kernel) for cell in wanted])
    assert asked and {config.kernel for config, _ in asked} == {built}
    assert {arch for _, arch in asked} == {"sm_90a"}


@pytest.mark.parametrize("kernel", ["auto", "bwd_sm80"])
def test_gradients_are_compiled_ahead_with_what_they_start_from(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """All that a cell's plans launch, each bound here to arrays of its own."""
    asked: list[Any] = []
    monkeypatch.setattr(backends.compiler, "device_arch", lambda: "sm_90a")
    monkeypatch.setattr(backends.builds, "build_each", lambda jobs, on_done: asked.extend(jobs))
    wanted = [cell for cell in cells.cells("backward") if cell.seqlen_q in (512, 2048, 503)]
    assert len({(c.head_dim, c.heads_kv, bool(c.lengths)) for c in wanted}) == 5
    backends.compile_ahead([backends.call_of(cell, kernel) for cell in wanted])
    built = {config for config, _ in asked}
    hopper = {*BACKWARD_KERNELS} - {"bwd_sm80"}  # no cell is left to it
    names = hopper if kernel == "auto" else {kernel}
    assert {config.kernel for config in built} == {"wgmma_sm90", *names}
    for cell in wanted:
        few = replace(cell, lengths=cell.lengths[:1]) if cell.lengths else replace(cell, batch=1)
        shapes = few.q_shape, few.k_shape, few.v_shape
        q, k, v = (np.zeros(shape, ml_dtypes.bfloat16) for shape in shapes)
        o = np.zeros(few.o_shape, q.dtype)
        lse = np.zeros((*few.q_shape[:-3], few.heads, few.q_shape[-3]), np.float32)
        rules: dict[str, Any] = {"layout": "bshd", **few.rules}
        if few.lengths:
            starts = np.array([0, *few.lengths], np.int32)
            rules |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        given = {"do": o, "q": q, "k": k, "v": v, "o": o.copy(), "lse": lse}
        for deterministic in (True, False):
            chosen = {"kernel": kernel, "deterministic": deterministic}
            bound = emulated_backward(given, "sm_90a", **rules, **chosen)
            assert built >= set(bound.selection.configs), few.name


def test_a_kernel_is_of_its_pass() -> None:
    assert peers._of_pass("bwd_sm80", is_backward=True) == "bwd_sm80"
    assert peers._of_pass("bwd_sm80", is_backward=False) == "auto"
    assert peers._of_pass("mma_sm80", is_backward=True) == "auto"
    assert peers._of_pass("mma_sm80", is_backward=False) == "mma_sm80"


@pytest.mark.parametrize("name", patterns.PATTERNS)
def test_pairs_of_a_pattern_are_those_that_its_rule_lets_see(name: str) -> None:
    seqlen = 5000
    at = np.arange(seqlen)
    seen = patterns.for_numpy(name, seqlen)["mask_mod"](0, 0, at[:, None], at[None, :])
    assert patterns.pairs(name, seqlen) == np.broadcast_to(seen, (seqlen, seqlen)).sum()
