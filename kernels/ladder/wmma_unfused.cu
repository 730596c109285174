// wmma_unfused.cu - attention in three passes, as it is written on paper, with S and P in global
// memory: S = Q K^T, P = softmax(S), O = P V. The two products run on WMMA fragments, 16 warps.
//
//   wmma_scores   one block per BLOCK_M x BLOCK_N tile of S: loads Q and K, writes raw scores, fp32
//   wmma_softmax  one warp per row of S: m and l, then P = exp(S - m), 16 bit, unnormalised
//   wmma_pv       one block per BLOCK_M x HEAD_DIM tile of O: walks over the keys, tiles of P and V
//                 two deep by cp.async; each warp owns its part of O in registers and adds tile
//                 after tile in order. There are no atomics and no partial sums, so the same call
//                 gives the same bits.
//
// What it costs: S is written once and read twice, P written and read once, 16 bytes of traffic per
// score where the fused kernels have none. That is the point of the rung.
//
// The scratch arrays are padded to whole tiles, so fragments go there without bounds checks.
// Columns of P beyond a row's keys are written as zeros as far as wmma_pv reads.
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <ladder/natural_softmax.cuh>
#include <ladder/store_rows.cuh>
#include <ladder/tile_coord.cuh>
#include <ladder/tile_load.cuh>
#include <ladder/wmma_tile.cuh>

