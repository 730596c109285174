"""Timers on one GPU, and rounds in which all backends take turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from flashcore_cupy.check import machine
from flashcore_cupy.jit import compiler
from side_by_side.results import Entry

#: Microseconds per call, once.
Timer = Callable[[], float]

_WARMUP = 2
_FEWEST_ROUNDS = 5
#: The flush also keeps the GPU busy while Python enqueues what is timed: 0.1 ms on an H200.
FLUSH_BYTES = 512 << 20


def take_turns(timers: Mapping[str, Timer], rounds: int, budget_s: float = 1.5) -> dict[str, Entry]:
    """Call every timer once per round, in an order that rotates, and summarise each.

    Clocks, heat and neighbours then meet all alike. Rounds end early where the time is up. A timer
    that raises drops out, and its entry says why.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    failed: dict[str, Entry] = {}
    start = time.perf_counter()
    for number in range(-_WARMUP, rounds):
        names = [name for name in timers if name not in failed]
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            try:
                us = timers[name]()
            except Exception as error:
                failed[name] = Entry(reason=reason_of(error))
                continue
            if number >= 0:
                samples[name].append(us)
        if number + 1 >= _FEWEST_ROUNDS and time.perf_counter() - start > budget_s:
            break
    return {name: failed.get(name) or Entry.of(samples[name]) for name in timers}


def reason_of(error: BaseException) -> str:
    """First line of an error's message, with its kind where the message alone says little."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, NotImplementedError | ValueError | RuntimeError) and text:
        return text[:300]
    return f"{type(error).__name__}: {text}"[:300]


class Gpu:
    """The current device through torch: events, a buffer to flush the L2 with, ceilings.

    torch's and CuPy's current streams are both the default one, so that events of one time
    launches of the other.
    """

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    @property
    def l2_bytes(self) -> int:
        """Size of the L2 cache."""
        return int(self.properties.L2_cache_size)

    @property
    def bus_id(self) -> str:
        """The GPU's PCI address, which tells it from others outside this process."""
        import cupy

        return str(cupy.cuda.Device().pci_bus_id)

    def machine(self) -> dict[str, Any]:
        """``bench.machine`` with torch's versions and the GPU's own figures."""
        torch = self.torch
        return {
            **machine.machine(compiler.device_arch()).to_json(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "multiprocessors": self.properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
        }

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        self.torch.cuda.synchronize()

    def elapsed_us(self, before: Callable[[], Any], timed: Callable[[], Any]) -> float:
        """GPU time of what ``timed`` enqueues, right behind what ``before`` enqueues."""
        event = self.torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        before()
        start.record()
        timed()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def cold(self, run: Callable[[], Any], selected: Any = contextlib.nullcontext) -> Timer:
        """A timer of one call with the L2 flushed; ``selected()`` is entered around it."""

        def timer() -> float:
            with selected():
                return self.elapsed_us(self._flushed.zero_, run)

        return timer

    def replayed(self, replay: Callable[[], Any], calls: int) -> Timer:
        """A timer of a graph of ``calls`` calls, behind another replay of it."""
        return lambda: self.elapsed_us(replay, replay) / calls

    def from_python(
        self, run: Callable[[], Any], calls: int, selected: Any = contextlib.nullcontext
    ) -> Timer:
        """A timer of ``calls`` calls as Python sees them, the GPU's work included."""

        def timer() -> float:
            with selected():
                self.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                self.synchronize()
                return (time.perf_counter() - start) * 1e6 / calls

        return timer

    def ceilings(self) -> dict[str, float]:
        """Rates of a large bfloat16 matrix product and of a large copy, read and written bytes."""
        torch = self.torch
        x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in "xy")
        to, source = (torch.zeros(1 << 30, dtype=torch.int8, device="cuda") for _ in "ts")
        timers = {
            "matmul": self.cold(lambda: x @ y),
            "copy": self.cold(lambda: to.copy_(source)),
        }
        found = take_turns(timers, 10)
        rates = {"matmul": ("matmul_tflops", 2 * 8192**3 / 1e6), "copy": ("copy_gbs", 2**31 / 1e3)}
        return {
            key: work / us
            for name, (key, work) in rates.items()
            if (us := found[name].us) is not None
        }
