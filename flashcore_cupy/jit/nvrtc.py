"""NVRTC, the compiler that runs in the process: targets, one compilation, and its report.

It is reached through CuPy's binding, which works without a GPU and without a driver.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore_cupy.jit.sources import source_files

Defines = Mapping[str, int | str]
Headers = Sequence[tuple[str, str]]
"""Names, as ``#include <name>`` has them, and texts."""

OPTIONS = ("-std=c++17", "--ptxas-options=-v")
# NVRTC says file(line), a C++ compiler file:line:column.
_FIRST_ERROR = re.compile(r"^(?P<path>.+?)[(:](?P<line>\d+)(?:\)|:\d+): [\w ]*error", re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


class CompileError(RuntimeError):
    """A kernel does not compile.

    Attributes:
        source: the kernel's file, with its folder.
        arch: the target.
        defines: the preprocessor defines.
        log: the compiler's whole output.
        path, line: where the first error is; ``source`` and None if the compiler names no place.
        text: that line, if it is a user's expression, else None.
    """

    def __init__(
        self, source: str, arch: str, defines: Defines, log: str, headers: Headers = ()
    ) -> None:
        super().__init__(source, arch, dict(defines), log, tuple(headers))
        self.source = source
        self.arch = arch
        self.defines = dict(defines)
        self.log = log
        place = _FIRST_ERROR.search(log)
        self.path = place["path"] if place else source
        self.line = int(place["line"]) if place else None
        self.text = _line_of(self.path, self.line, headers)

    def __str__(self) -> str:
        """Return the place, the compiler's words, the target and the defines."""
        place = self.path if self.line is None else f"{self.path}, line {self.line}"
        if self.text is not None:
            place += f": {self.text.strip()!r}"
        defines = " ".join(f"-D{name}={value}" for name, value in sorted(self.defines.items()))
        return (
            f"{place}: the kernel does not compile for {self.arch}\n{self.log.strip()}\n"
            f"defines: {defines or 'none'}"
        )


def _line_of(path: str, line: int | None, headers: Headers) -> str | None:
    """Find a line of a generated header by the place that a ``#line`` in it gives."""
    for _, text in headers:
        _, found, rest = text.partition(f'#line 1 "{path}"\n')
        if found and line is not None:
            return rest.split("\n")[line - 1]
    return None


class UnknownArchError(ValueError):
    """The installed NVRTC does not know the target."""


@dataclass(frozen=True)
class EntryResources:
    """What one entry point takes, by the compiler's report.

    Attributes:
        registers: 32-bit registers per thread.
        shared_bytes: static shared memory per block; dynamic shared memory is the launch's.
        local_bytes: stack frame per thread.
        spill_bytes: bytes stored plus bytes loaded for want of registers.
    """

    registers: int
    shared_bytes: int
    local_bytes: int
    spill_bytes: int


@functools.cache
def known_archs() -> tuple[str, ...]:
    """Return the targets that this NVRTC compiles for, oldest first."""
    archs = []
    for number in arch_numbers():
        archs.append(f"sm_{number}")
        if number >= 90:  # the targets with instructions of one generation alone
            archs.append(f"sm_{number}a")
        if number >= 100 and nvrtc_version() >= (12, 9):
            archs.append(f"sm_{number}f")
    return tuple(archs)


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Return NVRTC's (major, minor).

    Raises:
        RuntimeError: CuPy or NVRTC is missing.
    """
    nvrtc = _nvrtc()
    try:
        major, minor = nvrtc.getVersion()
    except Exception as error:  # CuPy raises what its loader of the day raises
        raise RuntimeError(
            f"CuPy cannot load NVRTC, the compiler of kernels ({error}): install "
            "nvidia-cuda-nvrtc-cu12 beside cupy-cuda12x, or nvidia-cuda-nvrtc beside cupy-cuda13x"
        ) from error
    return int(major), int(minor)


def _nvrtc() -> Any:
    try:
        return importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    except ImportError as error:
        raise RuntimeError(
            f"compiling a kernel needs CuPy ({error}): pip install cupy-cuda12x, or cupy-cuda13x "
            "for a driver of CUDA 13"
        ) from error


@functools.cache
def arch_numbers() -> tuple[int, ...]:
    """Return this NVRTC's targets as numbers (90 for sm_90), oldest first."""
    nvrtc_version()  # a missing library is reported by this one
    return tuple(sorted(int(number) for number in _nvrtc().getSupportedArchs()))


def check_arch(arch: str) -> None:
    """Raise :class:`UnknownArchError` unless this NVRTC compiles for ``arch``."""
    if arch not in known_archs():
        raise unknown_arch(arch)


def unknown_arch(arch: str) -> UnknownArchError:
    """Return the error that names ``arch``, what is known, and what to do."""
    version = ".".join(map(str, nvrtc_version()))
    return UnknownArchError(
        f"NVRTC {version} does not know the target {arch!r}; it knows {', '.join(known_archs())}. "
        "A newer GPU needs a newer NVRTC, one older than sm_75 a CUDA 12 one (cupy-cuda12x)"
    )


def compile_source(
    root: Path, source: str, defines: Defines, arch: str, headers: Headers = ()
) -> tuple[bytes, str]:
    """Return the cubin and the compiler's report. ``headers`` stand in for files of ``root``.

    The compiler gets texts and their names relative to ``root``, and no path: ``root`` may have
    any name, also one that cannot be encoded.
    """
    text = (root / source).read_text(encoding="utf-8")
    files = {name: path.read_bytes() for name, path in _header_files(root).items()}
    generated = {name: header.encode() for name, header in headers}
    try:
        return compile_text(text, source, defines, arch, files | generated)
    except CompileError as error:
        log = _with_paths(error.log, root, {source, *files} - generated.keys())
        raise CompileError(str(root / source), arch, defines, log, headers) from error.__cause__


def compile_text(
    text: str, label: str, defines: Defines, arch: str, headers: Mapping[str, bytes] | None = None
) -> tuple[bytes, str]:
    """Return the cubin and the compiler's report of a text, which the report calls ``label``.

    ``headers``: texts by their names, as ``#include <name>`` has them.

    Raises:
        CompileError: the compiler rejects it.
    """
    nvrtc = _nvrtc()
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    options = (f"-arch={arch}", *OPTIONS, *_no_cache(), *macros)
    headers = headers or {}
    names = tuple(map(os.fsencode, headers))
    program = nvrtc.createProgram(text, label, tuple(headers.values()), names)
    try:
        nvrtc.compileProgram(program, options)
        return _whole(bytes(nvrtc.getCUBIN(program))), _log(nvrtc, program)
    except nvrtc.NVRTCError as error:
        raise CompileError(label, arch, defines, _log(nvrtc, program) or str(error)) from error
    finally:
        nvrtc.destroyProgram(program)


def _header_files(root: Path) -> dict[str, Path]:
    paths = (path for path in source_files(root) if path.suffix == ".cuh")
    return {path.relative_to(root).as_posix(): path for path in paths}


def _with_paths(log: str, root: Path, labels: Set[str]) -> str:
    """Put files that can be opened where the compiler's report has labels."""
    label = "|".join(map(re.escape, labels))
    place = re.compile(rf'(?:^|(?<= of )|(?<= of "))(?:{label})(?=\(\d+\):|"|$)', re.MULTILINE)
    return place.sub(lambda found: str(root / found[0]), log)


def _whole(cubin: bytes) -> bytes:
    """Put back the last byte, a zero, that CuPy takes for a string's end: disassemblers miss it."""
    table, size, count = (
        int.from_bytes(cubin[first:end], "little") for first, end in ((32, 40), (54, 56), (56, 58))
    )
    return cubin.ljust(table + size * count, b"\0")


def _no_cache() -> tuple[str, ...]:
    """Keep NVRTC from its own cache: a hit there comes without the report on resources."""
    return ("--no-cache",) if nvrtc_version() >= (12, 9) else ()


def _log(nvrtc: Any, program: int) -> str:
    return str(nvrtc.getProgramLog(program)).rstrip("\0\n ")


def parse_resources(log: str) -> dict[str, EntryResources]:
    """Read ptxas' report: one section per entry point, functions that it calls included."""
    entries = {}
    sections = _ENTRY.split(log)[1:]
    for name, section in zip(sections[::2], sections[1::2], strict=True):
        frames = [tuple(map(int, frame)) for frame in _FRAME.findall(section)]
        stacks = [int(stack) for stack in _STACK.findall(section)]
        entries[name] = EntryResources(
            registers=_first(_REGISTERS, section),
            shared_bytes=_first(_SHARED, section),
            local_bytes=max([frame[0] for frame in frames] + stacks, default=0),
            spill_bytes=sum(stored + loaded for _, stored, loaded in frames),
        )
    return entries


def _first(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else 0
