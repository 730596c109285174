// ptx/thread.cuh - which thread of which block this is, the shared memory that the launch gives to
// the block, and what the target can do. Grids and blocks have one dimension here.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

// The target's compute capability: 900 for sm_90 and sm_90a.
constexpr int CUDA_ARCH = __CUDA_ARCH__;

// %tid.x: this thread's number in its block. Unsigned: / and % are shifts and masks. (A macro:
// the compiler simplifies an inlined function later, and uses more registers for it.)
#define thread_index() (threadIdx.x)

// The same, read again at every use: what is computed from it is then not kept in registers during
// a loop.
__device__ __forceinline__ int thread_index_volatile() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    __builtin_assume(index >= 0 && index < 1024);  // so that / and % are shifts and masks
    return index;
}

// %ctaid.x: the block's number in the grid.
__device__ __forceinline__ uint32 block_index() { return blockIdx.x; }

// %nctaid.x: how many blocks the grid has.
__device__ __forceinline__ uint32 grid_size() { return gridDim.x; }

// The shared memory whose size the launch says; it begins at a multiple of ALIGN bytes.
template <int ALIGN>
__device__ __forceinline__ char* dynamic_shared() {
    extern __shared__ __align__(ALIGN) char smem_raw[];
    return smem_raw;
}

// No instruction: the value is computed before this, rather than where it is used.
template <typename X>
__device__ __forceinline__ void keep_register(X*& x) {
    asm volatile("" : "+l"(x));
}

}  // namespace flashcore
