"""Compiled kernels on disk: one folder per key, checked on every read, renamed into place.

An entry is ``<cache>/<key>/`` with ``kernel.cubin`` and ``entry.json``. It is built in a temporary
folder beside its final place and renamed, so it is whole or absent; of several processes that build
the same key, one wins and the others use its entry. A damaged entry reads as absent.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore_cupy.settings import settings

_KEY = re.compile(r"[0-9a-f]{32}")
_PARTIAL_PREFIX = ".partial-"
_PARTIAL_SECONDS = 3600.0  # an older partial folder belongs to a process that died
_CUBIN = "kernel.cubin"
_META = "entry.json"

_lock = threading.Lock()  # for the two names below
_private_dir: Path | None = None
_warned = False


@dataclass(frozen=True)
class CacheEntry:
    """One compiled kernel on disk.

    Attributes:
        key: the entry's 32 hex digits, also its folder's name.
        path: the entry's folder.
        source: the kernel's file, relative to ``kernels/``; empty if the entry is damaged.
        arch: the target it was compiled for; empty if the entry is damaged.
        defines: the preprocessor defines it was compiled with.
        size_bytes: bytes on disk.
        created: seconds since the epoch.
        damaged: the entry does not pass its checks and will be rebuilt when asked for.
    """

    key: str
    path: Path
    source: str
    arch: str
    defines: Mapping[str, int | str]
    size_bytes: int
    created: float
    damaged: bool


def cache_dir() -> Path:
    """Return the cache folder: ``FLASHCORE_CACHE_DIR``, else the platform's. It may not exist."""
    configured = settings().cache_dir
    if configured is not None:
        return configured
    import platformdirs

    return Path(platformdirs.user_cache_path("flashcore-cupy", False))


def find(key: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the cubin's path and the metadata stored under ``key``, or None if none is sound."""
    folders = [cache_dir()] if _private_dir is None else [cache_dir(), _private_dir]
    for folder in folders:
        meta = _read(folder / key)
        if meta is not None:
            return folder / key / _CUBIN, meta
    return None


def store(key: str, cubin: bytes, meta: Mapping[str, Any]) -> Path:
    """Keep ``cubin`` and ``meta`` (JSON-able) under ``key``; return the path of the cubin.

    Where the cache folder cannot be written, one warning is given and a temporary folder of this
    process serves instead.
    """
    record = dict(meta) | {"key": key}
    record["sha256"] = _checksum(cubin, record)
    try:
        return _publish(cache_dir(), key, cubin, record)
    except OSError as error:
        return _publish(_use_private_dir(error), key, cubin, record)


def probe_writable() -> None:
    """Make the cache folder if need be and write into it.

    Raises:
        OSError: it cannot be made or written.
    """
    _make(cache_dir())
    Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=cache_dir())).rmdir()


def ensure_writable() -> Path | None:
    """Find out now whether the cache folder can be written.

    Returns:
        None if it can; else the temporary folder that serves instead (one warning was given), for
        :func:`adopt_private_dir` in worker processes, so that what they store outlives them.
    """
    try:
        probe_writable()
    except OSError as error:
        return _use_private_dir(error)
    return None


def adopt_private_dir(folder: Path | None) -> None:
    """Let this process use the temporary folder that its parent fell back to."""
    global _private_dir, _warned
    _private_dir = folder
    _warned = folder is not None


def cache_entries() -> list[CacheEntry]:
    """Return every entry of the cache folder, oldest first; damaged ones are marked."""
    entries = [_describe(path) for path in _entry_paths()]
    return sorted(entries, key=lambda entry: (entry.created, entry.key))


def clear_cache() -> int:
    """Remove every entry, and nothing else, from the cache folder; return how many there were.

    Raises:
        OSError: an entry cannot be removed.
    """
    removed = 0
    for path in list(_entry_paths()):
        _remove(path)
        removed += 1
    for path in _children(cache_dir()):
        if path.name.startswith(_PARTIAL_PREFIX) and _age(path) > _PARTIAL_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    return removed


def _read(path: Path) -> dict[str, Any] | None:
    """Return an entry's metadata if its cubin is the one that was stored under this key."""
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        cubin = (path / _CUBIN).read_bytes()
    except (OSError, ValueError):
        return None
    if not isinstance(meta, dict) or meta.get("key") != path.name:
        return None
    stored = meta.pop("sha256", None)
    return meta if stored == _checksum(cubin, meta) else None


def _checksum(cubin: bytes, record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(cubin + text.encode()).hexdigest()


def _publish(folder: Path, key: str, cubin: bytes, record: Mapping[str, Any]) -> Path:
    _make(folder)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=folder))
    try:
        (partial / _CUBIN).write_bytes(cubin)
        (partial / _META).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _rename_into_place(partial, folder / key)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / key / _CUBIN


def _rename_into_place(partial: Path, final: Path) -> None:
    """Rename unless a sound entry stands there already; a damaged one makes way."""
    for _ in range(8):
        try:
            os.rename(partial, final)
            return
        except OSError:
            if _read(final) is not None:
                return
            if not os.path.lexists(final):
                raise
        aside = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=final.parent))
        try:
            os.rename(final, aside / "damaged")
        except FileNotFoundError:
            pass  # another process moved it first
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{final} keeps coming back damaged")


def _use_private_dir(error: OSError) -> Path:
    global _private_dir, _warned
    with _lock:
        if _private_dir is None:
            _private_dir = Path(tempfile.mkdtemp(prefix="flashcore-"))
            atexit.register(shutil.rmtree, _private_dir, ignore_errors=True)
        if not _warned:
            _warned = True
            warnings.warn(
                f"the kernel cache {cache_dir()} cannot be written ({error}): compiled kernels "
                "are kept for this process only. Set FLASHCORE_CACHE_DIR to a folder of yours",
                RuntimeWarning,
                stacklevel=2,
            )
        return _private_dir


def _make(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _entry_paths() -> Iterator[Path]:
    return (path for path in _children(cache_dir()) if _KEY.fullmatch(path.name))


def _describe(path: Path) -> CacheEntry:
    meta = _read(path)
    files = [path] if path.is_file() else _children(path)
    sound = meta or {}
    return CacheEntry(
        key=path.name,
        path=path,
        source=str(sound.get("source", "")),
        arch=str(sound.get("arch", "")),
        defines=dict(sound.get("defines", {})),
        size_bytes=sum(file.stat().st_size for file in files if file.is_file()),
        created=path.stat().st_mtime,
        damaged=meta is None,
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
