// store.cuh - how a consumer stores a gradient of its rows, from the accumulators.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>

namespace flashcore {

// Stores a gradient's rows, from column FIRST_COL on, multiplied by `factor`; WHICH: 1 for dq and
// dk, 2 for dv.
template <int WHICH, int VALID_COLS, int FIRST_COL = 0, int COUNT>
__device__ __forceinline__ void store_gradient(const WarpContext& c, const float (&x)[COUNT],
                                               float factor, void* base, const Strides& strides) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        bool valid;
        if constexpr (ACCUMULATES || FP32_GRADIENTS & WHICH) {
            float* const gRow = c.own_row<float>(base, strides, c.row(0, half), valid) + FIRST_COL;
#pragma unroll
            for (int n = 0; n < COUNT / 4; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int col = n * 8 + c.lane % QUAD * 2 + e;
                    if (!valid || FIRST_COL + col >= VALID_COLS) continue;
                    const float sum = x[4 * n + 2 * half + e] * factor;
                    gRow[col] = ACCUMULATES ? gRow[col] + sum : sum;
                }
            }
        } else {
            T* const gRow = c.own_row<T>(base, strides, c.row(0, half), valid) + FIRST_COL;
            store_quad_row<COUNT * 2, ALIGN_BYTES>(gRow, valid, VALID_COLS - FIRST_COL, [&](int n) {
                const int i = 4 * n + 2 * half;
                return pack2<T>(x[i] * factor, x[i + 1] * factor);
            });
        }
    }
}

}  // namespace flashcore
