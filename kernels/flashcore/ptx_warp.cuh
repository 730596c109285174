// ptx_warp.cuh - exchange and synchronisation inside a warp and a thread block.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

constexpr uint32 FULL_WARP = 0xffffffffu;

__device__ __forceinline__ float shfl_xor(float x, int lane_mask) {
    return __shfl_xor_sync(FULL_WARP, x, lane_mask);
}

__device__ __forceinline__ float shfl(float x, int source_lane) {
    return __shfl_sync(FULL_WARP, x, source_lane);
}

// Orders shared memory among the 32 lanes of a warp.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// Orders shared memory among all threads of the block.
__device__ __forceinline__ void block_sync() { __syncthreads(); }

// Whether the condition holds in any lane; the same answer in all of them.
__device__ __forceinline__ bool warp_any(bool condition) {
    return __any_sync(FULL_WARP, condition);
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

}  // namespace flashcore
