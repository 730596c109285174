// block_sum.cuh - the sum of a number that each thread of a CTA has, in an order that is the same
// each time.
#pragma once
#include <config.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>

namespace flashcore {

struct SharedSums {
    float sums[NUM_WARPS];
};
static_assert(sizeof(SharedSums) <= SMEM_BYTES, "flashcore_cupy/select computes this size");

// Adds up a number of each thread; thread 0 gets the sum.
__device__ __forceinline__ float block_sum(SharedSums& smem, float x) {
    x = group_sum<WARP_SIZE>(x);
    block_sync();  // the sums of the call before have been read
    if (thread_index() % WARP_SIZE == 0) smem.sums[thread_index() / WARP_SIZE] = x;
    block_sync();  // all warps have written theirs
    float sum = 0.0f;
    for (int warp = 0; warp < NUM_WARPS; ++warp) sum += smem.sums[warp];
    return sum;
}

}  // namespace flashcore
