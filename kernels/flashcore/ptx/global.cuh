// ptx/global.cuh - global memory shared between thread blocks of one launch.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

// What this thread wrote before is visible on the whole GPU before what it writes after.
__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Adds and returns the old value.
__device__ __forceinline__ int atomic_add(int* counter, int x) {
    int old;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(counter), "r"(x)
                 : "memory");
    return old;
}

// Adds to four neighbouring floats, each by itself, sometime and in no order (sm_90 and later). The
// address is a multiple of 16 bytes.
__device__ __forceinline__ void red_add(float* address, const float4& x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
}

// Adds; nobody waits for it.
__device__ __forceinline__ void red_add(int* counter, int x) {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(x) : "memory");
}

// Reads what other CTAs count. What they did before they fenced and counted, this thread sees.
__device__ __forceinline__ int read_count(const int* counter) {
    int now;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    return now;
}

// A load from L2, past this multiprocessor's L1, which does not see what other CTAs have stored.
__device__ __forceinline__ float load_l2(const float* address) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(address) : "memory");
    return x;
}

__device__ __forceinline__ float2 load_l2(const float2* address) {
    float2 x;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "l"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ float4 load_l2(const float4* address) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(address)
                 : "memory");
    return x;
}

}  // namespace flashcore
