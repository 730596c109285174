"""A small kernel, and how tests of the JIT compile it."""

from __future__ import annotations

from flashcore_cupy.jit import compiler, nvrtc

HEADER = "#pragma once\nconstexpr int STEP = FC_STEP;\n"
ENTRY = """#include <flashcore/part.cuh>

extern "C" __global__ void demo(int* x) {
    __shared__ int tile[4];
    tile[threadIdx.x & 3] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = tile[(threadIdx.x + STEP) & 3];
}
"""
DEFINES = {"FC_STEP": 1}
ARCH = "sm_90a"


def compile_demo(**changes: object) -> compiler.CompiledKernel:
    job: dict[str, object] = {"source": "demo.cu", "defines": DEFINES, "arch": ARCH} | changes
    return compiler.compile_kernel(**job)  # type: ignore[arg-type]


def compile_at_once(barrier: object, queue: object) -> None:
    nvrtc.nvrtc_version()  # loads the library, so that the compiles overlap
    barrier.wait(timeout=120)  # type: ignore[attr-defined]
    kernel = compile_demo()
    queue.put(kernel.cubin)  # type: ignore[attr-defined]
