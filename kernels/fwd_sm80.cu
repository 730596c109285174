// fwd_sm80.cu - forward attention on mma.sync: scores, probabilities and O never leave the
// registers.
//
//   O = softmax(softmax_scale * Q K^T) V,  LSE = log sum exp     (FlashAttention-2, Dao 2023)
//
// One thread block owns BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time,
// tiles of K and V arriving by cp.async while the tile before is used:
//
//   S = Q K_j^T                       ldmatrix + mma, fp32 accumulators
//   m, l, p = exp2(S - m)             on the fragments: a row sits in four neighbouring lanes
//   O = O * exp2(m_old - m) + P V_j   the accumulator layout of S is the operand layout of P
//
// Warps: WARPS_M along the queries, each with FRAGMENTS_M * 16 rows; WARPS_N along the keys of
// every tile. With WARPS_N > 1 the warps of a row have seen different keys, and their m, l and O
// are merged at the end, in order: for grids too small to fill the GPU with one warp per row.
//
// Shared memory (LD = HEAD_DIM + 8: ldmatrix's eight rows of 16 bytes fall into different banks)
//   | sQ BLOCK_M x LD | sK NUM_STAGES x BLOCK_N x LD | sV NUM_STAGES x BLOCK_N x LD |
//   at the end: the other warps' m, l, O over sK and sV; then O, as T, over sQ
//
// Limits: 16-bit inputs, D and Dv <= HEAD_DIM.
#include <flashcore/config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/epilogue.cuh>
#include <flashcore/mask.cuh>
#include <flashcore/mma_sync_tile.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx_warp.cuh>
#include <flashcore/smem_tile.cuh>
#include <flashcore/softmax.cuh>

namespace flashcore {

constexpr int LD = padded_row(HEAD_DIM);
constexpr int ROWS_PER_WARP = BLOCK_M / WARPS_M;
constexpr int FRAGMENTS_M = ROWS_PER_WARP / 16;
constexpr int KEYS_PER_WARP = BLOCK_N / WARPS_N;
constexpr int TILES_N = KEYS_PER_WARP / 8;  // 8-key accumulator tiles of a warp's S
constexpr int TILES_D = HEAD_DIM / 8;       // 8-column accumulator tiles of a warp's O
constexpr int QUAD = 4;                     // lanes that share a row

static_assert(BLOCK_M % (16 * WARPS_M) == 0, "warps own whole 16-row fragments of the tile");
static_assert(BLOCK_N % (16 * WARPS_N) == 0, "warps own whole 16-key steps of the tile");
static_assert(HEAD_DIM % 16 == 0, "the head dim is whole steps");
static_assert(CP_ASYNC && !WARP_SOFTMAX && !FP8, "cp.async, and none of the others");
static_assert(NUM_STAGES == 1 || NUM_STAGES == 2, "one stage, or two in turn");

struct alignas(128) SharedStorage {
    T sQ[BLOCK_M * LD];
    T sKV[2 * NUM_STAGES * BLOCK_N * LD];  // K's stages, then V's

    __device__ __forceinline__ T* sK(int stage) { return sKV + stage * BLOCK_N * LD; }
    __device__ __forceinline__ T* sV(int stage) { return sK(NUM_STAGES + stage); }
};
static_assert(sizeof(SharedStorage) == FC_SMEM_BYTES, "config.py computes the same size");
static_assert(sizeof(AttentionParams) == FC_PARAMS_BYTES, "launch.py packs the same struct");

// What a warp hands over for the merge: per lane its m, l and O, lanes next to each other.
constexpr int MERGE_VALUES = FRAGMENTS_M * (2 * 2 + TILES_D * 4);
static_assert((WARPS_N - 1) * WARPS_M * MERGE_VALUES * WARP_SIZE * int(sizeof(float)) <=
                  int(sizeof(T)) * 2 * NUM_STAGES * BLOCK_N * LD,
              "the other warps' results fit over K and V");

// A lane's rows: two of each 16-row fragment, lane / 4 and lane / 4 + 8.
struct Rows {
    RowState state[FRAGMENTS_M][2];
    AccumulatorTile<FRAGMENTS_M, TILES_D> rO;
};

struct Context {
    const AttentionParams& params;
    SharedStorage& smem;
    TileCoord tile;
    Mask<CAUSAL> mask;
    int first_query;
    int warp_m, warp_n;
    int lane;

