// warp_owned.cuh - wmma_fused.cu's warp-owned softmax: a warp has its 16 rows to itself, from S to
// O, and O in registers.
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
struct WarpOwned {
    // Lane l works on row l % 16 and on one half of its keys, in pieces of four.
    static constexpr int PIECES = BLOCK_N / 8;
    RowState state;  // the same maximum in both lanes of the row, each its part of the sum
    RegisterOutput<TILES_D> output;
    int row, half;
    int swap;  // see piece_col

    __device__ __forceinline__ explicit WarpOwned(const C& c) {
        const int lane = thread_index() % WARP_SIZE;
        row = lane % WMMA_DIM;
        half = lane / WMMA_DIM;
        swap = (row >> 2 ^ row >> 3) & 1;
        accumulator_rows<LD_S>(output.rows, slab(c));
#pragma unroll
        for (int d = 0; d < TILES_D; ++d) fill(output.rO[d], 0.0f);
    }

    // Nothing of the other warps is read or written between the barriers that guard K and V.
    __device__ __forceinline__ void sync_rows() const { warp_sync(); }

    __device__ __forceinline__ float* slab(const C& c) const {
        return c.smem.sS + c.row_slab() * LD_S;
    }

    // First column of the lane's i-th piece. Rows are LD_S = BLOCK_N + 8 words apart, so without
    // the swap of neighbouring pieces rows 4 apart (reading 16 bytes of sS) and rows 8 apart
    // (writing 8 bytes of sP) would meet in the same banks.
    __device__ __forceinline__ int piece_col(int i) const {
        return (half * PIECES + (i ^ swap)) * 4;
    }

    template <bool MASKED>
    __device__ __forceinline__ void softmax(const C& c, int tile) {
        const GateRow<GATE> gate = c.gate_row(c.row_slab() + row);
        const int query = c.first_query + c.row_slab() + row;
        const int first_key = tile * BLOCK_N;
        float score[PIECES][4];
        float tile_max = NEG_INFINITY;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const float4 raw =
                *reinterpret_cast<const float4*>(slab(c) + row * LD_S + piece_col(i));
            const float values[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                score[i][e] =
                    masked_score<MASKED>(values[e], c.params.softmax_scale * c.score_scale, query,
                                         first_key + piece_col(i) + e, c.mask, gate);
                tile_max = fmaxf(tile_max, score[i][e]);
            }
        }
        tile_max = fmaxf(tile_max, shfl_xor(tile_max, WMMA_DIM));
        const float rescale = raise_max(state, tile_max);
        gate.tile_max(tile, state.max);
        if (half == 0) c.smem.rows.sFactor[c.row_slab() + row] = rescale;
        warp_sync();  // all lanes have read their scores, and the factors are there
        T* sP = reinterpret_cast<T*>(slab(c));
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            float p[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                p[e] = exp_approx(score[i][e] - finite_max(state.max));
                state.sum += p[e];
                gate.probability(first_key + piece_col(i) + e, to_float(from_float<T>(p[e])));
            }
            *reinterpret_cast<uint2*>(sP + row * LD_S + piece_col(i)) =
                uint2{pack2<T>(p[0], p[1]), pack2<T>(p[2], p[3])};
        }
        output.scale_rows(c.smem.rows.sFactor + c.row_slab());
    }

    __device__ __forceinline__ void accumulate(const C& c, int stage) {
        accumulate_fragments<TILES_D, BLOCK_N, LD_S, LD>(
            output.rO, reinterpret_cast<const T*>(slab(c)), c.smem.sV[stage]);
    }

    __device__ __forceinline__ void finish(const C& c, float v_scale) {
        const float sum = state.sum + shfl_xor(state.sum, WMMA_DIM);
        const GateRow<GATE> gate = c.gate_row(c.row_slab() + row);
        block_sync();  // no warp reads K or V any more: O may take their place
        if (half == 0) {
            c.smem.rows.sFactor[c.row_slab() + row] = inverse_sum(sum) * v_scale;
            gate.finish(state.max, sum);
            if (c.params.lse != nullptr && gate.valid)
                c.params.lse[gate.row] = log_sum_exp(state.max, sum);
        }
        float* sO = reinterpret_cast<float*>(c.smem.sK) + c.row_slab() * LD;
#pragma unroll
        for (int d = 0; d < TILES_D; ++d) wmma_store_d_row(sO + d * WMMA_DIM, output.rO[d], LD);
        warp_sync();  // the slab of O and its factors are complete
        if constexpr (WRITES_OUTPUT<GATE>) {
            const AttentionParams& p = c.params;
            const int first = c.first_query + c.row_slab();
            T* gO = output_pointer<T>(p, c.tile, first);
            store_rows<WMMA_DIM, DIM_V, LD, ALIGN_BYTES, WARP_SIZE>(
                gO, p.o_strides.row, sO, c.smem.rows.sFactor + c.row_slab(), p.seqlen_q - first,
                thread_index() % WARP_SIZE);
        }
    }
};

}  // namespace flashcore
