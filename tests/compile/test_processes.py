"""Processes and machines that are short of something: a home, a folder, a thread, time to end."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import use_kernels

import flashcore_cupy
from flashcore_cupy.jit import cache, compiler

posix = pytest.mark.skipif(os.name != "posix", reason="about POSIX systems")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

ARCH = "sm_90a"
DEMO = """#include <flashcore/step.cuh>
extern "C" __global__ void demo(int* x) { x[0] = STEP; }
"""
JOBS: list[compiler.Job] = [("demo.cu", {"FC_STEP": step}, ARCH) for step in (1, 2, 3)]


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one small kernel, and an empty cache."""
    texts = {"flashcore/step.cuh": "constexpr int STEP = FC_STEP;\n", "demo.cu": DEMO}
    return use_kernels(tmp_path, texts, monkeypatch)


def environment(more: Mapping[str, str | bytes] | None = None) -> dict[bytes, bytes]:
    """This process's, in which another Python finds the same package."""
    package = Path(flashcore_cupy.__file__).resolve().parent.parent
    changed = {**os.environ, "PYTHONPATH": str(package), **(more or {})}
    return {os.fsencode(name): os.fsencode(value) for name, value in changed.items()}


def python(code: str, more: Mapping[str, str | bytes] | None = None, cwd: Any = None) -> str:
    """What a script prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment(more),
        cwd=cwd,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


LATE = """
    import atexit, sys, threading, time
    import numpy as np
    import flashcore_cupy
    from flashcore_cupy import jit

    q = np.random.default_rng(0).standard_normal((2, 4, 600, 16), np.float32)
    jobs = [("demo.cu", {"FC_STEP": step}, "sm_90a") for step in (1, 2)]

    def attention():
        from flashcore_cupy.cpu import parallel
        parallel.cores = lambda: 4
        print(flashcore_cupy.attention(q, q, q).shape)

    def compilation():
        print([kernel.arch for kernel in jit.compile_many(jobs, workers=2)])

    def late():
        time.sleep(0.5)
        work()

    work = {work}
    {before}
    {when}
"""
WHEN = {
    "thread that outlives main": "threading.Thread(target=late).start()",
    "exit handler": "atexit.register(work)",
}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("before", ["", "work(); jit.clear_cache()"], ids=["first", "later"])
@pytest.mark.parametrize(
    ("work", "printed"),
    [("attention", "(2, 4, 600, 16)"), ("compilation", "['sm_90a', 'sm_90a']")],
)
def test_work_when_the_main_thread_has_ended(
    kernels: Path, work: str, printed: str, before: str, when: str
) -> None:
    code = LATE.replace("{work}", work).replace("{before}", before).replace("{when}", WHEN[when])
    assert python(code).splitlines() == [printed] * (2 if before else 1)


@posix
def test_attention_and_compilation_in_a_forked_child(kernels: Path) -> None:
    printed = python(
        """
        import os
        import numpy as np
        import flashcore_cupy
        from flashcore_cupy import jit
        from flashcore_cupy.cpu import parallel

        parallel.cores = lambda: 4
        q = np.random.default_rng(0).standard_normal((2, 4, 600, 16), np.float32)

        def work():
            jobs = [("demo.cu", {"FC_STEP": step}, "sm_90a") for step in (1, 2)]
            cubins = [kernel.cubin for kernel in jit.compile_many(jobs, workers=2)]
            return flashcore_cupy.attention(q, q, q), cubins

        o, cubins = work()
        jit.clear_cache()
        if child := os.fork():
            print(os.waitpid(child, 0)[1])
        else:
            again, same = work()
            os._exit(0 if np.array_equal(o, again) and cubins == same else 1)
        """
    )
    assert printed.split() == ["0"]


# --- worker processes ---------------------------------------------------------------------------


def test_work_goes_on_here_when_workers_are_killed(kernels: Path) -> None:
    done = threading.Event()
    killed = []

    def kill_workers() -> None:
        while not done.is_set():
            for process in multiprocessing.active_children():
                process.kill()
                killed.append(process.pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_workers)
    killer.start()
    reported: list[Any] = []
    try:
        compiled = compiler.compile_many(JOBS, workers=2, on_done=reported.append)
    finally:
        done.set()
        killer.join()
    assert killed
    assert [kernel.defines["FC_STEP"] for kernel in compiled] == [1, 2, 3]
    assert sorted(map(id, reported)) == sorted(map(id, compiled))


@pytest.mark.parametrize("error", [OSError("out of processes"), AssertionError("no children")])
def test_compilation_where_no_process_starts(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(method: str) -> None:
        raise error

    monkeypatch.setattr(multiprocessing, "get_context", refuse)
    reported: list[Any] = []
    jobs = [*JOBS, ("demo.cu", {}, ARCH)]
    results = compiler.compile_each(jobs, workers=2, on_done=reported.append)
    kinds = [type(result).__name__ for result in results]
    assert kinds == ["CompiledKernel"] * 3 + ["CompileError"] and len(reported) == 4


def test_an_error_of_the_one_who_listens_is_raised(kernels: Path) -> None:
    def on_done(result: object) -> None:
        raise ZeroDivisionError("the listener's")

    with pytest.raises(ZeroDivisionError, match="the listener's"):
        compiler.compile_many(JOBS, workers=2, on_done=on_done)
    assert not multiprocessing.active_children()


def test_a_job_that_is_there_twice_is_compiled_once(kernels: Path) -> None:
    reported: list[Any] = []
    compiled = compiler.compile_many([*JOBS, *JOBS], workers=2, on_done=reported.append)
    assert all(x is y for x, y in zip(compiled[:3], compiled[3:], strict=True))
    assert len(reported) == 6 and len(cache.cache_entries()) == 3


SLOW = """
import multiprocessing, threading, time
from flashcore_cupy import jit