    // Row of the block's tile: row `half` (0 or 1) of fragment m.
    __device__ __forceinline__ int row(int m, int half) const {
        return warp_m * ROWS_PER_WARP + m * 16 + half * 8 + lane / QUAD;
    }
    // First of this lane's two keys of 8-key tile n.
    __device__ __forceinline__ int key(int tile_index, int n) const {
        return tile_index * BLOCK_N + warp_n * KEYS_PER_WARP + n * 8 + lane % QUAD * 2;
    }
    __device__ __forceinline__ GateRow<GATE> gate_row(int m, int half) const {
        const int query = first_query + row(m, half);
        return {params, head_row(params, tile) * params.seqlen_q + query, query < params.seqlen_q,
                params.softmax_scale};
    }
};

__device__ __forceinline__ void load_q(const Context& c) {
    const AttentionParams& p = c.params;
    const T* gQ = head_pointer<T>(p.q, p.q_strides, c.tile.batch, c.tile.head) +
                  c.first_query * p.q_strides.row;
    load_tile<BLOCK_M, HEAD_DIM, DIM_QK, ALIGN_BYTES, NUM_THREADS, true>(
        c.smem.sQ, gQ, p.q_strides.row, p.seqlen_q - c.first_query);
}

// A negative scale is a positive one on -Q.
__device__ __forceinline__ void negate_q(const Context& c) {
    constexpr int PIECES = BLOCK_M * HEAD_DIM * int(sizeof(T)) / 4;
    uint32* sQ = reinterpret_cast<uint32*>(c.smem.sQ);
    for (int i = threadIdx.x; i < PIECES; i += NUM_THREADS) {
        const int row = i / (HEAD_DIM / 2), col = i % (HEAD_DIM / 2);
        sQ[row * (LD / 2) + col] ^= 0x80008000u;
    }
}

__device__ __forceinline__ void load_kv(const Context& c, int tile, int stage) {
    const AttentionParams& p = c.params;
    const int head_kv = kv_head(p, c.tile.head), first_key = tile * BLOCK_N;
    const T* gK = head_pointer<T>(p.k, p.k_strides, c.tile.batch, head_kv);
    const T* gV = head_pointer<T>(p.v, p.v_strides, c.tile.batch, head_kv);
    load_tile<BLOCK_N, HEAD_DIM, DIM_QK, ALIGN_BYTES, NUM_THREADS, true>(
        c.smem.sK(stage), gK + first_key * p.k_strides.row, p.k_strides.row,
        p.seqlen_kv - first_key);
    load_tile<BLOCK_N, HEAD_DIM, DIM_V, ALIGN_BYTES, NUM_THREADS, true>(
        c.smem.sV(stage), gV + first_key * p.v_strides.row, p.v_strides.row,
        p.seqlen_kv - first_key);
    cp_async_commit();
}

// Hides what the mask hides, and finds the largest raw scores that this lane holds of both rows of
// fragment m. Four chains of comparisons, two per row: one alone would wait for itself.
template <bool MASKED>
__device__ __forceinline__ void mask_and_max(const Context& c,
                                             AccumulatorTile<FRAGMENTS_M, TILES_N>& rS, int tile,
                                             int m, float (&max)[2]) {
    const int first_key = c.key(tile, 0);
    float chain[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) chain[e] = NEG_INFINITY;
#pragma unroll
    for (int n = 0; n < TILES_N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const GateRow<GATE> gate = c.gate_row(m, e / 2);
            // Relative to this lane's first key, so that each comparison is with a constant.
            const int end = c.mask.row_end(c.first_query + c.row(m, e / 2)) - first_key;
            float& s = rS.x[m][n][e];
            const bool visible = !MASKED || n * 8 + e % 2 < end;
            gate.score(first_key + n * 8 + e % 2, s, visible);
            s = visible ? gate.raw_score(s) : NEG_INFINITY;
            chain[e] = fmaxf(chain[e], s);
        }
    }
    max[0] = group_max<QUAD>(fmaxf(chain[0], chain[1]));
    max[1] = group_max<QUAD>(fmaxf(chain[2], chain[3]));
}

