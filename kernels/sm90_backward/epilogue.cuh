// epilogue.cuh - how a consumer of bwd_sm90.cu stores its rows of the gradients: from registers.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/ptx/warp.cuh>
#include <sm90_backward/traits.cuh>

namespace flashcore {

// Stores a gradient's rows, multiplied by `factor`; WHICH: 1 for dq and dk, 2 for dv.
template <int WHICH, int VALID_COLS, int COUNT>
__device__ __forceinline__ void store_gradient(const WarpContext& c, const float (&x)[COUNT],
                                               float factor, void* base, const Strides& strides) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        bool valid;
        if constexpr (ACCUMULATES || FP32_GRADIENTS & WHICH) {
            float* const gRow = c.own_row<float>(base, strides, c.row(0, half), valid);
#pragma unroll
            for (int n = 0; n < COUNT / 4; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int col = n * 8 + c.lane % QUAD * 2 + e;
                    if (!valid || col >= VALID_COLS) continue;
                    const float sum = x[4 * n + 2 * half + e] * factor;
                    gRow[col] = ACCUMULATES ? gRow[col] + sum : sum;
                }
            }
        } else {
            T* const gRow = c.own_row<T>(base, strides, c.row(0, half), valid);
            store_quad_row<COUNT * 2, ALIGN_BYTES>(gRow, valid, VALID_COLS, [&](int n) {
                const int i = 4 * n + 2 * half;
                return pack2<T>(x[i] * factor, x[i + 1] * factor);
            });
        }
    }
}

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
