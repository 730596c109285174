// ptx/warp.cuh - exchange and synchronisation inside a warp and a thread block.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

constexpr uint32 FULL_WARP = 0xffffffffu;

__device__ __forceinline__ float shfl_xor(float x, int lane_mask) {
    return __shfl_xor_sync(FULL_WARP, x, lane_mask);
}

__device__ __forceinline__ uint32 shfl_xor(uint32 x, int lane_mask) {
    return __shfl_xor_sync(FULL_WARP, x, lane_mask);
}

__device__ __forceinline__ float shfl(float x, int source_lane) {
    return __shfl_sync(FULL_WARP, x, source_lane);
}

__device__ __forceinline__ int shfl(int x, int source_lane) {
    return __shfl_sync(FULL_WARP, x, source_lane);
}

__device__ __forceinline__ uint32 shfl(uint32 x, int source_lane) {
    return __shfl_sync(FULL_WARP, x, source_lane);
}

// Orders shared memory among the 32 lanes of a warp.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// Orders shared memory among all threads of the block.
__device__ __forceinline__ void block_sync() { __syncthreads(); }

// Orders shared memory among `threads` threads, whole warps, that meet at barrier `id` (1 to 15; 0
// is block_sync's).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether the condition holds in any lane; the same answer in all of them.
__device__ __forceinline__ bool warp_any(bool condition) {
    return __any_sync(FULL_WARP, condition);
}

// In how many lanes the condition holds.
__device__ __forceinline__ int warp_count(bool condition) {
    return __popc(__ballot_sync(FULL_WARP, condition));
}

// Of how many lanes from the first on the condition holds, without a gap.
__device__ __forceinline__ int warp_leading_count(bool condition) {
    const uint32 lanes = __ballot_sync(FULL_WARP, condition);
    return __popc(lanes & ~(lanes + 1));
}

// True in one lane of a converged warp (sm_90 and later). After a comparison of lane numbers the
// compiler puts a loop over the active lanes around each TMA instruction; here it knows that there
// is one.
__device__ __forceinline__ bool elect_one() {
    uint32 elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, %1;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}"
        : "=r"(elected)
        : "r"(FULL_WARP));
    return elected != 0;
}

// Maximum over groups of WIDTH neighbouring lanes (a power of two); every lane gets it.
template <int WIDTH>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int mask = WIDTH / 2; mask > 0; mask /= 2) x = fmaxf(x, shfl_xor(x, mask));
    return x;
}

template <int WIDTH>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int mask = WIDTH / 2; mask > 0; mask /= 2) x += shfl_xor(x, mask);
    return x;
}

// Transposes 4 x 4 words among four neighbouring lanes: lane i has x[j], and lane j gets it as
// x[i].
__device__ __forceinline__ void quad_transpose(uint32 (&x)[4]) {
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) {
        const bool upper = thread_index() & mask;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & mask) continue;
            // The lower lane keeps x[i] and gives x[i + mask], the upper one the other way round.
            const uint32 got = shfl_xor(upper ? x[i] : x[i + mask], mask);
            (upper ? x[i] : x[i + mask]) = got;
        }
    }
}

}  // namespace flashcore
