"""Every ``FLASHCORE_*`` environment variable, read in this one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; ``None`` stands for "not set".

    Attributes:
        cache_dir: ``FLASHCORE_CACHE_DIR``, where compiled kernels are kept.
        kernels_dir: ``FLASHCORE_KERNELS_DIR``, another copy of ``kernels/`` to compile from.
        arch: ``FLASHCORE_ARCH``, the target to compile for instead of the device's own.
        cxxflags: ``FLASHCORE_CXXFLAGS``, more options for the C++ compiler of emulated kernels.
    """

    cache_dir: Path | None
    kernels_dir: Path | None
    arch: str | None
    cxxflags: str | None


def settings() -> Settings:
    """Read the environment as it is now; an empty variable counts as not set."""
    return Settings(
        cache_dir=_path("FLASHCORE_CACHE_DIR"),
        kernels_dir=_path("FLASHCORE_KERNELS_DIR"),
        arch=arch_override(),
        cxxflags=os.environ.get("FLASHCORE_CXXFLAGS") or None,
    )


def kernels_override() -> str | None:
    """``FLASHCORE_KERNELS_DIR`` as it stands: part of the key of every cache of kernels."""
    return os.environ.get("FLASHCORE_KERNELS_DIR")


def arch_override() -> str | None:
    """``settings().arch`` alone: it is asked at every call, and paths take their time."""
    return os.environ.get("FLASHCORE_ARCH") or None


def absolute(path: Path) -> Path:
    """Return the path from the root on, its ``~`` expanded; as it is where that cannot be known."""
    try:
        return path.expanduser().absolute()
    except (RuntimeError, OSError):  # there is no home folder, or no working folder
        return path


def _path(name: str) -> Path | None:
    text = os.environ.get(name)
    return absolute(Path(text)) if text else None
