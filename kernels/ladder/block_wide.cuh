// block_wide.cuh - wmma_fused.cu's block-wide softmax: scores, probabilities and O in shared
// memory.
#pragma once
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <ladder/natural_softmax.cuh>
#include <ladder/store_rows.cuh>
#include <ladder/tile_coord.cuh>
#include <ladder/wmma_context.cuh>
#include <ladder/wmma_tile.cuh>

namespace flashcore {

template <typename C>
struct BlockWide {
    RowState state;  // the same maximum in all threads of the row, each its part of the sum
    int row, part;   // thread `part` of THREADS_PER_ROW handles every THREADS_PER_ROW-th column

    __device__ __forceinline__ explicit BlockWide(const C& c)
        : row(thread_index() / THREADS_PER_ROW), part(thread_index() % THREADS_PER_ROW) {
        for (int i = thread_index(); i < BLOCK_M * LD; i += NUM_THREADS) c.smem.rows.sO[i] = 0.0f;
    }

    __device__ __forceinline__ void sync_rows() const { block_sync(); }

    // A reduction by op over the threads of a row; all of them get the result.
    template <typename Op>
    __device__ __forceinline__ float across_row(const C& c, float value, Op op) const {
        float* sPartial = c.smem.rows.sPartial + row * THREADS_PER_ROW;
        sPartial[part] = value;
        block_sync();  // all parts are written before any is read
        float result = sPartial[0];
#pragma unroll
        for (int i = 1; i < THREADS_PER_ROW; ++i) result = op(result, sPartial[i]);
        return result;
    }

    template <bool MASKED>
    __device__ __forceinline__ void softmax(const C& c, int tile) {
        constexpr int COLS = BLOCK_N / THREADS_PER_ROW;
        const GateRow<GATE> gate = c.gate_row(row);
        const int first_key = tile * BLOCK_N;
        float score[COLS];
        float tile_max = NEG_INFINITY;
#pragma unroll
        for (int i = 0; i < COLS; ++i) {
            const int col = part + i * THREADS_PER_ROW;
            score[i] = masked_score<MASKED>(c.smem.sS[row * LD_S + col],
                                            c.params.softmax_scale * c.score_scale,
                                            c.first_query + row, first_key + col, c.mask, gate);
            tile_max = fmaxf(tile_max, score[i]);
        }
        // There is a barrier in across_row: after it all scores have been read, and P may be
        // written over them.
        tile_max = across_row(c, tile_max, [](float a, float b) { return fmaxf(a, b); });
        T* sP = reinterpret_cast<T*>(c.smem.sS);
        const float rescale = raise_max(state, tile_max);
        gate.tile_max(tile, state.max);
#pragma unroll
        for (int i = 0; i < COLS; ++i) {
            const int col = part + i * THREADS_PER_ROW;
            const float p = exp_approx(score[i] - finite_max(state.max));
            state.sum += p;
            const T rounded = from_float<T>(p);
            sP[row * LD_S + col] = rounded;
            gate.probability(first_key + col, to_float(rounded));
        }
        for (int d = part; d < HEAD_DIM; d += THREADS_PER_ROW)
            c.smem.rows.sO[row * LD + d] *= rescale;
    }

    // O's 16-column fragments go round the WARPS_N warps of a row; with five fragments (D = 80) and
    // two warps, the last round is for the first warp only.
    __device__ __forceinline__ void accumulate(const C& c, int stage) {
        constexpr int ROUNDS = div_up(TILES_D, WARPS_N);
#pragma unroll
        for (int m = 0; m < ROWS_PER_WARP; m += WMMA_DIM) {
            const int slab = c.row_slab() + m;
#pragma unroll
            for (int i = 0; i < ROUNDS; ++i) {
                const int d = c.warp_n + i * WARPS_N;
                if (d >= TILES_D) break;
                float* sO = c.smem.rows.sO + slab * LD + d * WMMA_DIM;
                Accumulator rO[1];  // 16 rows x 16 columns
                wmma_load_c_row(rO[0], sO, LD);
                accumulate_fragments<1, BLOCK_N, LD_S, LD>(
                    rO, reinterpret_cast<const T*>(c.smem.sS) + slab * LD_S,
                    c.smem.sV[stage] + d * WMMA_DIM);
                wmma_store_d_row(sO, rO[0], LD);
            }
        }
    }

    __device__ __forceinline__ void finish(const C& c, float v_scale) {
        const float sum = across_row(c, state.sum, [](float a, float b) { return a + b; });
        const GateRow<GATE> gate = c.gate_row(row);
        if (part == 0) {
            c.smem.rows.sFactor[row] = inverse_sum(sum) * v_scale;
            gate.finish(state.max, sum);
            if (c.params.lse != nullptr && gate.valid)
                c.params.lse[gate.row] = log_sum_exp(state.max, sum);
        }
        block_sync();  // the factors are there before any thread stores rows
        if constexpr (WRITES_OUTPUT<GATE>) {
            const AttentionParams& p = c.params;
            T* gO = output_pointer<T>(p, c.tile, c.first_query);
            store_rows<BLOCK_M, DIM_V, LD, ALIGN_BYTES, NUM_THREADS>(
                gO, p.o_strides.row, c.smem.rows.sO, c.smem.rows.sFactor,
                p.seqlen_q - c.first_query, thread_index());
        }
    }
};

}  // namespace flashcore
