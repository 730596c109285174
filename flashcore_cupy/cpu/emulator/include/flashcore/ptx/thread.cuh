// ptx/thread.cuh on the CPU - which thread of which block this is.
#pragma once
#include <emulator/machine.hpp>
#include <flashcore/types.cuh>

namespace flashcore {

constexpr int CUDA_ARCH = __CUDA_ARCH__;

__forceinline__ uint32 thread_index() { return uint32(emulator::current().index); }
__forceinline__ int thread_index_volatile() { return emulator::current().index; }
__forceinline__ uint32 block_index() { return uint32(emulator::current().block); }
__forceinline__ uint32 grid_size() { return uint32(emulator::current().grid); }

// It begins at a multiple of 1024 bytes, whatever is asked for, and holds NaN.
template <int ALIGN>
__forceinline__ char* dynamic_shared() {
    static_assert(ALIGN <= 1024);
    return emulator::current().smem;
}

template <typename X>
__forceinline__ void keep_register(X*&) {}

}  // namespace flashcore
