// wmma_fused.cu - FlashAttention (Dao et al. 2022, algorithm 1) on WMMA tensor-core fragments.
//
//   O = softmax(softmax_scale * Q K^T) V,  LSE = log sum exp
//
// in one pass over the keys, with nothing of size Sq x Skv in global memory. One thread block owns
// BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time:
//
//   K_j, V_j -> sK, sV              copied by all threads; or by cp.async while tile j-1 is used
//   S = Q K_j^T -> sS, fp32         fragments of 16 x 16, stored: their layout is not specified
//   p = exp(S - m) -> sP, 16 bit    online softmax on the rows of sS, with m and l
//   O = O * exp(m_old - m) + P V_j
//
// Five rungs of the ladder are this file, as rows of the table in tiles.py:
//   wmma_fused_32, _64   tiles of 32 or 64, block-wide softmax, O in shared memory
//   wmma_cp_async        two stages of K and V: the next tile is on its way while this one is used
//   wmma_warp_softmax    a warp owns its 16 rows from S to O: maxima and sums by shuffle, O in
//                        registers, and no block barrier but the one per tile that guards K and V
//   fp8_wmma             the same, with q, k, v as e4m3 (quantised by fp8_quantize.cu)
//
// Shared memory (LD = HEAD_DIM + 8, LD_S = BLOCK_N + 8; a row is a query or a key)
//
//   | sQ BLOCK_M x LD | sK NUM_STAGES x BLOCK_N x LD | sV the same | sS BLOCK_M x LD_S, fp32 |
//   block-wide:  | sO BLOCK_M x LD, fp32 | sPartial | sFactor |
//   warp-owned:  | sFactor |
//
// P lies over S: all of the block's (block-wide), or each warp's 16 rows (warp-owned), whose O
// leaves through the space of sK and sV.
//
// Limits: 16-bit inputs, D and Dv <= HEAD_DIM.
#include <flashcore/config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/epilogue.cuh>
#include <flashcore/mask.cuh>
#include <flashcore/mma_tile.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx_warp.cuh>
#include <flashcore/smem_tile.cuh>
#include <flashcore/softmax.cuh>

namespace flashcore {

constexpr int LD = padded_row(HEAD_DIM);
constexpr int LD_S = padded_row(BLOCK_N);              // of sS (fp32) and sP (T)
constexpr int ROWS_PER_WARP = BLOCK_M / WARPS_M;       // query rows of a warp
constexpr int TILES_N = BLOCK_N / WMMA_DIM / WARPS_N;  // 16-key fragments of a warp
constexpr int TILES_D = HEAD_DIM / WMMA_DIM;
constexpr int THREADS_PER_ROW = NUM_THREADS / BLOCK_M;

static_assert(BLOCK_M % (WMMA_DIM * WARPS_M) == 0, "warps own whole 16-row fragments of the tile");
static_assert(BLOCK_N % (WMMA_DIM * WARPS_N) == 0, "warps own whole 16-key fragments of the tile");
static_assert(HEAD_DIM % WMMA_DIM == 0, "the head dim is whole fragments");
static_assert(NUM_THREADS % BLOCK_M == 0 && WARP_SIZE % THREADS_PER_ROW == 0,
              "the threads of a softmax row sit in one warp");
static_assert(!WARP_SOFTMAX || (WARPS_N == 1 && ROWS_PER_WARP == WMMA_DIM),
              "warp softmax: a warp owns 16 whole rows");
static_assert(NUM_STAGES == 1 || NUM_STAGES == 2, "one stage, or two in turn");

// What only the block-wide softmax keeps in shared memory.
struct BlockWideStorage {
    float sO[BLOCK_M * LD];                     // output, unnormalised
    float sPartial[BLOCK_M * THREADS_PER_ROW];  // one maximum or sum per thread of a row
    float sFactor[BLOCK_M];                     // per row, at the end: 1 / l
};
struct WarpOwnedStorage {
    float sFactor[BLOCK_M];  // per row: exp(m_old - m), at the end 1 / l
};

template <bool WARP>
struct RowStorage {
    using type = BlockWideStorage;
};
template <>
struct RowStorage<true> {
    using type = WarpOwnedStorage;
};

struct alignas(128) SharedStorage {
    T sQ[BLOCK_M * LD];
    T sK[NUM_STAGES][BLOCK_N * LD];
    T sV[NUM_STAGES][BLOCK_N * LD];
    float sS[BLOCK_M * LD_S];  // raw scores; then, over them, probabilities as T
    RowStorage<WARP_SOFTMAX>::type rows;
};
static_assert(sizeof(SharedStorage) == FC_SMEM_BYTES, "config.py computes the same size");
static_assert(sizeof(AttentionParams) == FC_PARAMS_BYTES, "launch.py packs the same struct");
static_assert(!WARP_SOFTMAX ||
                  sizeof(float) * BLOCK_M * LD <= 2 * NUM_STAGES * sizeof(T) * BLOCK_N * LD,
              "warp softmax: O leaves through the space of K and V");

// What a thread knows of the problem for the whole kernel. BlockWide and WarpOwned take it as a
// template argument only so that the one that is not chosen is never compiled.
struct Context {
    const AttentionParams& params;
    SharedStorage& smem;
    TileCoord tile;
    Mask<CAUSAL> mask;
    int first_query;
    float score_scale;  // raw to scaled scores: 1, or the product of fp8's scales of q and k
    int warp_m, warp_n;

