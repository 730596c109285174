// scalar.cu - attention without tensor cores: what the other kernels are trusted against.
//
//   O = softmax(softmax_scale * Q K^T) V,  LSE = log sum exp
//
// Online softmax, all arithmetic in fp32. One thread block owns BLOCK_M queries of one head; each
// of its warps owns ROWS of them, alone. Keys come 32 at a time, converted to fp32 in shared
// memory:
//
//   S:  lane = key.     s[r] = sum over d of q[r][d] k[lane][d], for each of the warp's rows r
//   m, l: maxima and sums over the lanes by shuffle
//   O:  lane = column.  o[r][lane + 32 i] += p[r] of key j * v[j][lane + 32 i], key after key
//
// Shared memory, fp32:  sQ BLOCK_M x DIM_QK | sK 32 x LD_K | sV 32 x DIM_V
//
// Any dtype, any D and Dv whose tiles fit into shared memory, any alignment. Exact about NaN: a
// value that the mask hides is never multiplied, not even by 0.
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <ladder/natural_softmax.cuh>
#include <ladder/tile_coord.cuh>

namespace flashcore {

constexpr int ROWS = BLOCK_M / NUM_WARPS;       // queries of a warp
constexpr int LD_K = DIM_QK | 1;                // odd: 32 lanes read 32 rows in 32 banks
constexpr int COLS = div_up(DIM_V, WARP_SIZE);  // output columns of a lane

static_assert(BLOCK_N == WARP_SIZE, "one key per lane");
static_assert(BLOCK_M % NUM_WARPS == 0, "every warp owns the same number of queries");
static_assert(NUM_STAGES == 1 && !CP_ASYNC && !WARP_SOFTMAX && !FP8, "none of these here");

struct SharedStorage {
    float sQ[BLOCK_M * DIM_QK];  // BLOCK_M x DIM_QK
    float sK[BLOCK_N * LD_K];    // BLOCK_N x DIM_QK
    float sV[BLOCK_N * DIM_V];   // BLOCK_N x DIM_V
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");
static_assert(sizeof(AttentionParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

// A warp's rows.
struct ScalarRows {
    RowState state[ROWS];  // the same maximum in all lanes, each its own keys' part of the sum
    float rO[ROWS][COLS];  // columns lane, lane + 32, ... of each row
    int first_query;       // of this warp
    int lane;
};

// ---- the kernel, with the loop over the keys ----------------------------------------------------

template <int NUM_ROWS, int DIM, int LD>
__device__ __forceinline__ void load_rows(float* sTile, const T* gHead, int64 row_stride,
                                          int first_row, int seqlen);
template <bool MASKED>
__device__ __forceinline__ void attend_tile(ScalarRows& rows, const SharedStorage& smem,
                                            const AttentionParams& params, int64 first_row,
                                            const PositionMask<BOUNDED_RIGHT>& mask, int tile);
__device__ __forceinline__ void store_output(const ScalarRows& rows, const AttentionParams& params,
                                             const TileCoord& tile, int64 first_row);

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    scalar(const __grid_constant__ AttentionParams params) {
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<128>());
    const TileCoord tile = tile_coord<BOUNDED_RIGHT>(params, BLOCK_M);
    const int block_first = tile.m_block * BLOCK_M;
    const int64 first_row = head_index(params, tile) * params.seqlen_q;
    const int head_kv = kv_head(params, tile.head);
    const T* gQ = head_pointer<T>(params.q, params.q_strides, tile.batch, tile.head);
    const T* gK = head_pointer<T>(params.k, params.k_strides, tile.batch, head_kv);
    const T* gV = head_pointer<T>(params.v, params.v_strides, tile.batch, head_kv);
    const PositionMask<BOUNDED_RIGHT> mask(params);

    ScalarRows rows = {};
    rows.lane = thread_index() % WARP_SIZE;
    rows.first_query = block_first + int(thread_index() / WARP_SIZE) * ROWS;
    load_rows<BLOCK_M, DIM_QK, DIM_QK>(smem.sQ, gQ, params.q_strides.row, block_first,
                                       params.seqlen_q);

    const int kv_end = mask.row_end(min(block_first + BLOCK_M, params.seqlen_q) - 1);
#pragma unroll 1
    for (int tile_n = 0; tile_n < div_up(kv_end, BLOCK_N); ++tile_n) {
        const int first_key = tile_n * BLOCK_N;
        block_sync();  // every warp is done with the previous tile
        load_rows<BLOCK_N, DIM_QK, LD_K>(smem.sK, gK, params.k_strides.row, first_key,
                                         params.seqlen_kv);
        load_rows<BLOCK_N, DIM_V, DIM_V>(smem.sV, gV, params.v_strides.row, first_key,
                                         params.seqlen_kv);
        block_sync();  // the tile (the first time: and Q) is complete
        if (mask.needs_mask(block_first, block_first + BLOCK_M - 1, first_key,
                            first_key + BLOCK_N)) {
            attend_tile<true>(rows, smem, params, first_row, mask, tile_n);
        } else {
            attend_tile<false>(rows, smem, params, first_row, mask, tile_n);
        }
    }
    store_output(rows, params, tile, first_row);
}

// ---- what it calls -----------------------------------------------------------------------------

// Rows [first_row, first_row + NUM_ROWS) to shared memory as fp32, zeros from seqlen on.
template <int NUM_ROWS, int DIM, int LD>
__device__ __forceinline__ void load_rows(float* sTile, const T* gHead, int64 row_stride,
                                          int first_row, int seqlen) {
    for (int i = thread_index(); i < NUM_ROWS * DIM; i += NUM_THREADS) {
        const int row = i / DIM, col = i % DIM;
        const bool valid = first_row + row < seqlen;
        sTile[row * LD + col] =
            valid ? to_float(gHead[(first_row + row) * row_stride + col]) : 0.0f;
    }
}

// score[r] = q[r] . k[lane]
__device__ __forceinline__ void dot_rows(float (&score)[ROWS], const float* sQ, const float* sK) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) score[r] = 0.0f;
#pragma unroll 8
    for (int d = 0; d < DIM_QK; ++d) {
        const float k = sK[d];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) score[r] += sQ[r * DIM_QK + d] * k;
    }
}

