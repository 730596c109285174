"""Speed, power and clock of a backend that runs for seconds without a pause.

Long problems run at the GPU's power limit. What counts there is energy, and a short burst from a
cool start is faster than what lasts.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from side_by_side.results import Load
from side_by_side.timing import Gpu

#: Of the fastest backend's time: who takes longer is not put under load.
_CONTENDS = 1.5
#: Clocks and heat settle, and nvidia-smi's average over a second has seen nothing else.
_SETTLE_S = 1.0
_BATCH_US = 50_000
_POLL_S = 0.005
_TURNS = 2
_SMI_MS = 100


class Meter(Protocol):
    """Reads one GPU's power and clock."""

    name: str

    def start(self) -> None:
        """Begin."""

    def look(self) -> None:
        """Called every few milliseconds."""

    def stop(self) -> tuple[float, float]:
        """Mean watts and SM MHz since ``start``. Raises ``RuntimeError`` if there are none."""


class _Sample(NamedTuple):
    seconds: float
    millijoules: int
    mhz: int


class Nvml:
    """By the driver's counter of energy, through nvidia-ml-py."""

    name = "NVML's energy counter"

    def __init__(self, bus_id: str) -> None:
        self._nvml = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._device = self._nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        self._samples: list[_Sample] = []
        self.look()  # raises where a GPU or a driver has no such counter

    def start(self) -> None:
        """Begin."""
        self._samples.clear()

    def look(self) -> None:
        """Read counter and clock."""
        energy = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        mhz = self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM)
        self._samples.append(_Sample(time.perf_counter(), energy, mhz))

    def stop(self) -> tuple[float, float]:
        """Mean watts and SM MHz, between the counter's first step and its last."""
        pairs = itertools.pairwise(self._samples)
        steps = [after for before, after in pairs if after.millijoules != before.millijoules]
        if len(steps) < 2:
            raise RuntimeError(f"{self.name} does not move; give it more seconds")
        first, last = steps[0], steps[-1]
        watts = (last.millijoules - first.millijoules) / 1e3 / (last.seconds - first.seconds)
        return watts, statistics.mean(sample.mhz for sample in self._samples)


class NvidiaSmi:
    """By nvidia-smi's samples of the power draw."""

    name = "nvidia-smi's power.draw"

    def __init__(self, bus_id: str) -> None:
        query = "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"
        self._command = ["nvidia-smi", "-i", bus_id, *query]
        self._process: subprocess.Popen[str] | None = None
        done = subprocess.run(self._command, capture_output=True, text=True, check=True)
        self._means(done.stdout)

    def start(self) -> None:
        """Begin."""
        command = [*self._command, "-lms", str(_SMI_MS)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def look(self) -> None:
        """Nothing: it samples by itself."""

    def stop(self) -> tuple[float, float]:
        """Mean watts and SM MHz of the samples."""
        assert self._process is not None
        self._process.terminate()
        return self._means(self._process.communicate()[0])

    def _means(self, text: str) -> tuple[float, float]:
        """Of whole lines "power, clock"; the last may be cut off."""
        lines = [line.split(",") for line in text.splitlines(keepends=True) if line.endswith("\n")]
        try:
            samples = [(float(watts), float(mhz)) for watts, mhz in lines]
        except ValueError:
            raise RuntimeError(f"nvidia-smi told {text.strip()[:60]!r}, no power") from None
        if not samples:
            raise RuntimeError("nvidia-smi told nothing; give it more seconds")
        watts, mhz = zip(*samples, strict=True)
        return statistics.mean(watts), statistics.mean(mhz)


def meter_of(bus_id: str) -> Meter:
    """A meter that works, of the GPU at a PCI address. Raises ``RuntimeError`` if none does."""
    failed = []
    for kind in (Nvml, NvidiaSmi):
        try:
            return kind(bus_id)
        except Exception as error:  # nvidia-ml-py's are its own
            failed.append(f"{kind.name}: {error}")
    raise RuntimeError(
        "power cannot be read, neither through nvidia-ml-py (pip install nvidia-ml-py) nor by "
        f"nvidia-smi ({'; '.join(failed)})"
    )


class Joules:
    """Puts backends under load, ``seconds`` each, in turns."""

    def __init__(self, gpu: Gpu, meter: Meter, seconds: float) -> None:
        self._gpu = gpu
        self._meter = meter
        self._seconds = seconds

    @property
    def method(self) -> str:
        """How it is measured; stands in the results."""
        return (
            f"replayed without a pause for {self._seconds:g} s, in {_TURNS} turns, back in reverse "
            f"order, each after {_SETTLE_S:g} s that do not count; power by {self._meter.name}"
        )

    def loads(
        self, replays: Mapping[str, Callable[[], Any]], us: Mapping[str, float], flops: float
    ) -> dict[str, Load]:
        """What each backend does under load, but for slow ones.

        ``replays`` enqueue a call of ``flops`` operations, which takes about ``us``.
        """
        names = [name for name in replays if us[name] <= _CONTENDS * min(us.values())]
        turns: dict[str, list[Load]] = {name: [] for name in names}
        for name in (*names, *reversed(names)):
            turns[name].append(self._turn(replays[name], us[name], flops))
        return {name: _mean(both) for name, both in turns.items()}

    def _turn(self, replay: Callable[[], Any], us: float, flops: float) -> Load:
        calls, seconds = max(1, round(_BATCH_US / us)), self._seconds / _TURNS
        batches = self._batches(replay, calls)
        settled = time.perf_counter() + _SETTLE_S
        while time.perf_counter() < settled:
            next(batches)
        self._meter.start()
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(batches)
            done += calls
        us = (time.perf_counter() - start) * 1e6 / done
        watts, mhz = self._meter.stop()
        self._gpu.synchronize()
        return Load(us, watts, mhz, watts * us * 1e6 / flops)

    def _batches(self, replay: Callable[[], Any], calls: int) -> Iterator[None]:
        """Yield whenever a batch of calls is done; the next is under way by then."""

        def enqueue() -> Any:
            for _ in range(calls):
                replay()
            event = self._gpu.torch.cuda.Event()
            event.record()
            return event

        running = enqueue()
        while True:
            following = enqueue()
            while not running.query():
                self._meter.look()
                time.sleep(_POLL_S)
            yield
            running = following


def _mean(loads: list[Load]) -> Load:
    fields = zip(*((x.us, x.watts, x.sm_mhz, x.pj_per_flop) for x in loads), strict=True)
    return Load(*map(statistics.mean, fields))