    __device__ __forceinline__ int row_slab() const { return warp_m * ROWS_PER_WARP; }

    __device__ __forceinline__ GateRow<GATE> gate_row(int row) const {
        const int query = first_query + row;
        return {params, head_index(params, tile) * params.seqlen_q + query, query < params.seqlen_q,
                params.softmax_scale * score_scale};
    }
};

// ---- loads -------------------------------------------------------------------------------------

template <int ROWS, int DIM>
__device__ __forceinline__ void load_rows(T* sTile, const void* base, const Strides& strides,
                                          int batch, int head, int first_row, int seqlen) {
    if constexpr (FP8) {
        const e4m3_t* gTile =
            head_pointer<e4m3_t>(base, strides, batch, head) + first_row * strides.row;
        load_tile_e4m3<ROWS, HEAD_DIM, NUM_THREADS>(sTile, gTile, seqlen - first_row);
    } else {
        const T* gTile = head_pointer<T>(base, strides, batch, head) + first_row * strides.row;
        load_tile<ROWS, HEAD_DIM, DIM, ALIGN_BYTES, NUM_THREADS, CP_ASYNC>(
            sTile, gTile, strides.row, seqlen - first_row);
    }
}

__device__ __forceinline__ void load_kv(const Context& c, int tile, int stage) {
    const AttentionParams& p = c.params;
    const int head_kv = kv_head(p, c.tile.head);
    load_rows<BLOCK_N, DIM_QK>(c.smem.sK[stage], p.k, p.k_strides, c.tile.batch, head_kv,
                               tile * BLOCK_N, p.seqlen_kv);
    load_rows<BLOCK_N, DIM_V>(c.smem.sV[stage], p.v, p.v_strides, c.tile.batch, head_kv,
                              tile * BLOCK_N, p.seqlen_kv);
    if constexpr (CP_ASYNC) cp_async_commit();
}

// ---- S = Q K^T ---------------------------------------------------------------------------------

__device__ __forceinline__ void compute_scores(const Context& c, int stage) {
    const int first_key = c.warp_n * TILES_N * WMMA_DIM;
    const T* sK = c.smem.sK[stage] + first_key * LD;
#pragma unroll
    for (int m = 0; m < ROWS_PER_WARP; m += WMMA_DIM) {
        const int row = c.row_slab() + m;
        Accumulator rS[TILES_N];
        scores_fragments<TILES_N, HEAD_DIM, LD>(rS, c.smem.sQ + row * LD, sK);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
            wmma_store_d_row(c.smem.sS + row * LD_S + first_key + n * WMMA_DIM, rS[n], LD_S);
    }
}

// ---- block-wide softmax, O in shared memory ----------------------------------------------------

template <typename C>
struct BlockWide {
    RowState state;  // the same maximum in all threads of the row, each its part of the sum
    int row, part;   // thread `part` of THREADS_PER_ROW handles every THREADS_PER_ROW-th column

    __device__ __forceinline__ explicit BlockWide(const C& c)
        : row(threadIdx.x / THREADS_PER_ROW), part(threadIdx.x % THREADS_PER_ROW) {
        for (int i = threadIdx.x; i < BLOCK_M * LD; i += NUM_THREADS) c.smem.rows.sO[i] = 0.0f;
    }

    __device__ __forceinline__ void sync_rows() const { block_sync(); }

