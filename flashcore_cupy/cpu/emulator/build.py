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
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashcore_cupy.jit.cache import cache_dir
from flashcore_cupy.jit.sources import kernels_digest, kernels_dir
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.targets import capability

INCLUDE = Path(__file__).resolve().parent / "include"
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    "-ffp-contract=off",  # a multiply-add is one where the kernel says so
    *("-Wno-unknown-pragmas", "-Wno-attributes"),
)
#: Calls at each plain access, which find races and what nobody has written.
_CHECKING = ("-g", "-fsanitize=thread", "-DEMULATOR_CHECK")


class BuildError(RuntimeError):
    """The C++ compiler refuses a kernel; the message has its words."""


@functools.cache
def cxx() -> str | None:
    """This machine's C++ compiler: ``CXX``, or the first of the usual ones; None without any."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else _COMPILERS)), None)


def library(config: KernelConfig, arch: str, *, checking: bool = False) -> ctypes.CDLL:
    """Compile a configuration for this CPU, or fetch it; one function ``launch_<entry>`` each.

    Raises ``RuntimeError`` without a C++ compiler, ``BuildError`` if it refuses the kernel.
    """
    compiler = cxx()
    if compiler is None:
        raise RuntimeError("kernels run on a CPU with a C++ compiler alone, and there is none")
    defines = [f"-D{name}={value}" for name, value in config.defines().items()]
    defines.append(f"-D__CUDA_ARCH__={capability(arch) * 10}")
    flags = [*_FLAGS, *(_CHECKING if checking else ())]
    parts = (compiler, flags, defines, config.headers, kernels_digest(), _digest_of_twins())
    key = hashlib.sha256(repr((config.source, *parts)).encode()).hexdigest()[:32]
    with _folder() as folder:
        path = folder / f"{key}.so"
        if not path.exists():
            _build(path, config, [compiler, *flags, *defines], checking=checking)
        return ctypes.CDLL(str(path))


def _build(path: Path, config: KernelConfig, command: list[str], *, checking: bool) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as work:
        for name, text in config.headers:
            header = Path(work, name)
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text, encoding="utf-8")
        lines = [f"#include <{config.source}>", "#include <emulator/launch.hpp>"]
        lines += ["#include <emulator/tsan.hpp>"] * checking
        lines += [f"EMULATOR_LAUNCH({entry})" for entry in config.entries]
        unit, thing, made = (Path(work, name) for name in ("unit.cpp", "unit.o", "unit.so"))
        unit.write_text("\n".join(lines) + "\n", encoding="utf-8")
        folders = [f"-I{folder}" for folder in (work, INCLUDE, kernels_dir())]
        first = ["-include", str(INCLUDE / "emulator" / "keywords.h")]
        _run([*command, *first, *folders, "-c", str(unit), "-o", str(thing)])
        # Linked without the sanitizer's own library: tsan.hpp has what it would define.
        _run([command[0], "-shared", str(thing), "-o", str(made), "-pthread"])
        made.replace(path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BuildError(done.stderr[:4000])


@functools.cache
def _digest_of_twins() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in INCLUDE.rglob("*") if path.is_file()):
        digest.update(path.relative_to(INCLUDE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where libraries are kept; if nothing can be written there, a folder for this one alone."""
    folder = cache_dir() / "emulated"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield folder
    except OSError:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
