"""Compiled kernels on disk: one folder per key, checked on every read, renamed into place.

An entry is ``<cache>/<key>/`` with ``kernel.cubin``, or ``kernel.so`` for a CPU, and
``entry.json``. It is built in a temporary folder beside its final place and renamed, so it is whole
or absent; of several processes that build the same key, one wins and its entry stays. A damaged
entry reads as absent. What cannot be written stays in the memory of this process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore_cupy.settings import absolute, settings

_KEY = re.compile(r"[0-9a-f]{32}")
_PARTIAL_PREFIX = ".partial-"
_PARTIAL_SECONDS = 3600.0  # an older partial folder belongs to a process that died
_CUBIN = "kernel.cubin"
LIBRARY = "kernel.so"
_META = "entry.json"

_unwritten: dict[str, tuple[bytes, dict[str, Any]]] = {}


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
    """Return the cache folder: ``FLASHCORE_CACHE_DIR``, else the platform's.

    It may not exist. If it is not absolute, no home or working folder is known for it, and it
    counts as a folder that cannot be written.
    """
    configured = settings().cache_dir
    if configured is not None:
        return configured
    import platformdirs

    try:
        return absolute(platformdirs.user_cache_path("flashcore-cupy", False))
    except RuntimeError:  # what newer releases say where there is no home folder
        return Path("~/.cache/flashcore-cupy")


def find(key: str) -> tuple[bytes, dict[str, Any]] | None:
    """Return the content and the metadata stored under ``key``, or None if none is sound."""
    return _read(cache_dir() / key) or _unwritten.get(key)


def path_of(key: str) -> Path | None:
    """Return where the file lies that is stored under ``key``; None if none is sound on disk."""
    found = _read(cache_dir() / key)
    return None if found is None else cache_dir() / key / _file_of(found[1])


def store(key: str, content: bytes, meta: Mapping[str, Any]) -> None:
    """Keep ``content`` and ``meta`` (JSON-able) under ``key``.

    It is a cubin, or with ``meta["file"] = LIBRARY`` a library for this machine's CPU.

    Where the cache folder cannot be written, this process keeps them in memory, with one warning.
    """
    try:
        _publish(cache_dir(), key, content, dict(meta))
    except OSError as error:
        first = not _unwritten
        _unwritten[key] = content, dict(meta)
        if first:
            warnings.warn(
                f"the kernel cache {cache_dir()} cannot be written ({error}): kernels stay in "
                "memory, and every process compiles them anew. Set FLASHCORE_CACHE_DIR to a "
                "folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )


def probe_writable() -> None:
    """Make the cache folder if need be and write into it.

    Raises:
        OSError: it cannot be made or written.
    """
    with _partial(cache_dir()) as folder:
        (folder / _CUBIN).write_bytes(bytes(4096))  # on a full disk folders can still be made


def cache_entries() -> list[CacheEntry]:
    """Return every entry of the cache folder, oldest first; damaged ones are marked."""
    entries = [_read_entry(path) for path in _entry_paths()]
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


def _read(path: Path) -> tuple[bytes, dict[str, Any]] | None:
    """Return an entry's content and metadata if they are what was stored under this key."""
    if not path.is_absolute():
        return None
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        content = (path / _file_of(meta)).read_bytes()
    except (OSError, ValueError):
        return None
    if not isinstance(meta, dict) or meta.pop("key", None) != path.name:
        return None
    is_sound = meta.pop("sha256", None) == _checksum(path.name, content, meta)
    return (content, meta) if is_sound else None


def _file_of(meta: Any) -> str:
    is_library = isinstance(meta, dict) and meta.get("file") == LIBRARY
    return LIBRARY if is_library else _CUBIN


def _checksum(key: str, content: bytes, meta: Mapping[str, Any]) -> str:
    text = json.dumps({**meta, "key": key}, sort_keys=True)
    import hashlib  # late: it loads OpenSSL, 7 ms

    return hashlib.sha256(content + text.encode()).hexdigest()


def _publish(folder: Path, key: str, content: bytes, meta: dict[str, Any]) -> None:
    record = meta | {"key": key, "sha256": _checksum(key, content, meta)}
    with _partial(folder) as partial:
        (partial / _file_of(meta)).write_bytes(content)
        (partial / _META).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _rename_into_place(partial, folder / key)


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """Make a temporary folder in the cache folder, which is made if need be."""
    if not folder.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "no home or working folder is known", str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    partial = tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=folder)
    try:
        yield Path(partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        # Another process may move it first.
        with _partial(final.parent) as aside, contextlib.suppress(FileNotFoundError):
            os.rename(final, aside / "damaged")
    raise OSError(f"{final} keeps coming back damaged")


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_absolute() else []
    except OSError:
        return []


def _entry_paths() -> Iterator[Path]:
    return (path for path in _children(cache_dir()) if _KEY.fullmatch(path.name))


def _read_entry(path: Path) -> CacheEntry:
    found = _read(path)
    sound = found[1] if found else {}
    files = [path] if os.path.isfile(path) else _children(path)
    return CacheEntry(
        key=path.name,
        path=path,
        source=str(sound.get("source", "")),
        arch=str(sound.get("arch", "")),
        defines=dict(sound.get("defines", {})),
        size_bytes=sum(_size_and_time(file)[0] for file in files),
        created=_size_and_time(path)[1],
        damaged=found is None,
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _age(path: Path) -> float:
    return time.time() - _size_and_time(path)[1]


def _size_and_time(path: Path) -> tuple[int, float]:
    """Bytes, and seconds since the epoch; of what is gone or hidden, none and now."""
    try:
        status = path.stat()
    except OSError:
        return 0, time.time()
    return status.st_size, status.st_mtime
