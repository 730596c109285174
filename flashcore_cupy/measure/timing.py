"""Inputs, latency and peak rate: what `run` and `ladder` measure, and on which machine."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flashcore_cupy.select.backward_plan import BackwardPlan
    from flashcore_cupy.select.plan import Plan

#: A timed sample is at least this long, so that the clock's resolution does not show.
_SAMPLE_US = 1000.0
_MOST_LAUNCHES = 500
#: Sampling stops after this long, even if fewer samples than asked for were taken.
_BUDGET_S = 4.0
_FEWEST_SAMPLES = 3
#: A call this long warms itself up, and its clock's jitter does not show: one sample will do.
_LONG_US = 1e6

#: Dense fp16 tensor-core FLOP per clock and SM, products accumulated in fp32, by capability (CUDA
#: C++ Programming Guide and the architectures' white papers). GeForce boards of 8.6, 8.9 and 12.0
#: run at half of this.
_TENSOR_FLOP = {75: 1024, 80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024}
#: fp32 FLOP per clock and SM outside the tensor cores.
_FP32_FLOP = {75: 128, 80: 128, 86: 256, 89: 256, 90: 256, 100: 256, 103: 256, 120: 256}


@dataclass(frozen=True)
class Peak:
    """A GPU's arithmetic rate as its data sheet would compute it; nothing measured."""

    tflops: float
    formula: str

    def to_json(self) -> dict[str, Any]:
        """Return both fields."""
        return asdict(self)


def peak(dtype: str) -> Peak | None:
    """The current device's dense rate for ``dtype``; None for a GPU that is not in the table."""
    import cupy

    device = cupy.cuda.Device()
    attributes = device.attributes
    return peak_of(
        dtype,
        int(device.compute_capability),
        int(attributes["MultiProcessorCount"]),
        int(attributes.get("ClockRate", 0)) * 1e3,
    )


def peak_of(dtype: str, capability: int, multiprocessors: int, clock_hz: float) -> Peak | None:
    """Multiprocessors x clock x FLOP per clock; fp32 without, the others with tensor cores."""
    table, unit = (_FP32_FLOP, "fp32") if dtype == "float32" else (_TENSOR_FLOP, "tensor")
    flop = table.get(capability)
    if flop is None or clock_hz <= 0:
        return None
    formula = f"{multiprocessors} SMs x {clock_hz / 1e9:.2f} GHz x {flop} {unit} FLOP/clock"
    return Peak(multiprocessors * clock_hz * flop / 1e12, formula)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: over ``samples`` samples, each the mean of ``per_sample`` calls."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    per_sample: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are."""
        return asdict(self)


def _summary(sample_us: list[float], per_sample: int) -> Timing:
    p10, median, p90 = np.percentile(np.array(sample_us) / per_sample, [10, 50, 90])
    return Timing(float(median), float(p10), float(p90), len(sample_us), per_sample)


def _per_sample(once_us: float) -> int:
    return int(min(_MOST_LAUNCHES, max(1, np.ceil(_SAMPLE_US / max(once_us, 1e-3)))))


def _sample(measure: Callable[[], float], iters: int, warmup: int, once_us: float) -> list[float]:
    """``iters`` measurements after ``warmup`` ones, or fewer of each where the time runs out."""
    long = once_us >= _LONG_US
    start = time.perf_counter()
    for _ in range(0 if long else warmup):
        measure()
        if time.perf_counter() - start > _BUDGET_S / 4:
            break
    samples: list[float] = []
    while len(samples) < iters:
        samples.append(measure())
        enough = long or len(samples) >= _FEWEST_SAMPLES
        if enough and time.perf_counter() - start > _BUDGET_S:
            break
    return samples


def time_graph(plan: Plan | BackwardPlan, *, iters: int = 100, warmup: int = 10) -> Timing:
    """Time ``plan.launch()`` on the GPU: a CUDA graph of many launches, replayed.

    No Python and no launch call stands between the launches. The inputs stay the same, so that what
    fits into the L2 cache comes from there. ``iters`` replays are timed after ``warmup`` others.
    """
    import cupy

    cupy.cuda.Device().synchronize()  # the inputs come from another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        once = _elapsed_us(plan.launch, stream)
        for _ in range(2 if once < _LONG_US else 0):
            once = _elapsed_us(plan.launch, stream)
        launches = _per_sample(once)
        stream.begin_capture()
        for _ in range(launches):
            plan.launch()
        graph = stream.end_capture()
        replay = lambda: _elapsed_us(lambda: graph.launch(stream), stream)  # noqa: E731
        samples = _sample(replay, iters, warmup, once)
    cupy.cuda.Device().synchronize()
    return _summary(samples, launches)


def _elapsed_us(enqueue: Callable[[], None], stream: Any) -> float:
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    enqueue()
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) * 1e3


def time_calls(
    call: Callable[[], Any],
    *,
    synchronize: Callable[[], None] = lambda: None,
    iters: int = 100,
    warmup: int = 10,
    first_us: float | None = None,
) -> Timing:
    """Time ``call()`` as Python sees it: batches of calls with one ``synchronize()`` at their end.

    ``iters`` batches are timed after ``warmup`` others. ``first_us``: what the first call took, if
    it was made before.
    """

    def batch(calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - start) * 1e6

    once = batch(1) if first_us is None else first_us
    if once < _LONG_US:  # without whatever a first call does besides
        once = batch(1)
    calls = _per_sample(once)
    return _summary(_sample(lambda: batch(calls), iters, warmup, once), calls)


def free_memory() -> int | None:
    """Bytes of memory that this machine can still give, as far as it says; else None."""
    limits = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError):
        told = Path("/proc/meminfo").read_text(encoding="ascii")
        limits += [int(kib) * 1024 for kib in re.findall(r"MemAvailable: *(\d+) kB", told)]
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(limits, default=None)
