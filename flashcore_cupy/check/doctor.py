"""What would make a first call fail on this machine, and the cure for each of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flashcore_cupy._version import __version__
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cuda import driver
from flashcore_cupy.cuda.targets import DEFAULT_ARCH
from flashcore_cupy.jit import cache, compiler, nvrtc
from flashcore_cupy.jit.sources import kernels_digest, kernels_dir, source_files
from flashcore_cupy.select.registry import KERNELS
from flashcore_cupy.settings import settings

State = Literal["ok", "note", "problem"]
_TINY = 'extern "C" __global__ void tiny(int* x) { *x = 1; }\n'
_INSTALL = "pip install cupy-cuda12x (a driver of CUDA 12) or cupy-cuda13x (a driver of CUDA 13)"


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what was looked at.
        value: what was found, in words.
        state: ``"ok"``; ``"note"``, a limit that one should know of; or ``"problem"``.
        cure: one sentence on what to do; empty where all is well.
    """

    name: str
    value: str
    state: State = "ok"
    cure: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was looked at, in the order in which a first call meets it."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that need a cure."""
        return tuple(finding for finding in self.findings if finding.state == "problem")

    @property
    def ok(self) -> bool:
        """Whether nothing needs a cure."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return ``{"ok": bool, "findings": [{"name", "value", "state", "cure"}, ...]}``."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def examine() -> Report:
    """Look at everything that a first call needs. Never raises for what it finds.

    A machine without a GPU is noted, not a problem: the NumPy path works there, and kernels
    compile.
    """
    findings = [_python(), _flashcore(), *_environment(), _cupy_packages(), _cupy_import()]
    checks: tuple[Callable[[], Finding], ...] = (
        _driver,
        _gpu,
        _nvrtc_library,
        _target,
        _tensor_maps,
        _headers,
        _cache_folder,
        _kernels_folder,
        _compile,
        _cpp_compiler,
        _first_cupy_call,
    )
    for check in checks:
        try:
            findings.append(check())
        except Exception as error:  # a report with one blind spot beats a traceback
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(Finding(name, _one_line(error), "problem", "This check itself failed."))
    return Report(tuple(findings))


def cupy_packages() -> list[str]:
    """Return the installed distributions that bring a ``cupy``, such as ``["cupy-cuda12x"]``."""
    names = (dist.metadata["Name"] or "" for dist in importlib.metadata.distributions())
    return sorted({name for name in names if re.fullmatch(r"cupy(-(cuda|rocm)[\w.-]+)?", name)})


def _python() -> Finding:
    value = f"{platform.python_version()} on {platform.platform()}, {sys.executable}"
    return Finding("Python", value)


def _flashcore() -> Finding:
    return Finding("flashcore-cupy", f"{__version__} in {Path(__file__).resolve().parents[1]}")


def _environment() -> Iterator[Finding]:
    for name, value in asdict(settings()).items():
        if value is not None:
            yield Finding(f"FLASHCORE_{name.upper()}", str(value), "note", "Set by you.")


def _cupy_packages() -> Finding:
    name, packages = "CuPy packages", cupy_packages()
    if len(packages) > 1:
        cure = (
            f"They overwrite each other's files: pip uninstall -y {' '.join(packages)}, then "
            f"{_INSTALL}."
        )
        return Finding(name, ", ".join(packages), "problem", cure)
    return Finding(name, packages[0] if packages else "none by pip")


def _cupy_import() -> Finding:
    try:
        return Finding("CuPy", str(importlib.import_module("cupy").__version__))
    except Exception as error:
        if not cupy_packages() and sys.platform not in ("linux", "win32"):
            cure = "CuPy has no package for this platform; NumPy arrays work."
            return Finding("CuPy", "not installed", "note", cure)
        return Finding("CuPy", _one_line(error), "problem", f"{_INSTALL}.")


def _driver() -> Finding:
    try:
        version = int(_runtime().driverGetVersion())
    except ImportError:
        return Finding("driver", "unknown without CuPy", "note", "See what is said of CuPy.")
    reason = compiler.no_gpu_reason()
    if version == 0:
        cure = "For CuPy arrays install NVIDIA's driver; NumPy arrays work, and kernels compile."
        return Finding("driver", "none", "note", cure)
    value = f"supports CUDA {version // 1000}.{version % 1000 // 10}"
    if reason is not None:
        return Finding("driver", f"{value}: {reason}", "problem", "Update NVIDIA's driver.")
    return Finding("driver", value)


def _gpu() -> Finding:
    reason = compiler.no_gpu_reason()
    if reason is not None:
        return Finding("GPU", f"none: {reason}", "note", "NumPy arrays work, on the CPU.")
    runtime = _runtime()
    names = []
    for device in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(device)
        gib = properties["totalGlobalMem"] / 2**30
        capability = f"{properties['major']}.{properties['minor']}"
        names.append(f"{properties['name'].decode()} (compute {capability}, {gib:.0f} GiB)")
    return Finding("GPU", "; ".join(names))


def _nvrtc_library() -> Finding:
    try:
        major, minor = nvrtc.nvrtc_version()
    except RuntimeError as error:
        cure = "Kernels cannot be compiled: install CuPy with its NVRTC package as said."
        return Finding("NVRTC", _one_line(error), _severity(), cure)
    value = f"{major}.{minor}, {_loaded_library('nvrtc') or 'path unknown'}"
    driver = int(_runtime().driverGetVersion()) // 1000
    if 0 < driver < major:
        cure = f"Update the driver, or install the CuPy package for CUDA {driver} instead."
        return Finding("NVRTC", f"{value}; the driver is of CUDA {driver}", "problem", cure)
    return Finding("NVRTC", value)


def _target() -> Finding:
    override = settings().arch
    try:
        if override is None and not _has_gpu():
            return Finding("target", f"{_fallback_arch()}, for want of a GPU")
        return Finding("target", compiler.device_arch())
    except RuntimeError:
        return Finding("target", "unknown without NVRTC", "note", "See what is said of NVRTC.")
    except ValueError as error:
        cure = (
            "Unset FLASHCORE_ARCH, or name a known target."
            if override
            else "Install the CuPy package and NVRTC of the CUDA release that serves this GPU."
        )
        return Finding("target", _one_line(error), "problem", cure)


def _tensor_maps() -> Finding:
    """What some kernels have their arrays described with; targets without these do without."""
    try:
        driver.binding()
    except RuntimeError as error:
        with_maps = [kernel for kernel in KERNELS.values() if kernel.has_maps]
        needed = _has_gpu() and any(k.runs_on(compiler.device_arch()) for k in with_maps)
        cure = "Install it, or name another kernel, such as kernel='mma_sm80'."
        state: State = "problem" if needed else "note"
        return Finding("cuda-bindings", _one_line(error), state, cure)
    return Finding("cuda-bindings", importlib.metadata.version("cuda-bindings"))


def _headers() -> Finding:
    """CuPy's own kernels include CUDA headers; those of this package do not."""
    folders = [folder for folder in _header_folders() if (folder / "cuda_fp16.h").is_file()]
    if folders:
        return Finding("CUDA headers", str(folders[0]))
    cure = (
        "CuPy's own kernels need them: pip install nvidia-cuda-runtime-cu12 (beside cupy-cuda12x) "
        "or nvidia-cuda-runtime (beside cupy-cuda13x)."
    )
    return Finding("CUDA headers", "not found", _severity(), cure)


