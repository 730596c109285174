"""Where a result comes from: the GPU, its driver, the compiler, the kernels."""

from __future__ import annotations

import datetime
import importlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashcore_cupy._version import __version__
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.jit.sources import kernels_digest


@dataclass(frozen=True)
class Machine:
    """Where a result comes from. ``gpu`` and ``driver`` are None without a GPU."""

    gpu: str | None
    arch: str
    driver: str | None
    nvrtc: str | None
    cupy: str | None
    kernels_digest: str
    version: str
    date: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as they are."""
        return asdict(self)


def machine(arch: str) -> Machine:
    """Describe this machine and the moment; ``arch`` is the target that kernels are built for."""
    on_gpu = compiler.no_gpu_reason() is None
    return Machine(
        gpu=gpu_name() if on_gpu else None,
        arch=arch,
        driver=_driver() if on_gpu else None,
        nvrtc=_nvrtc(),
        cupy=_cupy_version(),
        kernels_digest=kernels_digest(),
        version=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def gpu_name() -> str:
    """Name of the current device, such as "NVIDIA H200"."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return str(name.decode() if isinstance(name, bytes) else name)


def _driver() -> str:
    import cupy

    cuda = int(cupy.cuda.runtime.driverGetVersion())
    text = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    try:
        report = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return text
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", report)
    return f"{found[0]} ({text})" if found else text


def _nvrtc() -> str | None:
    try:
        return ".".join(map(str, nvrtc.nvrtc_version()))
    except RuntimeError:
        return None


def _cupy_version() -> str | None:
    try:
        return str(importlib.import_module("cupy").__version__)
    except ImportError:
        return None
