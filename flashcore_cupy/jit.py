"""From source, defines and target to a loaded kernel: NVRTC → cubin → disk cache → CuPy module.

The target is explicit, so a machine without a GPU compiles for any GPU, and sm_90a (which CuPy
alone never asks for) is available. The kernels include no CUDA header: NVRTC is all it takes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashcore_cupy import cache, nvrtc
from flashcore_cupy._version import __version__
from flashcore_cupy.cache import CacheEntry, cache_dir, cache_entries, clear_cache
from flashcore_cupy.nvrtc import (
    CompileError,
    Defines,
    EntryResources,
    Headers,
    UnknownArchError,
    known_archs,
    nvrtc_version,
)
from flashcore_cupy.settings import arch_override
from flashcore_cupy.sources import kernels_digest, kernels_dir

if TYPE_CHECKING:
    import cupy

__all__ = [
    "CacheEntry",
    "CompileError",
    "CompiledKernel",
    "EntryResources",
    "UnknownArchError",
    "cache_dir",
    "cache_entries",
    "clear_cache",
    "compile_each",
    "compile_kernel",
    "compile_many",
    "device_arch",
    "known_archs",
    "load",
    "no_gpu_reason",
    "nvrtc_version",
]

Job = tuple[str, Defines, str] | tuple[str, Defines, str, Headers]
"""Arguments of `compile_kernel`."""


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for one target, as a file.

    Attributes:
        source: file relative to ``kernels/``.
        arch: target, such as ``"sm_90a"``.
        defines: preprocessor defines.
        cubin: the file to load.
        from_cache: no compiler ran for this one.
        compile_seconds: how long the compiler took, then or now.
        entries: resources by entry point's name.
        log: the compiler's output.
        headers: generated headers, names and texts.
    """

    source: str
    arch: str
    defines: Defines
    cubin: Path
    from_cache: bool
    compile_seconds: float
    entries: Mapping[str, EntryResources]
    log: str
    headers: Headers = ()


def compile_kernel(
    source: str, defines: Defines, arch: str, headers: Headers = ()
) -> CompiledKernel:
    """Compile ``source`` (relative to ``kernels/``) for ``arch``, or take it from the cache.

    ``headers`` (names and texts) stand in for files of ``kernels/``.

    Raises:
        CompileError: the compiler rejects it.
        UnknownArchError: this NVRTC has no such target.
        FileNotFoundError: there is no such source.
        RuntimeError: CuPy or NVRTC is missing.
    """
    key, identity = _identify(source, defines, arch, headers)
    found = _from_cache(key)
    if found is not None:
        return found
    start = time.perf_counter()
    cubin, log = nvrtc.compile_source(kernels_dir(), source, defines, arch, headers)
    meta = identity | {
        "compile_seconds": time.perf_counter() - start,
        "entries": {name: asdict(entry) for name, entry in nvrtc.parse_resources(log).items()},
        "log": log,
    }
    return _describe(cache.store(key, cubin, meta), meta, from_cache=False)


def compile_many(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    on_done: Callable[[CompiledKernel | Exception], None] | None = None,
) -> list[CompiledKernel]:
    """:func:`compile_each`, where one that fails is an error.

    Raises:
        Exception: that of the first job that failed, once all the others are done.
    """
    return [_value(result) for result in compile_each(jobs, workers=workers, on_done=on_done)]


