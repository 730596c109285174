"""What tests of several modules share: where they are, what can run here, sources of their own."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

# NumPy and the package are imported inside: conftest.py decides first with how many threads, and
# which one is tested.

T = TypeVar("T")

#: The checkout, or the unpacked source distribution, that these tests belong to.
ROOT = Path(__file__).resolve().parent.parent
PROBES = sorted((ROOT / "tests" / "probes").glob("*.cu"))


@functools.cache
def gpu_skip_reason() -> str | None:
    """Why tests below ``tests/gpu`` cannot run here; None if they can."""
    from flashcore_cupy.jit.compiler import no_gpu_reason

    return no_gpu_reason()


@functools.cache
def kernels_skip_reason() -> str | None:
    """Why no kernel can run here, neither on a GPU nor emulated."""
    from flashcore_cupy.cpu.emulator.build import why_not

    gpu, emulated = gpu_skip_reason(), why_not()
    return None if gpu is None or emulated is None else f"{gpu}; {emulated}"


def compiler_skip_reason() -> str | None:
    """Why nothing can be compiled here: only for want of CuPy, a broken NVRTC is a failure."""
    return None if importlib.util.find_spec("cupy") else "CuPy, which brings NVRTC, is missing"


#: Whether to try all that otherwise takes turns from day to day: for who changes a kernel.
TEST_ALL = bool(os.environ.get("TEST_ALL"))


def today() -> int:
    """A number that is one more each day; in UTC, so that all workers of a session agree."""
    return datetime.datetime.now(datetime.timezone.utc).date().toordinal()


def todays(every: list[T]) -> list[T]:
    """A tenth, another one each day, and the first of all.

    All rows take about an hour on two cores, and all tests together may take twenty minutes.
    """
    if TEST_ALL:
        return every
    return [one for n, one in enumerate(every) if n == 0 or n % 10 == today() % 10]


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Of a session's workers: what one has built, the others then find in the cache."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    import fcntl

    folder = Path(os.environ["FLASHCORE_CACHE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def runs_here(kernel: str) -> bool:
    """Whether this machine's GPU has the instructions that a kernel is made of."""
    from flashcore_cupy.jit import compiler
    from flashcore_cupy.select import registry

    return registry.KERNELS[kernel].runs_on(compiler.device_arch())


def use_kernels(folder: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have everything in the test compile these sources, by their names, into an empty cache."""
    from flashcore_cupy.jit import cache

    kernels = folder / "kernels"
    for name, text in texts.items():
        (kernels / name).parent.mkdir(parents=True, exist_ok=True)
        (kernels / name).write_text(text)
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(kernels))
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(folder / "cache"))
    monkeypatch.delenv("FLASHCORE_ARCH", raising=False)
    monkeypatch.setattr(cache, "_unwritten", {})
    return kernels


def finding(name: str) -> Any:
    """What the doctor says of one thing."""
    from flashcore_cupy.check import doctor

    (found,) = (item for item in doctor.examine().findings if item.name == name)
    return found


def three_arrays(dtype: Any = "float16", shape: tuple[int, ...] = (1, 2, 8, 16)) -> list[Any]:
    """q, k and v of N(0, 1) on the host."""
    import ml_dtypes
    import numpy as np

    rng = np.random.default_rng(0)
    element = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return [rng.standard_normal(shape).astype(element) for _ in range(3)]
