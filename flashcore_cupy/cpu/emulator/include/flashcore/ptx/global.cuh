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

__forceinline__ void red_add(int* counter, int x) { emulator::atomic_add(counter, x); }

// Whoever reads it waits for other blocks, which are on other cores, or done: blocks begin in the
// order of their numbers.
__forceinline__ int read_count(const int* counter) {
    emulator::let_others_go("what other blocks count");
    const int now = atomic_add(const_cast<int*>(counter), 0);
    fence_gpu();
    return now;
}

__forceinline__ void red_add(float* address, const float4& x) {
    if (reinterpret_cast<uint64>(address) % 16)
        emulator::fail("red: the address is no multiple of 16 bytes");
    const float each[4] = {x.x, x.y, x.z, x.w};
    emulator::red_add(address, each, 4);
}

// A CPU's caches see what others have stored.
__forceinline__ float load_l2(const float* address) { return *address; }
__forceinline__ float2 load_l2(const float2* address) { return *address; }
__forceinline__ float4 load_l2(const float4* address) { return *address; }

}  // namespace flashcore
