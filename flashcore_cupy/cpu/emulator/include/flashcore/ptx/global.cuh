// ptx/global.cuh on the CPU - blocks are on several cores, so atomics are atomics of the CPU. They
// are sequentially consistent: what a fence adds on a GPU, only a checking build asks for.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Two blocks tell each other something like this: the one writes, fences, and changes a counter;
// the other one changes the counter after that, fences, and reads. Without both fences the counter
// alone orders nothing.
__forceinline__ void fence_gpu() { emulator::fence_for_gpu(); }

__forceinline__ int atomic_add(int* counter, int x) { return emulator::atomic_add(counter, x); }

// A CPU's caches see what others have stored.
__forceinline__ float load_l2(const float* address) { return *address; }
__forceinline__ float2 load_l2(const float2* address) { return *address; }
__forceinline__ float4 load_l2(const float4* address) { return *address; }

}  // namespace flashcore