    // Every thread of the row leaves its value; all of them get the whole row's.
    template <typename Combine>
    __device__ __forceinline__ float across_row(const C& c, float value, Combine combine) const {
        float* sPartial = c.smem.rows.sPartial + row * THREADS_PER_ROW;
        sPartial[part] = value;
        block_sync();  // all parts are written before any is read
        float result = sPartial[0];
#pragma unroll
        for (int i = 1; i < THREADS_PER_ROW; ++i) result = combine(result, sPartial[i]);
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
        // After the barrier in here every score has been read: P may take their place.
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

    // O's 16-column fragments are dealt out to the WARPS_N warps of a row; with five of them (D =
    // 80) and two warps, the last round is for the first warp only.
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
                Accumulator rO[1];
                wmma_load_c_row(rO[0], sO, LD);
                accumulate_fragments<1, BLOCK_N, LD_S, LD>(
                    rO, reinterpret_cast<const T*>(c.smem.sS) + slab * LD_S,
                    c.smem.sV[stage] + d * WMMA_DIM);
                wmma_store_d_row(sO, rO[0], LD);
            }
        }
    }

    __device__ __forceinline__ void finish(const C& c, float v_scale) {
        block_sync();  // the last tile's O is complete, and sPartial is free
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
                p.seqlen_q - c.first_query, threadIdx.x);
        }
    }
};

// ---- warp-owned softmax, O in registers --------------------------------------------------------

template <typename C>
struct WarpOwned {
    // Lane l works on row l % 16 and on one half of its keys, in pieces of four.
    static constexpr int PIECES = BLOCK_N / 8;
    RowState state;  // the same maximum in both lanes of the row, each its part of the sum
    RegisterOutput<TILES_D> output;
    int row, half;
    int swap;  // see piece_col

    __device__ __forceinline__ explicit WarpOwned(const C& c) {
        const int lane = threadIdx.x % WARP_SIZE;
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
        // Both lanes of the row hold the same factor; and P goes where S was, so every lane must
        // have read its scores.
        c.smem.rows.sFactor[c.row_slab() + row] = rescale;
        warp_sync();
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
                threadIdx.x % WARP_SIZE);
        }
    }
};

// ---- the algorithm -----------------------------------------------------------------------------

template <typename Rows>
__device__ __forceinline__ void attend(const Context& c, float v_scale) {
    const AttentionParams& p = c.params;
    const int kv_end = c.mask.row_end(min(c.first_query + BLOCK_M, p.seqlen_q) - 1);
    const int num_tiles = div_up(kv_end, BLOCK_N);
    if (num_tiles > 0) {
        load_rows<BLOCK_M, DIM_QK>(c.smem.sQ, p.q, p.q_strides, c.tile.batch, c.tile.head,
                                   c.first_query, p.seqlen_q);
        if constexpr (NUM_STAGES == 2) load_kv(c, 0, 0);
    }
    Rows rows(c);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int stage = tile % NUM_STAGES;
        if constexpr (NUM_STAGES == 1) {
            block_sync();  // all are done with the previous tile before it is overwritten
            load_kv(c, tile, stage);
        }
        if constexpr (CP_ASYNC) cp_async_wait<0>();
        // Everyone's copies of this tile (the first time: and of Q) are visible; with two stages,
        // also: all are done with the previous tile, whose place the next one takes.
        block_sync();
        if (NUM_STAGES == 2 && tile + 1 < num_tiles) load_kv(c, tile + 1, stage ^ 1);
        compute_scores(c, stage);
        rows.sync_rows();  // the row's scores are complete
        if (c.mask.cuts(c.first_query, c.first_query + BLOCK_M - 1, tile * BLOCK_N,
                        (tile + 1) * BLOCK_N)) {
            rows.template softmax<true>(c, tile);
        } else {
            rows.template softmax<false>(c, tile);
        }
        rows.sync_rows();  // the row's probabilities are complete, O is rescaled
        rows.accumulate(c, stage);
        // The next tile's scores take P's place after the block barrier above.
    }
    rows.finish(c, v_scale);
}

template <bool WARP>
struct RowsOf {
    using type = BlockWide<Context>;
};
template <>
struct RowsOf<true> {
    using type = WarpOwned<Context>;
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    wmma_fused(const __grid_constant__ AttentionParams params) {
    extern __shared__ __align__(128) char smem_raw[];
    const TileCoord tile = tile_coord<CAUSAL>(params, BLOCK_M);
    const int warp = threadIdx.x / WARP_SIZE;
    float score_scale = 1.0f;
    float v_scale = 1.0f;
    if constexpr (FP8) {
        const int64 kv = int64(tile.batch) * params.heads_kv + kv_head(params, tile.head);
        score_scale = params.q_scale[head_index(params, tile)] * params.k_scale[kv];
        v_scale = params.v_scale[kv];
    }
    const Context context = {params,
                             *reinterpret_cast<SharedStorage*>(smem_raw),
                             tile,
                             Mask<CAUSAL>(params),
                             tile.m_block * BLOCK_M,
                             score_scale,
                             warp % WARPS_M,
                             warp / WARPS_M};
    attend<RowsOf<WARP_SOFTMAX>::type>(context, v_scale);
}

}  // namespace flashcore
