"""A kernel as a shared library for this machine's CPU.

The kernel's own text is compiled, with another folder first on the include path: twins of the
headers of ``kernels/flashcore/ptx``, whose instructions a CPU does not have. Libraries are kept in
the cache folder, by all that they are made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flashcore_cupy.cuda.targets import capability
from flashcore_cupy.jit import cache
from flashcore_cupy.jit.compiler import usable_cores
from flashcore_cupy.jit.nvrtc import CompileError
from flashcore_cupy.jit.sources import kernels_digest, kernels_dir
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.settings import settings

INCLUDE = Path(__file__).resolve().parent / "include"
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    "-ffp-contract=off",  # a multiply-add is one where the kernel says so
    *("-Wno-unknown-pragmas", "-Wno-attributes"),
    "-fno-sanitize=undefined",  # which zig would have
)
_KERNEL, _RUNTIME = ("-O1",), ("-O2",)
_CHECKING = ("-DEMULATOR_CHECK",)
_CHECKING_KERNEL = (
    "-g1",
    "-fsanitize=thread",  # calls at each plain access, which find races and what nobody has written
    # Traps, at what C++ leaves undefined.
    "-fsanitize=signed-integer-overflow,integer-divide-by-zero,bounds",
    "-fsanitize-undefined-trap-on-error",
)

_LOG = 4000  # characters of what the compiler says

_loaded: dict[str, ctypes.CDLL] = {}
_building: dict[str, threading.Lock] = {}
if hasattr(os, "register_at_fork"):  # a lock of a thread that the child does not have stays shut
    os.register_at_fork(after_in_child=_building.clear)


@dataclass(frozen=True)
class Source:
    """A ``.cu``, and all that it is compiled with."""

    file: str
    """In ``kernels/``; or from the root on. Then what it includes itself is not looked at, so a
    library is not built again when that changes."""
    entries: tuple[str, ...]
    """Its ``extern "C"`` kernels."""
    arch: str
    """The target that it takes itself to be compiled for."""
    defines: Mapping[str, int | str]
    headers: tuple[tuple[str, str], ...] = ()
    """Name and text of headers that stand in for files of ``kernels/``."""

    @classmethod
    def of(cls, config: KernelConfig, arch: str) -> Source:
        """Return what a configuration is compiled from."""
        return cls(config.source, config.entries, arch, config.defines(), config.headers)


def cxx() -> tuple[str, ...] | None:
    """This machine's C++ compiler, as a command; None if there is none.

    It is ``CXX``, g++, clang++, or the one that the package ``ziglang`` brings.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        found = shutil.which(asked[0])
        return None if found is None else (found, *asked[1:])
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is not None:
        return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        # For any machine of this kind, not for this one alone.
        return (sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline")
    return None


def why_not() -> str | None:
    """Why kernels cannot run on this machine's CPU, and the cure; None if they can."""
    if os.name != "posix":
        return "kernels run on the CPU of Linux and macOS alone"
    if cxx() is not None:
        return None
    asked = os.environ.get("CXX")
    wrong = f"CXX={asked} is not there" if asked else "there is no C++ compiler"
    return f"{wrong}: pip install 'flashcore-cupy[emulator]', which brings one, or install g++"


def library(source: Source, *, checking: bool = False) -> ctypes.CDLL:
    """Compile a kernel for this CPU, or fetch it: a library with ``launch_<entry>`` for each entry.

    ``checking``: with a look at every plain access. Raises ``RuntimeError`` without a C++ compiler,
    ``jit.CompileError`` if that refuses the kernel.
    """
    compiler, reason = cxx(), why_not()
    if compiler is None or reason is not None:
        raise RuntimeError(reason)
    options = [*_FLAGS, *(_CHECKING if checking else ())]
    own = [*_KERNEL, *(_CHECKING_KERNEL if checking else ())]
    own += [f"-D{name}={value}" for name, value in source.defines.items()]
    own += [f"-D__CUDA_ARCH__={capability(source.arch) * 10}", *_own_flags()]
    key = _key(source, (*compiler, *options, *own))
    with _building.setdefault(key, threading.Lock()):
        if key not in _loaded:
            compile_it = functools.partial(_compile, source, compiler, options, own)
            _loaded[key] = _load(key, source, compile_it)
        return _loaded[key]


def _own_flags() -> list[str]:
    """What the user adds, as "-g -O0" for a debugger."""
    return shlex.split(settings().cxxflags or "")


def build_libraries(sources: Iterable[Source], on_step: Callable[[str], None]) -> None:
    """Build side by side what the cache does not have; tell of each source's file.

    What does not compile says so when it is asked for.
    """

    def build(source: Source) -> str:
        with contextlib.suppress(CompileError):
            library(source)
        return source.file

    with ThreadPoolExecutor(usable_cores()) as pool:
        for file in pool.map(build, sources):
            on_step(file)


def _key(source: Source, command: Iterable[str]) -> str:
    own = Path(source.file)
    text = own.read_bytes() if own.is_absolute() else source.file
    return _digest((text, kernels_digest(), source.entries, source.headers, *command))


def _digest(parts: tuple[object, ...]) -> str:
    machine = (sys.platform, platform.machine())
    return hashlib.sha256(repr((parts, _digest_of_twins(), machine)).encode()).hexdigest()[:32]


def _load(key: str, source: Source, compile_it: Callable[[], bytes]) -> ctypes.CDLL:
    found = cache.find(key)
    if found is None:
        made = {
            "source": source.file,
            "arch": f"{source.arch} on {platform.machine()}",
            "defines": dict(source.defines),
            "file": cache.LIBRARY,
        }
        found = compile_it(), made
        cache.store(key, *found)
    path = cache.path_of(key)
    if path is not None:
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the file is not needed
        path = Path(folder, cache.LIBRARY)
        path.write_bytes(found[0])
        return ctypes.CDLL(str(path))


def _compile(
    source: Source, compiler: Sequence[str], options: Sequence[str], own: Sequence[str]
) -> bytes:
    with tempfile.TemporaryDirectory(prefix="flashcore-") as work:
        for name, text in source.headers:
            header = Path(work, name)
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text, encoding="utf-8")
        lines = [f'#include "{source.file}"', "#include <emulator/launch.hpp>"]
        lines += ["using namespace flashcore;"]
        lines += [f"EMULATOR_LAUNCH({entry})" for entry in source.entries]
        names = ("unit.cpp", "runtime.o", "kernel.o", cache.LIBRARY)
        unit, runtime, kernel, made = (Path(work, name) for name in names)
        unit.write_text("\n".join(lines) + "\n", encoding="utf-8")
        step = (*options, *own, *_folders(work), "-c", str(unit), "-o", str(kernel))
        _run([*compiler, *step], source, work)
        runtime.write_bytes(_runtime(compiler, options))
        # The runtime comes first: of what both define, its own is taken, which is not watched. The
        # sanitizer's library is not needed: the runtime has what it would define.
        step = ("-shared", str(runtime), str(kernel), "-o", str(made), "-pthread")
        _run([*compiler, *_own_flags(), *step], source, work)
        return made.read_bytes()


