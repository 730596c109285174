// ptx/global.cuh on the CPU - blocks are on several cores, so atomics and fences are real.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

inline void fence_gpu() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline int atomic_add(int* counter, int x) {
    return __atomic_fetch_add(counter, x, __ATOMIC_RELAXED);
}

inline float load_l2(const float* address) { return *const_cast<const volatile float*>(address); }
inline float2 load_l2(const float2* address) { return *address; }
inline float4 load_l2(const float4* address) { return *address; }

}  // namespace flashcore