def tell():
    while len(workers := multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    time.sleep(2)  # they compile by now
    print(*[worker.pid for worker in workers], flush=True)

if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    jit.compile_many([("slow.cu", {"FC_N": n}, "sm_90a") for n in range(4)], workers=2)
"""


def _slow_kernel() -> str:
    """A kernel that takes the compiler a minute."""
    values = range(64)
    lines = [
        f"v{i % 64} = v{i % 64} * x[{i * 37 % 4099}] + v{(i * 29 + 7) % 64};\n"
        f"if (v{i % 64} > {i}.f) x[{i}] = v{(i + 1) % 64};\n"
        for i in range(4000)
    ]
    first = "".join(f"float v{i} = x[{i}];\n" for i in values)
    last = "".join(f"x[{i}] = v{i};\n" for i in values)
    return f'extern "C" __global__ void slow(float* x) {{\n{first}{"".join(lines)}{last}}}\n'


@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_workers_end_with_their_parent(kernels: Path, tmp_path: Path, name: str) -> None:
    (kernels / "slow.cu").write_text(_slow_kernel())
    (tmp_path / "script.py").write_text(SLOW)
    parent = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has what it starts in the background ignore it, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(_runs, workers))
        parent.send_signal(getattr(signal, name))
        assert parent.wait(timeout=10) != 0
    deadline = time.monotonic() + 10
    while any(map(_runs, workers)):
        assert time.monotonic() < deadline, "workers compile on for nobody"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there, and not only waits for somebody to take note of its end."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# --- folders ------------------------------------------------------------------------------------

NOBODY = """
    import pwd
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")
    pwd.getpwuid = unknown
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
"""
NO_FOLDER = """
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")
"""
FULL = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""
# Where the cache is to be, and what else the machine lacks.
UNWRITABLE: dict[str, tuple[Callable[[Path], str], str]] = {
    "no home": (lambda _: "", NOBODY),
    "a cache in no home": (lambda _: "~/kernels", NOBODY),
    "the home of an unknown user": (lambda _: "~nobody-has-this-name/kernels", ""),
    "no working folder": (lambda _: "kernels", NO_FOLDER),
    "a file": (lambda folder: str(folder / "file"), ""),
    "below a file": (lambda folder: str(folder / "file" / "cache"), ""),
    "a long name": (lambda folder: str(folder / ("x" * 300)), ""),
    "a long path": (lambda folder: str(folder / "/".join(["x" * 200] * 40)), ""),
    "a full disk": (lambda folder: str(folder / "cache"), FULL),
}
UNWRITABLE_SCRIPT = """
    import json, os, sys, tempfile, warnings
    tempfile.tempdir = "/dev/null/none"  # nor can a temporary file be made
    sys.dont_write_bytecode = True
    {setup}
    from flashcore_cupy import jit
    from flashcore_cupy.check import doctor
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jobs = [("demo.cu", {"FC_STEP": step}, "sm_90a") for step in (1, 2, 1)]
        alone = [jit.compile_kernel(*job).from_cache for job in jobs]
        jobs = [("demo.cu", {"FC_STEP": step}, "sm_90a") for step in (2, 3, 4)]
        together = [kernel.from_cache for kernel in jit.compile_many(jobs, workers=2)]
        again = [kernel.from_cache for kernel in jit.compile_many(jobs, workers=2)]
    (found,) = [found for found in doctor.examine().findings if found.name == "cache"]
    print(json.dumps({
        "alone": alone, "together": together, "again": again,
        "warnings": [str(w.message) for w in caught if "kernel cache" in str(w.message)],
        "entries": [jit.clear_cache(), jit.cache_entries()], "doctor": [found.state, found.cure],
        "tiny": [f.value for f in doctor.examine().findings if f.name == "a tiny compile"],
    }))
"""


@posix
@pytest.mark.parametrize("name", UNWRITABLE)
def test_where_no_folder_can_be_written_kernels_stay_in_memory(
    kernels: Path, tmp_path: Path, name: str
) -> None:
    if name == "no working folder" and sys.version_info[:3] == (3, 13, 0):
        pytest.skip("Python 3.13.0 itself fails in a folder that is gone")
    where, setup = UNWRITABLE[name]
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    folder = where(tmp_path)
    # CuPy makes a folder for its own kernels when it is imported, one named ~ if need be.
    more = {"FLASHCORE_CACHE_DIR": folder, "CUPY_CACHE_DIR": str(tmp_path / "cupy")}
    code = UNWRITABLE_SCRIPT.replace("{setup}", textwrap.dedent(setup).replace("\n", "\n    "))
    told = json.loads(python(code, more, cwd=tmp_path / "here"))
    assert told["alone"] == [False, False, True]
    assert told["together"] == [True, False, False] and told["again"] == [True] * 3
    (warning,) = told["warnings"]
    assert folder in warning and "FLASHCORE_CACHE_DIR" in warning and "in memory" in warning
    assert told["entries"] == [0, []]
    assert told["doctor"][0] == "problem" and "FLASHCORE_CACHE_DIR" in told["doctor"][1]
    assert told["tiny"][0].endswith(" ms")
    assert os.listdir(tmp_path / "here") == [], "nothing is left behind, no folder named ~ either"


@posix
def test_a_home_that_is_known_is_put_for_its_sign(kernels: Path, tmp_path: Path) -> None:
    python(
        'from flashcore_cupy import jit; jit.compile_kernel("demo.cu", {"FC_STEP": 1}, "sm_90a")',
        {"HOME": str(tmp_path / "home"), "FLASHCORE_CACHE_DIR": "~/kept"},
        cwd=tmp_path,
    )
    assert len(list((tmp_path / "home" / "kept").iterdir())) == 1


NAMES = {"Latin-1": b"caf\xe9", "UTF-8": "caf\u00e9 \u4e2d\u6587".encode(), "a quote": b"it's"}
LOCALES = {
    "here": {},
    "plain C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}
NAMED_SCRIPT = """
    import os, warnings
    warnings.simplefilter("error")
    from flashcore_cupy import jit
    from flashcore_cupy.check import doctor
    jobs = [("demo.cu", {"FC_STEP": step}, "sm_90a") for step in (1, 2)]
    assert all(kernel.cubin for kernel in jit.compile_many(jobs, workers=2))
    assert all(kernel.from_cache for kernel in jit.compile_many(jobs))
    assert len(jit.cache_entries()) == 2
    states = {found.name: found.state for found in doctor.examine().findings}
    assert states["cache"] == states["kernels"] == "ok", states
    try:
        jit.compile_kernel("demo.cu", {}, "sm_90a")
    except jit.CompileError as error:
        os.write(1, os.fsencode(error.path))
"""


@posix
@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("name", NAMES)
def test_folders_may_have_any_name(kernels: Path, tmp_path: Path, name: str, locale: str) -> None:
    folder = os.path.join(os.fsencode(tmp_path), NAMES[name])
    theirs = os.path.join(folder, b"kernels")
    try:
        shutil.copytree(os.fsencode(kernels), theirs)
    except OSError as error:
        pytest.skip(f"this file system refuses such names: {error}")
    own = {"FLASHCORE_KERNELS_DIR": theirs, "FLASHCORE_CACHE_DIR": os.path.join(folder, b"cache")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NAMED_SCRIPT)],
        env=environment(LOCALES[locale] | own),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout == os.path.join(theirs, b"flashcore", b"step.cuh")


def test_a_file_whose_name_is_no_text_has_a_digest(kernels: Path) -> None:
    from flashcore_cupy.jit.sources import kernels_digest

    before = kernels_digest()
    try:
        (kernels / os.fsdecode(b"caf\xe9.cuh")).write_text("")
    except OSError as error:
        pytest.skip(f"this file system refuses such names: {error}")
    assert kernels_digest() != before
    assert compiler.compile_kernel(*JOBS[0]).entries
