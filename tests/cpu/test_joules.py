"""Energy under load, on a GPU, a clock and meters that are made up."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from side_by_side import joules
from side_by_side.joules import Joules, NvidiaSmi, Nvml, meter_of

BUS = "0000:1B:00.0"
WATTS = {"ours": 690.0, "fa4": 650.0, "torch-flash2": 400.0}
US = {"ours": 2000.0, "fa4": 2500.0, "torch-flash2": 4000.0}
STEP_S = 0.1
IDLE_W = 70.0


class World:
    """Virtual time, in which one GPU works through what is enqueued."""

    def __init__(self) -> None:
        self.now = 0.0
        self.work: list[tuple[float, str]] = []  # when each call ends, and whose it is
        self.joules = 0.0
        self.counted = 0.0  # what the counter shows: it moves every STEP_S
        self.idle_s = 0.0
        self.started: list[str] = []
        self.torch = SimpleNamespace(cuda=SimpleNamespace(Event=lambda: Event(self)))

    def sleep(self, seconds: float) -> None:
        """Let time pass, a millisecond at a time."""
        for _ in range(round(seconds * 1e3)):
            before, self.now = self.now, self.now + 1e-3
            while self.work and self.work[0][0] <= self.now:
                self.work.pop(0)
            self.joules += 1e-3 * (WATTS[self.work[0][1]] if self.work else IDLE_W)
            self.idle_s += 0.0 if self.work else 1e-3
            if int(before / STEP_S) != int(self.now / STEP_S):
                self.counted = self.joules

    def replay_of(self, name: str) -> Callable[[], None]:
        def replay() -> None:
            if self.started[-1:] != [name]:
                self.started.append(name)
            begins = max(self.now, self.work[-1][0] if self.work else 0.0)
            self.work.append((begins + US[name] * 1e-6, name))

        return replay

    def synchronize(self) -> None:
        while self.work:
            self.sleep(1e-3)


class Event:
    def __init__(self, world: World) -> None:
        self.world, self.at = world, 0.0

    def record(self) -> None:
        self.at = self.world.work[-1][0]

    def query(self) -> bool:
        return self.world.now >= self.at


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    clock = SimpleNamespace(perf_counter=lambda: made.now, sleep=made.sleep)
    monkeypatch.setattr(joules, "time", clock)
    return made


def fake_nvml(world: World, **changes: Any) -> SimpleNamespace:
    def handle(bus_id: str) -> str:
        assert bus_id == BUS
        return "handle"

    def clock(device: str, kind: int) -> int:
        assert (device, kind) == ("handle", 1)
        return 1400 + 100 * int(world.now * 1000 % 2)

    calls = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByPciBusId": handle,
        "nvmlDeviceGetTotalEnergyConsumption": lambda device: round(world.counted * 1e3),
        "nvmlDeviceGetClockInfo": clock,
        "NVML_CLOCK_SM": 1,
    }
    return SimpleNamespace(**{**calls, **changes})


def fail(*_: Any) -> Any:
    raise LookupError("Not Supported")


def test_load_is_measured_in_turns_and_without_a_pause(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(world))  # type: ignore[arg-type]
    bench = Joules(world, meter_of(BUS), 4.0)  # type: ignore[arg-type]
    replays = {name: world.replay_of(name) for name in US}
    loads = bench.loads(replays, US, flops=1e12)
    assert world.started == ["ours", "fa4", "ours"]  # there, and back; the slow one is left out
    assert list(loads) == ["ours", "fa4"]
    for name, load in loads.items():
        assert load.us == pytest.approx(US[name], rel=0.01)
        assert load.watts == pytest.approx(WATTS[name], rel=0.01)
        assert 1400 <= load.sm_mhz <= 1500
        assert load.pj_per_flop == pytest.approx(WATTS[name] * US[name] * 1e-6, rel=0.01)
    assert 4 * (2.0 + 1.0) <= world.now <= 4 * (2.0 + 1.0 + 0.3)
    assert world.idle_s < 0.01
    assert "4 s, in 2 turns" in bench.method and "NVML's energy counter" in bench.method


def test_a_counter_that_stands_still_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    still = fake_nvml(world, nvmlDeviceGetTotalEnergyConsumption=lambda device: 5)
    monkeypatch.setitem(sys.modules, "pynvml", still)  # type: ignore[arg-type]
    bench = Joules(world, Nvml(BUS), 1.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not move; give it more seconds"):
        bench.loads({"ours": world.replay_of("ours")}, {"ours": 2000.0}, 1e12)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts an nvidia-smi into PATH that tells a line; returns where it writes what it is asked."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def put(line: str) -> Path:
        asked, script = tmp_path / "asked", tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\necho "$*" >> {asked}\n'
            f'case "$*" in *-lms*) while :; do echo "{line}"; sleep 0.02; done;; esac\n'
            f'echo "{line}"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return asked

    return put


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_nvidia_smi_stands_in_for_nvml(smi: Callable[[str], Path]) -> None:
    import time

    asked = smi("651.50, 1480")
    meter = meter_of(BUS)
    assert isinstance(meter, NvidiaSmi)
    meter.start()
    time.sleep(0.3)
    meter.look()
    assert meter.stop() == (651.5, 1480.0)
    first, second = asked.read_text().splitlines()
    assert first.split()[:3] == ["-i", BUS, "--query-gpu=power.draw,clocks.sm"]
    assert second.startswith(first) and second.endswith("-lms 100")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_no_power_is_one_message_of_both(smi: Callable[[str], Path]) -> None:
    smi("[N/A], 1480")
    with pytest.raises(RuntimeError) as caught:
        meter_of(BUS)
    told = str(caught.value)
    assert "pip install nvidia-ml-py" in told and "pynvml" in told
    assert "nvidia-smi told '[N/A], 1480', no power" in told


def test_without_nvml_and_nvidia_smi_there_is_no_meter(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = fake_nvml(world, nvmlDeviceGetTotalEnergyConsumption=fail)
    monkeypatch.setitem(sys.modules, "pynvml", old)  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"power cannot be read.*Not Supported.*nvidia-smi"):
        meter_of(BUS)


def test_lines_that_are_cut_off_do_not_count() -> None:
    meter = NvidiaSmi.__new__(NvidiaSmi)
    assert meter._means("600.0, 1400\n700.0, 1500\n70") == (650.0, 1450.0)
    with pytest.raises(RuntimeError, match="told nothing; give it more seconds"):
        meter._means("70")
