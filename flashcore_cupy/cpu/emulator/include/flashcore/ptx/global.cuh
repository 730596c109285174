// ptx/global.cuh on the CPU - blocks are on several cores, so atomics and fences are real.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ void fence_gpu() { std::atomic_thread_fence(std::memory_order_seq_cst); }

__forceinline__ int atomic_add(int* counter, int x) {
    return __atomic_fetch_add(counter, x, __ATOMIC_RELAXED);
}

__forceinline__ float load_l2(const float* address) {
    return *const_cast<const volatile float*>(address);
}
__forceinline__ float2 load_l2(const float2* address) { return *address; }
__forceinline__ float4 load_l2(const float4* address) { return *address; }

}  // namespace flashcore