// Online softmax: from the accumulators of S to P; O is rescaled. The scale is positive (see
// negate_q), so the largest raw score is the largest scaled one, and each exponent is one
// multiply-add away from its raw score.
template <bool MASKED>
__device__ __forceinline__ void softmax(const Context& c, Rows& rows,
                                        AccumulatorTile<FRAGMENTS_M, TILES_N>& rS,
                                        ProbabilityTile<FRAGMENTS_M, TILES_N / 2>& rP, int tile) {
    const float scale = c.params.scale_log2;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
        float max[2], factor[2];
        float sum[4] = {};  // two chains per row, as for the maximum
        mask_and_max<MASKED>(c, rS, tile, m, max);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            RowState& state = rows.state[m][half];
            factor[half] = raise_max(state, max[half] * scale);
            c.gate_row(m, half).tile_max(tile * WARPS_N + c.warp_n, state.max);
            max[half] = finite_max(state.max);
        }
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            float p[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                p[e] = exp2_approx(rS.x[m][n][e] * scale - max[e / 2]);
                sum[e] += p[e];
                c.gate_row(m, e / 2).probability(c.key(tile, n) + e % 2,
                                                 to_float(from_float<T>(p[e])));
            }
            rP.pair(m, n, 0) = pack2<T>(p[0], p[1]);
            rP.pair(m, n, 1) = pack2<T>(p[2], p[3]);
        }
        rows.state[m][0].sum += sum[0] + sum[1];
        rows.state[m][1].sum += sum[2] + sum[3];
        // After the first few tiles most rows have met their maximum: nothing to multiply then.
        if (warp_any(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int d = 0; d < TILES_D; ++d) {
#pragma unroll
                for (int e = 0; e < 4; ++e) rows.rO.x[m][d][e] *= factor[e / 2];
            }
        }
    }
}

// The walk over the keys.
__device__ __forceinline__ void attend(const Context& c, Rows& rows) {
    const AttentionParams& p = c.params;
    const int kv_end = c.mask.kv_end(min(c.first_query + BLOCK_M, p.seqlen_q) - 1);
    const int num_tiles = div_up(kv_end, BLOCK_N);
    const uint32 q =
        shared_address(c.smem.sQ + c.warp_m * ROWS_PER_WARP * LD) + lane_offset_rows_first<LD>();
    const uint32 k_lane = 2 * c.warp_n * KEYS_PER_WARP * LD + lane_offset_columns_first<LD>();
    const uint32 v_lane = 2 * c.warp_n * KEYS_PER_WARP * LD + lane_offset_rows_first<LD>();
    if (num_tiles > 0) {
        load_q(c);
        if constexpr (NUM_STAGES == 2) load_kv(c, 0, 0);
    }
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int stage = tile % NUM_STAGES;
        if constexpr (NUM_STAGES == 1) {
            block_sync();  // all are done with the previous tile before it is overwritten
            load_kv(c, tile, stage);
        }
        cp_async_wait<0>();
        if (tile == 0 && p.negate_q) {
            block_sync();  // Q is complete
            negate_q(c);
        }
        // Everyone's copies of this tile (the first time: and of Q) are visible; with two stages,
        // also: all are done with the previous tile, whose place the next one takes.
        block_sync();
        if (NUM_STAGES == 2 && tile + 1 < num_tiles) load_kv(c, tile + 1, stage ^ 1);
        AccumulatorTile<FRAGMENTS_M, TILES_N> rS;
        multiply_qk<T, FRAGMENTS_M, TILES_N, HEAD_DIM, LD>(
            rS, q, shared_address(c.smem.sK(stage)) + k_lane);
        ProbabilityTile<FRAGMENTS_M, TILES_N / 2> rP;
        if (c.mask.cuts(c.first_query, (tile + 1) * BLOCK_N)) {
            softmax<true>(c, rows, rS, rP, tile);
        } else {
            softmax<false>(c, rows, rS, rP, tile);
        }
        multiply_pv<T, FRAGMENTS_M, TILES_N / 2, TILES_D, LD>(
            rows.rO, rP, shared_address(c.smem.sV(stage)) + v_lane);
    }
}