namespace flashcore {

constexpr int LD = padded_row(HEAD_DIM);
constexpr int LD_P = padded_row(BLOCK_N);
constexpr int ROWS_PER_WARP = BLOCK_M / WARPS_M;
constexpr int TILES_N = BLOCK_N / WMMA_DIM / WARPS_N;
constexpr int TILES_D = HEAD_DIM / WMMA_DIM;
constexpr int TILES_D_PER_WARP = div_up(TILES_D, WARPS_N);  // the last round may be partly idle
constexpr int FRAGMENTS_M = ROWS_PER_WARP / WMMA_DIM;

static_assert(BLOCK_M % (WMMA_DIM * WARPS_M) == 0, "warps own whole 16-row fragments of the tile");
static_assert(BLOCK_N % (WMMA_DIM * WARPS_N) == 0, "warps own whole 16-key fragments of the tile");
static_assert(HEAD_DIM % WMMA_DIM == 0, "the head dim is whole fragments");
static_assert(NUM_STAGES == 2 && !WARP_SOFTMAX && !FP8, "two stages, none of the others");

struct ScoresStorage {
    T sQ[BLOCK_M * LD];  // BLOCK_M x HEAD_DIM
    T sK[BLOCK_N * LD];  // BLOCK_N x HEAD_DIM
};
struct OutputStorage {
    T sP[NUM_STAGES][BLOCK_M * LD_P];  // BLOCK_M x BLOCK_N each
    T sV[NUM_STAGES][BLOCK_N * LD];    // BLOCK_N x HEAD_DIM each
    float sO[BLOCK_M * LD];            // BLOCK_M x HEAD_DIM, unnormalised
    float sFactor[BLOCK_M];            // per row: 1 / l
};
union alignas(128) SharedStorage {
    ScoresStorage scores;
    OutputStorage output;
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");
static_assert(sizeof(AttentionParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

// The scratch rows of a (batch, head): rows_padded of them, cols_padded long.
__device__ __forceinline__ int64 scratch_row(const AttentionParams& p, int64 head, int query) {
    return head * p.rows_padded + query;
}

// Keys that wmma_pv reads for the block of queries that starts at first_query.
__device__ __forceinline__ int keys_read(const AttentionParams& p, int first_query) {
    const int last_query = min(first_query + BLOCK_M, p.seqlen_q) - 1;
    return div_up(PositionMask<BOUNDED_RIGHT>(p).row_end(last_query), BLOCK_N) * BLOCK_N;
}

// ---- S = Q K^T: grid (n_blocks * m_blocks * B * Hq) --------------------------------------------

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    wmma_scores(const __grid_constant__ AttentionParams params) {
    ScoresStorage& smem = reinterpret_cast<SharedStorage*>(dynamic_shared<128>())->scores;
    const int n_blocks = params.cols_padded / BLOCK_N;
    const int m_blocks = params.rows_padded / BLOCK_M;
    const int n_block = block_index() % n_blocks;
    const int m_block = block_index() / n_blocks % m_blocks;
    const int64 head_index = block_index() / n_blocks / m_blocks;
    const int head = head_index % params.heads_q, batch = head_index / params.heads_q;
    const int first_query = m_block * BLOCK_M, first_key = n_block * BLOCK_N;
    if (first_key >= keys_read(params, first_query)) return;  // the whole block, before any barrier

    const T* gQ = head_pointer<T>(params.q, params.q_strides, batch, head) +
                  first_query * params.q_strides.row;
    const T* gK = head_pointer<T>(params.k, params.k_strides, batch, kv_head(params, head)) +
                  first_key * params.k_strides.row;
    load_tile<BLOCK_M, HEAD_DIM, DIM_QK, ALIGN_BYTES, NUM_THREADS, CP_ASYNC>(
        smem.sQ, gQ, params.q_strides.row, params.seqlen_q - first_query);
    load_tile<BLOCK_N, HEAD_DIM, DIM_QK, ALIGN_BYTES, NUM_THREADS, CP_ASYNC>(
        smem.sK, gK, params.k_strides.row, params.seqlen_kv - first_key);
    if constexpr (CP_ASYNC) {
        cp_async_commit();
        cp_async_wait<0>();
    }
    block_sync();  // both tiles are complete

    const int warp = thread_index() / WARP_SIZE;
    const int warp_row = warp % WARPS_M * ROWS_PER_WARP;
    const int warp_col = warp / WARPS_M * TILES_N * WMMA_DIM;
    float* gS = static_cast<float*>(params.scratch_scores) +
                scratch_row(params, head_index, first_query) * params.cols_padded + first_key;
#pragma unroll
    for (int m = warp_row; m < warp_row + ROWS_PER_WARP; m += WMMA_DIM) {
        Accumulator rS[TILES_N];  // 16 rows x 16 keys each
        scores_fragments<TILES_N, HEAD_DIM, LD>(rS, smem.sQ + m * LD, smem.sK + warp_col * LD);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
            wmma_store_d_row_global(gS + int64(m) * params.cols_padded + warp_col + n * WMMA_DIM,
                                    rS[n], params.cols_padded);
    }
}

// ---- P = exp(S - m): one warp per row, grid div_up(B * Hq * Sq, NUM_WARPS) ---------------------

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    wmma_softmax(const __grid_constant__ AttentionParams params) {
    const int lane = thread_index() % WARP_SIZE;
    const int64 row = int64(block_index()) * NUM_WARPS + thread_index() / WARP_SIZE;
    const int64 rows = int64(params.batch) * params.heads_q * params.seqlen_q;
    if (row >= rows) return;  // the whole warp
    const int64 head_index = row / params.seqlen_q;
    const int query = row % params.seqlen_q;
    const int64 scratch = scratch_row(params, head_index, query);
    const float* gS =
        static_cast<const float*>(params.scratch_scores) + scratch * params.cols_padded;
    T* gP = static_cast<T*>(params.scratch_probs) + scratch * params.cols_padded;
    const PositionMask<BOUNDED_RIGHT> mask(params);
    const GateRow<GATE> gate = {params, row, true, params.softmax_scale};
    const int end = keys_read(params, query / BLOCK_M * BLOCK_M);

    RowState state;
    for (int key = lane; key < end; key += WARP_SIZE) {
        const float score =
            masked_score<true>(gS[key], params.softmax_scale, query, key, mask, gate);
        raise_max(state, score);
        state.sum += exp_approx(score - finite_max(state.max));
    }
    const float max = group_max<WARP_SIZE>(state.max);
    const float sum = group_sum<WARP_SIZE>(state.sum * exp_approx(state.max - finite_max(max)));
    const GateRow<GATE_NONE> quiet = {params, row, true, 0.0f};  // each score is reported once
    for (int key = lane; key < end; key += WARP_SIZE) {
        const float raw = gate.raw_score(gS[key]);
        const float score = masked_score<true>(raw, params.softmax_scale, query, key, mask, quiet);
        const T p = from_float<T>(exp_approx(score - finite_max(max)));
        gP[key] = p;
        gate.probability(key, to_float(p));
    }
    if (lane != 0) return;
    params.scratch_sum[scratch] = sum;
    if (params.lse != nullptr) params.lse[row] = log_sum_exp(max, sum);
    gate.finish(max, sum);
    for (int tile = 0; tile < params.gate_tiles; ++tile) gate.tile_max(tile, max);
}

// ---- O = P V: grid (m_blocks * B * Hq) ---------------------------------------------------------

__device__ __forceinline__ void load_pv(OutputStorage& smem, const AttentionParams& params,
                                        const T* gP, const T* gV, int tile) {
    const int stage = tile % NUM_STAGES, first_key = tile * BLOCK_N;
    load_tile<BLOCK_M, BLOCK_N, BLOCK_N, 16, NUM_THREADS, CP_ASYNC>(smem.sP[stage], gP + first_key,
                                                                    params.cols_padded, BLOCK_M);
    load_tile<BLOCK_N, HEAD_DIM, DIM_V, ALIGN_BYTES, NUM_THREADS, CP_ASYNC>(
        smem.sV[stage], gV + first_key * params.v_strides.row, params.v_strides.row,
        params.seqlen_kv - first_key);
    if constexpr (CP_ASYNC) cp_async_commit();
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    wmma_pv(const __grid_constant__ AttentionParams params) {
    OutputStorage& smem = reinterpret_cast<SharedStorage*>(dynamic_shared<128>())->output;
    const TileCoord tile = tile_coord<BOUNDED_RIGHT>(params, BLOCK_M);
    const int first_query = tile.m_block * BLOCK_M;
    const int64 scratch = scratch_row(params, head_index(params, tile), first_query);
    const T* gP = static_cast<const T*>(params.scratch_probs) + scratch * params.cols_padded;
    const T* gV =
        head_pointer<T>(params.v, params.v_strides, tile.batch, kv_head(params, tile.head));
    const int num_tiles = keys_read(params, first_query) / BLOCK_N;
    const int warp = thread_index() / WARP_SIZE;
    const int warp_m = warp % WARPS_M * ROWS_PER_WARP, warp_n = warp / WARPS_M;

    Accumulator rO[FRAGMENTS_M][TILES_D_PER_WARP][1];  // 16 rows x 16 columns each
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int i = 0; i < TILES_D_PER_WARP; ++i) fill(rO[m][i][0], 0.0f);
    }
    if (num_tiles > 0) load_pv(smem, params, gP, gV, 0);
#pragma unroll 1
    for (int j = 0; j < num_tiles; ++j) {
        if constexpr (CP_ASYNC) cp_async_wait<0>();
        block_sync();  // tile j is complete, and all are done with tile j - 1
        if (j + 1 < num_tiles) load_pv(smem, params, gP, gV, j + 1);
        const int stage = j % NUM_STAGES;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int i = 0; i < TILES_D_PER_WARP; ++i) {
                const int d = warp_n + i * WARPS_N;
                if (d >= TILES_D) break;
                accumulate_fragments<1, BLOCK_N, LD_P, LD>(
                    rO[m][i], smem.sP[stage] + (warp_m + m * WMMA_DIM) * LD_P,
                    smem.sV[stage] + d * WMMA_DIM);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int i = 0; i < TILES_D_PER_WARP; ++i) {
            const int d = warp_n + i * WARPS_N;
            if (d < TILES_D)
                wmma_store_d_row(smem.sO + (warp_m + m * WMMA_DIM) * LD + d * WMMA_DIM, rO[m][i][0],
                                 LD);
        }
    }
    for (int row = thread_index(); row < BLOCK_M; row += NUM_THREADS)
        smem.sFactor[row] = inverse_sum(
            first_query + row < params.seqlen_q ? params.scratch_sum[scratch + row] : 0.0f);
    block_sync();  // O and its factors are complete
    if constexpr (WRITES_OUTPUT<GATE>) {
        T* gO = output_pointer<T>(params, tile, first_query);
        store_rows<BLOCK_M, DIM_V, LD, ALIGN_BYTES, NUM_THREADS>(
            gO, params.o_strides.row, smem.sO, smem.sFactor, params.seqlen_q - first_query,
            thread_index());
    }
}

}  // namespace flashcore