def compile_each(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    on_done: Callable[[CompiledKernel | Exception], None] | None = None,
) -> list[CompiledKernel | Exception]:
    """Compile many kernels at once, in worker processes as far as the cache does not have them.

    Args:
        jobs: ``(source, defines, arch)`` each, as for :func:`compile_kernel`.
        workers: processes at once; default: as many as this process may use cores.
        on_done: called in this process with each result, in the order in which they finish.

    Returns:
        The compiled kernels in the order of ``jobs``; for one that failed, its exception.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    results: dict[int, CompiledKernel | Exception] = {}

    def done(index: int, result: CompiledKernel | Exception) -> None:
        results[index] = result
        if on_done is not None:
            on_done(result)

    missing = []
    for index, job in enumerate(jobs):
        found = _look_up(job)
        if found is None:
            missing.append(index)
        else:
            done(index, found)
    workers = min(workers or _usable_cores(), len(missing))
    if workers <= 1:
        for index in missing:
            done(index, _compile_job(jobs[index]))
    else:
        _compile_in_processes(jobs, missing, workers, done)
    return [results[index] for index in range(len(jobs))]


def device_arch(device: int | None = None) -> str:
    """Return the target for a CUDA device (default: the current one), such as ``"sm_90a"``.

    ``FLASHCORE_ARCH`` overrides it. Where this NVRTC is older than the device, the nearest lower
    target of the same generation serves, whose code the device runs too.

    Raises:
        UnknownArchError: this NVRTC has no target that the device could run.
        cupy.cuda.runtime.CUDARuntimeError: there is no such device, or no driver.
    """
    override = arch_override()
    if override is not None:
        nvrtc.check_arch(override)
        return override
    cupy = importlib.import_module("cupy")
    return _arch_of(cupy.cuda.Device().id if device is None else device)


@functools.cache
def _arch_of(device: int) -> str:
    cupy = importlib.import_module("cupy")
    capability = int(cupy.cuda.Device(device).compute_capability)
    if capability == 90:
        return "sm_90a"  # wgmma and its relatives exist only there
    same_generation = [
        number
        for number in nvrtc.arch_numbers()
        if number // 10 == capability // 10 and number <= capability
    ]
    if not same_generation:
        raise nvrtc.unknown_arch(f"sm_{capability}")
    return f"sm_{max(same_generation)}"


def no_gpu_reason() -> str | None:
    """Return why no CUDA device can be used here, as a clause for a message; None if one can."""
    try:
        runtime = importlib.import_module("cupy").cuda.runtime
    except ModuleNotFoundError:
        return "CuPy is not installed"
    except ImportError:
        return "CuPy cannot be imported (`flashcore-cupy doctor` says why)"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if runtime.driverGetVersion() == 0:
            return "there is no NVIDIA driver"
        return str(error)
    return None if count else "there is no CUDA device"


def load(compiled: CompiledKernel) -> cupy.RawModule:
    """Load a kernel on the current device; the same module again for the same kernel and device."""
    cupy = importlib.import_module("cupy")
    cubin = compiled.cubin
    if not cubin.is_file():  # somebody cleared the cache meanwhile
        cubin = compile_kernel(
            compiled.source, compiled.defines, compiled.arch, compiled.headers
        ).cubin
    return _load(str(cubin), cupy.cuda.Device().id)


@functools.cache
def _load(cubin: str, device: int) -> cupy.RawModule:
    return importlib.import_module("cupy").RawModule(path=cubin)


def _identify(
    source: str, defines: Defines, arch: str, headers: Headers = ()
) -> tuple[str, dict[str, Any]]:
    """Return the cache key and what it is made of: everything that decides the cubin's bytes."""
    root = kernels_dir()
    if not (root / source).is_file():
        raise FileNotFoundError(f"no kernel {source!r} in {root}")
    nvrtc.check_arch(arch)
    identity = {
        "source": source,
        "defines": dict(sorted(defines.items())),
        "headers": [list(header) for header in headers],
        "arch": arch,
        "options": nvrtc.OPTIONS,
        "kernels_digest": kernels_digest(root),
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32], identity


def _from_cache(key: str) -> CompiledKernel | None:
    found = cache.find(key)
    return None if found is None else _describe(*found, from_cache=True)


def _describe(cubin: Path, meta: Mapping[str, Any], *, from_cache: bool) -> CompiledKernel:
    return CompiledKernel(
        source=meta["source"],
        arch=meta["arch"],
        defines=meta["defines"],
        cubin=cubin,
        from_cache=from_cache,
        compile_seconds=meta["compile_seconds"],
        entries={name: EntryResources(**entry) for name, entry in meta["entries"].items()},
        log=meta["log"],
        headers=tuple((name, text) for name, text in meta["headers"]),
    )


def _look_up(job: Job) -> CompiledKernel | Exception | None:
    try:
        return _from_cache(_identify(*job)[0])
    except Exception as error:
        return error


def _compile_job(job: Job) -> CompiledKernel | Exception:
    try:
        return compile_kernel(*job)
    except Exception as error:
        return error


def _compile_in_processes(
    jobs: Sequence[Job],
    missing: Sequence[int],
    workers: int,
    done: Callable[[int, CompiledKernel | Exception], None],
) -> None:
    # Imported here: a process that only looks kernels up in the cache starts without them.
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    # Spawned, because a forked child must not use the parent's CUDA context.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=cache.adopt_private_dir,
        initargs=(cache.ensure_writable(),),
    )
    with pool:
        futures = {pool.submit(_compile_job, jobs[index]): index for index in missing}
        try:
            for future in as_completed(futures):
                failure = future.exception()
                result = failure if isinstance(failure, Exception) else future.result()
                done(futures[future], result)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _value(result: CompiledKernel | Exception) -> CompiledKernel:
    if isinstance(result, Exception):
        raise result
    return result


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