def _header_folders() -> Iterator[Path]:
    try:
        found = importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
    except Exception:  # an optional helper of CuPy's, with errors of its own
        found = None
    if found:
        yield Path(found)
    for root in (os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root:
            yield Path(root) / "include"


def _cache_folder() -> Finding:
    folder = cache.cache_dir()
    entries = cache.cache_entries()
    size = sum(entry.size_bytes for entry in entries) / 2**20
    damaged = sum(entry.damaged for entry in entries)
    value = f"{folder}: {len(entries)} kernels, {size:.1f} MiB"
    try:
        cache.probe_writable()
    except OSError as error:
        cure = "Every process compiles its kernels anew: set FLASHCORE_CACHE_DIR to your folder."
        return Finding("cache", f"{value}; cannot be written: {error}", "problem", cure)
    if os.name == "posix" and folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        cure = f"Others may put kernels there that run as you: chmod 700 {folder}."
        return Finding("cache", f"{value}; writable by others", "problem", cure)
    if damaged:
        cure = "They are rebuilt when asked for: nothing to do."
        return Finding("cache", f"{value}; {damaged} damaged", "note", cure)
    return Finding("cache", f"{value}, writable")


def _kernels_folder() -> Finding:
    try:
        folder = kernels_dir()
    except FileNotFoundError as error:
        return Finding("kernels", _one_line(error), "problem", "Reinstall flashcore-cupy.")
    count = len(source_files(folder))
    value = f"{folder}: {count} files, digest {kernels_digest(folder)}"
    if count == 0:
        return Finding("kernels", value, "problem", "Point FLASHCORE_KERNELS_DIR at kernels/.")
    return Finding("kernels", value)


def _compile() -> Finding:
    try:
        arch = settings().arch or (compiler.device_arch() if _has_gpu() else _fallback_arch())
        start = time.perf_counter()
        nvrtc.compile_text(_TINY, "tiny.cu", {}, arch)
    except Exception as error:
        cure = "Cure what is said of CuPy, NVRTC and the target first."
        return Finding("a tiny compile", _one_line(error), _severity(), cure)
    milliseconds = (time.perf_counter() - start) * 1e3
    return Finding("a tiny compile", f"for {arch} in {milliseconds:.0f} ms")


def _cpp_compiler() -> Finding:
    """What emulates kernels on the CPU, and has nothing to do with those on a GPU."""
    name, command = "C++ compiler", build.cxx()
    if command is None or build.why_not() is not None:
        return Finding(name, "none", "note", f"Kernels cannot be emulated: {build.why_not()}.")
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    version = (told.stdout.splitlines() or ["its version is unknown"])[0]
    return Finding(name, f"{version}, {' '.join(command)}: emulates kernels on the CPU")


def _first_cupy_call() -> Finding:
    if not _has_gpu():
        return Finding("a CuPy call", "not tried without a GPU", "note", "NumPy arrays work.")
    try:
        cupy = importlib.import_module("cupy")
        total = float((cupy.ones(4, cupy.float16) + cupy.float16(1)).sum())
    except Exception as error:
        cure = "CuPy itself does not work here: cure what is said of driver and headers first."
        return Finding("a CuPy call", _one_line(error), "problem", cure)
    if total != 8.0:
        cure = "The GPU computes wrongly: reinstall CuPy and the driver."
        return Finding("a CuPy call", f"2 + 2 + 2 + 2 = {total}", "problem", cure)
    return Finding("a CuPy call", "works")


def _runtime() -> Any:
    return importlib.import_module("cupy").cuda.runtime


def _has_gpu() -> bool:
    return compiler.no_gpu_reason() is None


def _fallback_arch() -> str:
    known = nvrtc.known_archs()
    return DEFAULT_ARCH if DEFAULT_ARCH in known else known[-1]


def _severity() -> State:
    """Return how bad it is that nothing can be compiled: a note where CuPy has no package."""
    return "problem" if cupy_packages() or sys.platform in ("linux", "win32") else "note"


def _loaded_library(name: str) -> str | None:
    """Return the path of the library that this process has loaded, where the system tells."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    found = re.search(rf"\S*/lib{name}\.so\S*", maps)
    return found[0] if found else None


def _one_line(error: Exception) -> str:
    text = " ".join(re.sub("={3,}", " ", str(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
