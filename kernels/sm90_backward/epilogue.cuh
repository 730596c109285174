// epilogue.cuh - how a consumer of bwd_sm90.cu stores its rows of the gradients: from registers.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/ptx/warp.cuh>
#include <sm90_backward/store.cuh>
#include <sm90_backward/traits.cuh>

namespace flashcore {

// Stores what the lane's queries add to the slopes' gradient: bwd_heads.cu adds it up.
__device__ __forceinline__ void store_distances(const WarpContext& c, const float (&distances)[2]) {
    const Work& w = c.work;
    const int64 first = statistics_row(c.params, c.array_batch(), w.head) + w.start_q;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = group_sum<QUAD>(distances[half]);
        const int query = w.first_row + c.row(0, half);
        if (c.lane % QUAD == 0 && query < w.seqlen_q) c.params.distances[first + query] = sum;
    }
}

// Stores dK and dV, or dQ.
__device__ __forceinline__ void store_gradients(const WarpContext& c,
                                                const float (&rQK)[HEAD_DIM / 2],
                                                const float (&rVO)[HEAD_DIM_V / 2],
                                                const float (&distances)[2]) {
    const BackwardParams& p = c.params;
    if constexpr (SUMS_DISTANCES) store_distances(c, distances);
    if constexpr (OWNS_KEYS) {
        if (p.dv != nullptr)
            store_gradient<2, DIM_V>(c, rVO, keep_scale<RULES>(p), p.dv, p.dv_strides);
    }
    void* const gradient = OWNS_KEYS ? p.dk : p.dq;
    if (gradient != nullptr)
        store_gradient<1, DIM_QK>(c, rQK, p.softmax_scale, gradient,
                                  OWNS_KEYS ? p.dk_strides : p.dq_strides);
}

}  // namespace flashcore
