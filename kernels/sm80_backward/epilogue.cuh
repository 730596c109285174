// epilogue.cuh - how a warp of bwd_sm80.cu stores its rows of the gradients: through shared memory,
// so that stores are wide; or in fp32 from registers.
#pragma once
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/ptx/warp.cuh>
#include <sm80_backward/traits.cuh>

namespace flashcore {

// Stores a warp's accumulators, multiplied by `factor`, as columns from c.first_col on of its rows
// of `base`, in T. sOwn: what the warp alone has read of its own rows.
template <typename Layout, int VALID_COLS, int TILES>
__device__ __forceinline__ void store_gradient(const Context& c, T* sOwn,
                                               const AccumulatorTile<FRAGMENTS_M, TILES>& rows,
                                               float factor, void* base, const Strides& strides) {
    constexpr int COLS = TILES * 8;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int element = Layout::element(c.row(m, half), c.first_col);
#pragma unroll
            for (int d = 0; d < TILES; ++d) {
                const float (&x)[4] = rows.x[m][d];
                store_pair(sOwn + Layout::step(element, 0, d * 8) + c.lane % QUAD * 2,
                           x[2 * half] * factor, x[2 * half + 1] * factor);
            }
        }
    }
    warp_sync();  // the warp's rows are complete in shared memory
    const auto row_of = [&](int row, bool& valid) {
        return c.own_row<T>(base, strides, c.first_row + row, valid) + c.first_col;
    };
    scatter_rows<Layout, ROWS_PER_WARP, COLS, ALIGN_BYTES>(
        sOwn, c.first_row, c.first_col, row_of, min(VALID_COLS - c.first_col, COLS), c.lane);
}

// The same in fp32, straight from the registers; ACCUMULATES: added to what is there.
template <int VALID_COLS, int TILES>
__device__ __forceinline__ void store_gradient_fp32(const Context& c,
                                                    const AccumulatorTile<FRAGMENTS_M, TILES>& rows,
                                                    float factor, void* base,
                                                    const Strides& strides) {
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool valid;
            float* const gRow = c.own_row<float>(base, strides, c.row(m, half), valid);
            if (!valid) continue;
#pragma unroll
            for (int d = 0; d < TILES; ++d) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int col = c.first_col + d * 8 + c.lane % QUAD * 2 + e;
                    if (col >= VALID_COLS) continue;
                    const float x = rows.x[m][d][2 * half + e] * factor;
                    gRow[col] = ACCUMULATES ? gRow[col] + x : x;
                }
            }
        }
    }
}

// Either, by what the gradient is of: 1 for dq and dk, 2 for dv.
template <int WHICH, typename Layout, int VALID_COLS, int TILES>
__device__ __forceinline__ void store(const Context& c, T* sOwn,
                                      const AccumulatorTile<FRAGMENTS_M, TILES>& rows, float factor,
                                      void* base, const Strides& strides) {
    if constexpr (ACCUMULATES || (sizeof(T) == 2 && (FP32_GRADIENTS & WHICH))) {
        store_gradient_fp32<VALID_COLS>(c, rows, factor, base, strides);
    } else {
        store_gradient<Layout, VALID_COLS>(c, sOwn, rows, factor, base, strides);
    }
}

// Stores what the rows of queries add to the slopes' gradient: bwd_heads.cu adds it up.
__device__ __forceinline__ void store_distances(const Context& c, const Gradients& rows) {
    const Work& w = c.work;
    const int64 first = statistics_row(c.params, c.array_batch(), w.head) + w.start_q;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = group_sum<QUAD>(rows.distances[m][half]);
            const int query = w.first_row + c.row(m, half);
            if (c.lane % QUAD == 0 && query < w.seqlen_q) c.params.distances[first + query] = sum;
        }
    }
}

// Stores what the warp's queries add to the gradients of elements of mod_args, behind the sums of
// distances, where the first of them has its place: bwd_mod_args.cu adds it up.
__device__ __forceinline__ void store_elements(const Context& c, const Gradients& rows) {
    const Work& w = c.work;
    const int64 all = statistics_row(c.params, VARLEN ? 1 : c.params.batch, 0);
    const int64 first = statistics_row(c.params, c.array_batch(), w.head) + w.start_q;
    const int query = w.first_row + c.first_row;
#pragma unroll
    for (int n = 0; n < MOD_ELEMENTS; ++n) {
        const float sum = group_sum<WARP_SIZE>(rows.elements.x[n]);
        if (c.lane == 0 && query < w.seqlen_q)
            c.params.distances[(int(SUMS_DISTANCES) + n) * all + first + query] = sum;
    }
}

// Stores the warp's gradients: dK and dV, or dQ.
__device__ __forceinline__ void store_gradients(const Context& c, const Gradients& rows) {
    const BackwardParams& p = c.params;
    if (SUMS_DISTANCES && c.first_col == 0) store_distances(c, rows);
    if (MOD_ELEMENTS > 0 && c.first_col == 0) store_elements(c, rows);
    if (OWNS_KEYS && p.dv != nullptr && c.has_columns(HEAD_DIM_V))
        store<2, LayoutOwnVO, DIM_V>(c, c.smem.sOwnVO, rows.rVO, keep_scale<RULES>(p), p.dv,
                                     p.dv_strides);
    void* const gradient = OWNS_KEYS ? p.dk : p.dq;
    if (gradient != nullptr && c.has_columns(HEAD_DIM))
        store<1, LayoutOwnQK, DIM_QK>(c, c.smem.sOwnQK, rows.rQK, p.softmax_scale, gradient,
                                      OWNS_KEYS ? p.dk_strides : p.dq_strides);
}

}  // namespace flashcore
