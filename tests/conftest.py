"""What all tests share: a cache folder of their own, and when a test cannot run here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _test_what_is_installed() -> None:
    """Let ``python -m pytest`` test what plain ``pytest`` tests: the installed package.

    It puts the working folder first on the path. Where nothing is installed, or PYTHONPATH names
    the checkout, the checkout's package is tested.
    """
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if ROOT in (Path(folder).resolve() for folder in named if folder):
        return
    path = sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != ROOT]
    if importlib.util.find_spec("flashcore_cupy") is None:
        sys.path[:] = path


_test_what_is_installed()


def gpu_skip_reason() -> str | None:
    """Why tests marked ``gpu`` cannot run here; None if they can."""
    from flashcore_cupy.jit.compiler import no_gpu_reason

    return no_gpu_reason()


def compiler_skip_reason() -> str | None:
    """Why nothing can be compiled here: only for want of CuPy, a broken NVRTC is a failure."""
    return None if importlib.util.find_spec("cupy") else "CuPy, which brings NVRTC, is missing"


def runs_here(kernel: str) -> bool:
    """Whether this machine's GPU has the instructions that a kernel is made of."""
    from flashcore_cupy.jit import compiler
    from flashcore_cupy.select import registry

    return not registry.KERNELS[kernel].tma or compiler.device_arch() == registry.HOPPER


def pytest_configure(config: pytest.Config) -> None:
    # Set before xdist starts its workers, which inherit it: one cache for the whole session.
    if not hasattr(config, "workerinput") and not os.environ.get("FLASHCORE_CACHE_DIR"):
        folder = tempfile.mkdtemp(prefix="flashcore-tests-")
        os.environ["FLASHCORE_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop("FLASHCORE_CACHE_DIR", None))
    # Every worker would start as many of NumPy's threads as there are cores, and they wait for each
    # other: with 12 on 16 cores the tests of a GPU took 268 s, and 84 like this.
    if workers := getattr(config.option, "numprocesses", None):
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = gpu_skip_reason() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


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


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout, or the unpacked source distribution, that these tests belong to."""
    return ROOT
