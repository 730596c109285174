"""Building and running a bare ``.cu`` on the CPU: the cache, the compiler, raw parameters."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cpu.emulator.build import Source, cxx, library, why_not
from flashcore_cupy.cpu.emulator.run import Grid, KernelError, launch
from flashcore_cupy.jit import CompileError, cache

pytestmark = pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler: there is none")

TEXT = """
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
using namespace flashcore;
struct alignas(16) Wide { float x, y; };

// out[i] = scale * (x[i] + FC_ADDED), by threads that first meet.
extern "C" __global__ void scaled(char tag, const float* x, Wide wide, short n, float* out) {
    block_sync();
    const int i = int(block_index() * 64 + thread_index());
    if (i < n && tag == 't') out[i] = wide.y * (x[i] + FC_ADDED);
}

extern "C" __global__ void stuck(int threads) { named_barrier_sync(1, threads); }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all tests: what every kernel is linked with is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def source(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Source:
    """A kernel of the test's own, and nothing loaded."""
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(folder))
    monkeypatch.setattr(build, "_loaded", {})
    file = tmp_path / "scaled.cu"
    file.write_text(f"// {request.node.name}{TEXT}")
    return Source(str(file), ("scaled", "stuck"), "sm_80", {"FC_ADDED": 3})


def entries_of(source: Source) -> list[cache.CacheEntry]:
    return [entry for entry in cache.cache_entries() if entry.source == source.file]


def run_scaled(source: Source) -> None:
    x = np.arange(100, dtype=np.float32)
    out = np.zeros(100, np.float32)
    # char, padding; pointer; padding to 16, float x 2, padding to 16; short, padding; pointer
    params = struct.pack("<c7xQff8xh6xQ", b"t", x.ctypes.data, 0.0, 2.0, 100, out.ctypes.data)
    launch(library(source), "scaled", params, Grid(blocks=2, threads=64), keep=(x, out))
    np.testing.assert_array_equal(out, 2 * (x + 3))


def test_a_bare_file_runs_with_raw_parameters(source: Source) -> None:
    run_scaled(source)
    (entry,) = entries_of(source)
    assert entry.arch.startswith("sm_80 on ")
    assert not entry.damaged and entry.defines == {"FC_ADDED": 3}


def test_a_library_is_built_once_and_again_when_its_text_changes(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_scaled(source)
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "_compile", lambda *_, **__: pytest.fail("built again"))
    run_scaled(source)
    Path(source.file).write_text(TEXT.replace("tag == 't'", "tag"))
    with pytest.raises(pytest.fail.Exception, match="built again"):
        run_scaled(source)


def test_without_a_cache_folder_libraries_stay_in_memory(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_unwritten", {})
    monkeypatch.setattr(cache, "cache_dir", lambda: Path("~/.cache/flashcore-cupy"))  # no home
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="kernels stay in memory"):
        run_scaled(source)
    assert not (tmp_path / "~").exists()
    monkeypatch.setattr(build, "_compile", lambda *_, **__: pytest.fail("built again"))
    run_scaled(source)


def test_processes_build_the_same_library_at_once(source: Source) -> None:
    text = (
        "from flashcore_cupy.cpu.emulator.build import Source, library\n"
        f"library({source!r}).launch_scaled"
    )
    started = [subprocess.Popen([sys.executable, "-c", text]) for _ in range(2)]
    assert [one.wait() for one in started] == [0, 0]
    assert [entry.damaged for entry in entries_of(source)] == [False]


def test_a_deadlock_is_an_error_that_says_who_waits(source: Source) -> None:
    params = struct.pack("<i", 64)
    with pytest.raises(KernelError, match=r"^stuck: .*deadlock") as caught:
        launch(library(source), "stuck", params, Grid(blocks=1, threads=32))
    assert "threads 0 to 31" in str(caught.value)


def test_what_does_not_compile_is_an_error_with_the_compilers_words(source: Source) -> None:
    Path(source.file).write_text("int x = ;")
    with pytest.raises(CompileError, match=r"scaled\.cu:1:9: error: ") as caught:
        library(source)
    assert (caught.value.path, caught.value.line) == (source.file, 1)


def test_the_compiler_may_come_with_arguments(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[Any] = []
    monkeypatch.setattr(build, "_run", lambda command, *_: commands.append(command))
    found = cxx()
    assert found is not None
    monkeypatch.setenv("CXX", " ".join([*found, "-pipe"]))
    with pytest.raises(FileNotFoundError):  # nothing has been built
        library(source)
    assert [command[: len(found) + 1] for command in commands] == 2 * [[*found, "-pipe"]]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cxx() is None and "CXX=no-such-compiler is not there" in (why_not() or "")
    with pytest.raises(RuntimeError, match=r"pip install 'flashcore-cupy\[emulator\]'"):
        library(source)