// Adds what the warps n = 1, 2, ... of each row have found to what warp 0 has, in this order.
__device__ __forceinline__ void merge_warps(const Context& c, Rows& rows) {
    block_sync();  // no warp reads K or V any more: the results may take their place
    // Value i of a lane of warp (warp_m, warp_n): lanes next to each other, hence no bank
    // conflicts.
    float* sMerge = reinterpret_cast<float*>(c.smem.sKV) + c.lane;
    const auto slot = [&](int warp_n, int i) -> float& {
        const int warp = (warp_n - 1) * WARPS_M + c.warp_m;
        return sMerge[(warp * MERGE_VALUES + i) * WARP_SIZE];
    };
    if (c.warp_n > 0) {
        int i = 0;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                slot(c.warp_n, i++) = rows.state[m][half].max;
                slot(c.warp_n, i++) = rows.state[m][half].sum;
            }
#pragma unroll
            for (int d = 0; d < TILES_D; ++d)
#pragma unroll
                for (int e = 0; e < 4; ++e) slot(c.warp_n, i++) = rows.rO.x[m][d][e];
        }
    }
    block_sync();  // the results of the other warps are there
    if (c.warp_n > 0) return;
#pragma unroll 1
    for (int other = 1; other < WARPS_N; ++other) {
        int i = 0;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
            float mine[2], theirs[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                RowState& state = rows.state[m][half];
                const float their_max = slot(other, i++), their_sum = slot(other, i++);
                mine[half] = raise_max(state, their_max);
                theirs[half] = exp2_approx(their_max - finite_max(state.max));
                state.sum += their_sum * theirs[half];
            }
#pragma unroll
            for (int d = 0; d < TILES_D; ++d) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& o = rows.rO.x[m][d][e];
                    o = o * mine[e / 2] + slot(other, i++) * theirs[e / 2];
                }
            }
        }
    }
}

// Normalises, writes the LSE, and sends O through the warp's own rows of sQ out to memory.
__device__ __forceinline__ void finish(const Context& c, Rows& rows) {
    const AttentionParams& p = c.params;
    T* sO = c.smem.sQ + c.warp_m * ROWS_PER_WARP * LD;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const RowState& state = rows.state[m][half];
            const float sum = group_sum<QUAD>(state.sum);
            const GateRow<GATE> gate = c.gate_row(m, half);
            if (c.lane % QUAD == 0) {
                gate.finish(state.max, sum);
                if (p.lse != nullptr && gate.valid) p.lse[gate.row] = log_sum_exp(state.max, sum);
            }
            const float inverse = inverse_sum(sum);
            T* row = sO + (m * 16 + half * 8 + c.lane / QUAD) * LD + c.lane % QUAD * 2;
#pragma unroll
            for (int d = 0; d < TILES_D; ++d) {
                const float (&o)[4] = rows.rO.x[m][d];
                *reinterpret_cast<uint32*>(row + d * 8) = pack2<T>(
                    scaled_output(o[2 * half], inverse), scaled_output(o[2 * half + 1], inverse));
            }
        }
    }
    warp_sync();  // the warp's rows are complete; with WARPS_N = 1 no other warp touches them
    if constexpr (WRITES_OUTPUT<GATE>) {
        const int first = c.first_query + c.warp_m * ROWS_PER_WARP;
        T* gO = output_pointer<T>(p, c.tile, first);
        copy_rows_out<ROWS_PER_WARP, DIM_V, LD, ALIGN_BYTES, WARP_SIZE>(gO, p.o_strides.row, sO,
                                                                        p.seqlen_q - first, c.lane);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    fwd_sm80(const __grid_constant__ AttentionParams params) {
    extern __shared__ __align__(128) char smem_raw[];
    const TileCoord tile = tile_coord<CAUSAL>(params, BLOCK_M);
    const int warp = threadIdx.x / WARP_SIZE;
    const Context context = {params,
                             *reinterpret_cast<SharedStorage*>(smem_raw),
                             tile,
                             Mask<CAUSAL>(params),
                             tile.m_block * BLOCK_M,
                             warp % WARPS_M,
                             warp / WARPS_M,
                             int(threadIdx.x % WARP_SIZE)};
    Rows rows;
    rows.rO.clear();
    attend(context, rows);
    if constexpr (WARPS_N > 1) {
        merge_warps(context, rows);
        if (context.warp_n > 0) return;
    }
    finish(context, rows);
}

}  // namespace flashcore