template <bool MASKED>
__device__ __forceinline__ void attend_tile(ScalarRows& rows, const SharedStorage& smem,
                                            const AttentionParams& params, int64 first_row,
                                            const PositionMask<BOUNDED_RIGHT>& mask, int tile) {
    const int warp = thread_index() / WARP_SIZE;
    const int first_key = tile * BLOCK_N;
    const int key = first_key + rows.lane;
    float p[ROWS];
    dot_rows(p, smem.sQ + warp * ROWS * DIM_QK, smem.sK + rows.lane * LD_K);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int query = rows.first_query + r;
        const GateRow<GATE> gate = {params, first_row + query, query < params.seqlen_q,
                                    params.softmax_scale};
        const float score =
            masked_score<MASKED>(p[r], params.softmax_scale, query, key, mask, gate);
        const float rescale = raise_max(rows.state[r], group_max<WARP_SIZE>(score));
        p[r] = exp_approx(score - finite_max(rows.state[r].max));
        rows.state[r].sum += p[r];
        gate.tile_max(tile, rows.state[r].max);
        gate.probability(key, p[r]);
#pragma unroll
        for (int i = 0; i < COLS; ++i) rows.rO[r][i] *= rescale;
    }
#pragma unroll 4
    for (int j = 0; j < BLOCK_N; ++j) {
        float v[COLS];
#pragma unroll
        for (int i = 0; i < COLS; ++i) {
            const int col = rows.lane + i * WARP_SIZE;
            v[i] = col < DIM_V ? smem.sV[j * DIM_V + col] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float p_j = shfl(p[r], j);
            // The same answer in all lanes, so the warp does not diverge.
            if (MASKED && !mask.visible(rows.first_query + r, first_key + j)) continue;
#pragma unroll
            for (int i = 0; i < COLS; ++i) rows.rO[r][i] += p_j * v[i];
        }
    }
}

__device__ __forceinline__ void store_output(const ScalarRows& rows, const AttentionParams& params,
                                             const TileCoord& tile, int64 first_row) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int query = rows.first_query + r;
        const float sum = group_sum<WARP_SIZE>(rows.state[r].sum);
        if (query >= params.seqlen_q) continue;
        const GateRow<GATE> gate = {params, first_row + query, rows.lane == 0, 0.0f};
        gate.finish(rows.state[r].max, sum);
        if (params.lse != nullptr && rows.lane == 0)
            params.lse[first_row + query] = log_sum_exp(rows.state[r].max, sum);
        if constexpr (WRITES_OUTPUT<GATE>) {
            T* gO = output_pointer<T>(params, tile, query);
            const float inverse = inverse_sum(sum);
#pragma unroll
            for (int i = 0; i < COLS; ++i) {
                const int col = rows.lane + i * WARP_SIZE;
                if (col < DIM_V) gO[col] = from_float<T>(rows.rO[r][i] * inverse);
            }
        }
    }
}

}  // namespace flashcore
