"""What all tests get: the package to test, a cache folder of their own, the marker of a folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    PROBES,
    ROOT,
    TEST_ALL,
    compiler_skip_reason,
    gpu_skip_reason,
    kernels_skip_reason,
    today,
)

#: A folder is a marker: what its tests need, and what says why that is not here.
NEEDS = {
    "compile": ("NVRTC", compiler_skip_reason),
    "gpu": ("a GPU", gpu_skip_reason),
    "kernels": ("a GPU or a C++ compiler", kernels_skip_reason),
}

pytest.register_assert_rewrite(
    "fuzz", "fuzz_backward", "places", *(path.stem for path in ROOT.glob("tests/cases_*.py"))
)


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


@pytest.hookimpl(tryfirst=True)  # before xdist looks
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All tests take all cores, up to 16, unless ``-n`` or ``--pdb`` say otherwise."""
    if hasattr(config, "workerinput"):  # a worker of xdist comes by here, too, and starts none
        return
    option, is_all = config.option, config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_plain = not (option.usepdb or option.collectonly)
    if is_all and is_plain and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.maxprocesses = "auto", option.maxprocesses or 16


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--receipt",
        metavar="FILE",
        help="write what passed on this machine's GPU, module by module, with the kernels' digest",
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--receipt") is None:
        return
    from flashcore_cupy.check.machine import machine
    from flashcore_cupy.jit import compiler

    of = {name: terminalreporter.stats.get(name, []) for name in ("passed", "failed", "skipped")}
    of["failed"] = [*of["failed"], *terminalreporter.stats.get("error", [])]
    modules = Counter(report.nodeid.partition("::")[0] for report in of["passed"])
    told = machine(compiler.device_arch()).to_json()
    told |= {name: len(reports) for name, reports in of.items()}
    told["modules"] = dict(sorted(modules.items()))
    Path(config.getoption("--receipt")).write_text(json.dumps(told, indent=2) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--receipt") and (reason := gpu_skip_reason()) is not None:
        raise pytest.UsageError(f"--receipt: it is of a run on a GPU, and {reason}")
    # Set before xdist starts its workers, which inherit it: one cache for the whole session.
    if not hasattr(config, "workerinput") and not os.environ.get("FLASHCORE_CACHE_DIR"):
        folder = tempfile.mkdtemp(prefix="flashcore-tests-")
        os.environ["FLASHCORE_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop("FLASHCORE_CACHE_DIR", None))
    # Read when NumPy is imported, here or in a worker. Its threads wait for each other and for
    # those of attention: with one per core, tests/cpu took twice as long on two busy cores, and
    # tests/gpu, with 12 workers on 16 cores, three times.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Else JAX takes most of a GPU's memory for itself as soon as it is asked for any device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for folder, (what, skip_reason) in NEEDS.items():
        inside = [item for item in items if ROOT / "tests" / folder in item.path.parents]
        reason = skip_reason() if inside else None
        for item in inside:
            item.add_marker(folder)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"needs {what}: {reason}"))
    _tell_once(config, items)
    _leave_for_other_days(config, items)


def _leave_for_other_days(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with three rows or more that emulates kernels, two in five are tried each day.

    Kernels take turns by threes and sixes (``Place.by_turns``), so each meets each row.
    """
    if TEST_ALL or gpu_skip_reason() is None:
        return
    rows: dict[str, list[pytest.Item]] = {}
    for item in items:
        if ROOT / "tests" / "kernels" in item.path.parents:
            rows.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = {
        item
        for of_test in rows.values()
        for n, item in enumerate(of_test)
        if len(of_test) > 2 and (n + today()) % 5 not in (0, 2)
        if item.get_closest_marker("every_day") is None
    }
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def _tell_once(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that is skipped, one case says why; its other parameters are deselected."""
    told: set[str] = set()
    kept, dropped = [], []
    for item in items:
        is_skipped = any(item.iter_markers("skip")) or any(
            mark.args and mark.args[0] is True for mark in item.iter_markers("skipif")
        )
        test = item.nodeid.partition("[")[0]
        (dropped if is_skipped and test in told else kept).append(item)
        if is_skipped:
            told.add(test)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from places import parametrize

    parametrize(metafunc)


@pytest.fixture
def on(request: pytest.FixtureRequest) -> Any:
    """Where attention runs in this folder, a ``Place``."""
    from places import place_of

    turn = zlib.crc32(request.node.nodeid.encode()) + today()
    return replace(place_of(request.path), turn=turn)


@pytest.fixture
def probe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of kernels/ with the probes beside the entry files, so that jit compiles them."""
    folder = tmp_path / "kernels"
    shutil.copytree(ROOT / "kernels", folder)
    for probe in PROBES:
        shutil.copy(probe, folder / f"probe_{probe.name}")
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(folder))
    return folder


@pytest.fixture
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and nothing else that the environment says."""
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHCORE_ARCH", raising=False)
    monkeypatch.delenv("FLASHCORE_KERNELS_DIR", raising=False)


@pytest.fixture
def lines_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as they are by default: a worker of pytest inherits COLUMNS."""
    monkeypatch.delenv("COLUMNS", raising=False)
