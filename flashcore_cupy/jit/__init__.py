"""How a kernel is built: text, defines and a target become a cubin. Knows nothing of attention."""

from flashcore_cupy.jit.cache import CacheEntry, cache_dir, cache_entries, clear_cache
from flashcore_cupy.jit.compiler import (
    CompiledKernel,
    compile_each,
    compile_kernel,
    compile_many,
    device_arch,
    load,
    no_gpu_reason,
)
from flashcore_cupy.jit.nvrtc import (
    CompileError,
    EntryResources,
    UnknownArchError,
    known_archs,
    nvrtc_version,
)

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
