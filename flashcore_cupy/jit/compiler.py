"""From source, defines and target to a loaded kernel: NVRTC → cubin → disk cache → CuPy module.

A cubin is bytes all along: no path of this machine reaches the compiler or the driver.

The target is explicit, so a machine without a GPU compiles for any GPU, and sm_90a (which CuPy
alone never asks for) is available. The kernels include no CUDA header: NVRTC is all it takes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from flashcore_cupy._version import __version__
from flashcore_cupy.cuda.targets import target_of
from flashcore_cupy.jit import cache, nvrtc
from flashcore_cupy.jit.nvrtc import (
    Defines,
    EntryResources,
    Headers,
    nvrtc_version,
)
from flashcore_cupy.jit.sources import kernels_digest, kernels_dir
from flashcore_cupy.settings import arch_override

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import cupy

__all__ = [
    "CompiledKernel",
    "allow_shared_memory",
    "compile_each",
    "compile_kernel",
    "compile_many",
    "device_arch",
    "load",
    "no_gpu_reason",
]

Job = tuple[str, Defines, str] | tuple[str, Defines, str, Headers]
"""Arguments of `compile_kernel`."""


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for one target.

    Attributes:
        source: file relative to ``kernels/``.
        arch: target, such as ``"sm_90a"``.
        defines: preprocessor defines.
        cubin: what the driver loads.
        from_cache: no compiler ran for this one.
        compile_seconds: how long the compiler took, then or now.
        entries: resources by entry point's name.
        log: the compiler's output.
        headers: generated headers, names and texts.
    """

    source: str
    arch: str
    defines: Defines
    cubin: bytes = field(repr=False)
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
    job = source, defines, arch, headers
    return _look_up(job) or _keep(_build(job))


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

    def done(indices: Sequence[int], result: CompiledKernel | Exception) -> None:
        for index in indices:
            results[index] = result
            if on_done is not None:
                on_done(result)

    missing: dict[str, list[int]] = {}  # by key: a job that is there twice is compiled once
    for index, job in enumerate(jobs):
        try:
            key, _ = _identify(*job)
            found = _from_cache(key)
        except Exception as error:
            done([index], error)
            continue
        if found is None:
            missing.setdefault(key, []).append(index)
        else:
            done([index], found)
    left = {indices[0]: indices for indices in missing.values()}
    workers = min(workers or usable_cores(), len(left))
    if workers > 1:
        todo = {index: jobs[index] for index in left}
        with contextlib.closing(_build_in_processes(todo, workers)) as built:
            for index, result in built:
                done(left.pop(index), _kept(result))
    for index, indices in left.items():
        done(indices, _kept(_try_build(jobs[index])))
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
    same_generation = [
        number
        for number in nvrtc.arch_numbers()
        if number // 10 == capability // 10 and number <= capability
    ]
    if not same_generation:
        raise nvrtc.unknown_arch(f"sm_{capability}")
    nearest = max(same_generation)
    return target_of(capability) if nearest == capability else f"sm_{nearest}"


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


def load(compiled: CompiledKernel) -> cupy.cuda.Module:
    """Load a kernel on the current device; the same module again for the same kernel and device."""
    cupy = importlib.import_module("cupy")
    return _load(compiled.cubin, cupy.cuda.Device().id)


@functools.cache
def _load(cubin: bytes, device: int) -> cupy.cuda.Module:
    module = importlib.import_module("cupy").cuda.Module()
    module.load(cubin)
    return module


def allow_shared_memory(function: cupy.cuda.Function, size: int) -> None:
    """Let launches of ``function`` take ``size`` bytes of dynamic shared memory, above 48 KiB."""
    driver = importlib.import_module("cupy").cuda.driver
    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.funcSetAttribute(function.ptr, attribute, size)


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
    import hashlib  # late: it loads OpenSSL, 7 ms

    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32], identity


def _look_up(job: Job) -> CompiledKernel | None:
    return _from_cache(_identify(*job)[0])


def _from_cache(key: str) -> CompiledKernel | None:
    found = cache.find(key)
    return None if found is None else _as_compiled(*found, from_cache=True)


def _as_compiled(cubin: bytes, meta: Mapping[str, Any], *, from_cache: bool) -> CompiledKernel:
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


class _Built(NamedTuple):
    """What the cache takes."""

    key: str
    cubin: bytes
    meta: dict[str, Any]


def _build(job: Job) -> _Built:
    key, identity = _identify(*job)
    start = time.perf_counter()
    cubin, log = nvrtc.compile_source(kernels_dir(), *job)
    meta = identity | {
        "compile_seconds": time.perf_counter() - start,
        "entries": {name: asdict(entry) for name, entry in nvrtc.parse_resources(log).items()},
        "log": log,
    }
    return _Built(key, cubin, meta)


def _try_build(job: Job) -> _Built | Exception:
    try:
        return _build(job)
    except Exception as error:
        return error


def _keep(built: _Built) -> CompiledKernel:
    cache.store(*built)
    return _as_compiled(built.cubin, built.meta, from_cache=False)


def _kept(result: _Built | Exception) -> CompiledKernel | Exception:
    return result if isinstance(result, Exception) else _keep(result)


def _build_in_processes(
    jobs: Mapping[int, Job], workers: int
) -> Generator[tuple[int, _Built | Exception], None, None]:
    """Yield what worker processes make of the jobs, as they finish.

    Not every job, or none, where processes cannot be started or come to an end: in an exit
    handler, in a process that may have no children, when the system kills one for its memory.
    """
    try:
        # Imported here: a process that only looks kernels up in the cache starts without them.
        # And after the main thread's end it cannot be imported.
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor, as_completed

        # Spawned, because a forked child must not use the parent's CUDA context.
        context = multiprocessing.get_context("spawn")
        theirs, ours = context.Pipe(duplex=False)
        with theirs, ours, ProcessPoolExecutor(workers, context, _end_with, (theirs,)) as pool:
            try:
                futures = {pool.submit(_try_build, job): index for index, job in jobs.items()}
                for future in as_completed(futures):
                    if future.exception() is None:
                        yield futures[future], future.result()
            except BaseException:
                ours.close()  # ends the workers: who is interrupted does not wait for compilers
                raise
    except Exception:
        return


def _end_with(parent: Connection) -> None:
    """Let this worker process end when its parent does, whatever ends it, or closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent answers for all

    def wait_for_the_end() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv_bytes()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def _value(result: CompiledKernel | Exception) -> CompiledKernel:
    if isinstance(result, Exception):
        raise result
    return result


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