def _runtime(compiler: Sequence[str], options: Sequence[str]) -> bytes:
    """Return the object that every kernel is linked with; compile it, if it is not in the cache."""
    source = Source(str(INCLUDE / "emulator" / "runtime.cpp"), (), platform.machine(), {})
    types = (kernels_dir() / "flashcore" / "types.cuh").read_bytes()
    command = [*compiler, *options, *_RUNTIME, *_own_flags()]
    key = _digest((types, *command))
    with _building.setdefault(key, threading.Lock()):
        found = cache.find(key)
        if found is None:
            with tempfile.TemporaryDirectory(prefix="flashcore-") as work:
                made = Path(work, "runtime.o")
                step = (*_folders(), "-c", source.file, "-o", str(made))
                _run([*command, *step], source, work)
                meta = {"source": Path(source.file).name, "arch": source.arch}
                found = made.read_bytes(), {**meta, "file": cache.LIBRARY}
            cache.store(key, *found)
    return found[0]


def _folders(*first: str) -> list[str]:
    folders = [f"-I{folder}" for folder in (*first, INCLUDE, kernels_dir())]
    return ["-include", str(INCLUDE / "emulator" / "keywords.h"), *folders]


def _run(command: list[str], source: Source, work: str) -> None:
    in_english = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=in_english)
    if done.returncode:
        log = done.stderr
        for folder in (work, str(INCLUDE), str(kernels_dir())):
            log = log.replace(f"{folder}/", "")
        raise CompileError(source.file, source.arch, source.defines, log[:_LOG], source.headers)


@functools.cache
def _digest_of_twins() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in INCLUDE.rglob("*") if path.is_file()):
        digest.update(path.relative_to(INCLUDE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
