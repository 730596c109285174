// wmma_context.cuh - what wmma_fused.cu and its two softmaxes share: sizes, shared memory, what a
// thread knows of the problem, loads and scores.
#pragma once
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <ladder/tile_coord.cuh>
#include <ladder/tile_load.cuh>
#include <ladder/wmma_tile.cuh>

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
static_assert(NUM_STAGES == 1 || NUM_STAGES == 2, "one stage or two");

// What only the block-wide softmax keeps in shared memory.
struct BlockWideStorage {
    float sO[BLOCK_M * LD];                     // BLOCK_M x HEAD_DIM, unnormalised
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
    T sQ[BLOCK_M * LD];              // BLOCK_M x HEAD_DIM
    T sK[NUM_STAGES][BLOCK_N * LD];  // BLOCK_N x HEAD_DIM each
    T sV[NUM_STAGES][BLOCK_N * LD];  // BLOCK_N x HEAD_DIM each
    float sS[BLOCK_M * LD_S];        // BLOCK_M x BLOCK_N raw scores; then, over them, P as T
    RowStorage<WARP_SOFTMAX>::type rows;
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");
static_assert(sizeof(AttentionParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");
static_assert(!WARP_SOFTMAX ||
                  sizeof(float) * BLOCK_M * LD <= 2 * NUM_STAGES * sizeof(T) * BLOCK_N * LD,
              "warp softmax: O leaves through the space of K and V");

// What a thread knows of the problem for the whole kernel. BlockWide and WarpOwned take it as a
// template argument only so that the one that is not chosen is never compiled.
struct Context {
    const AttentionParams& params;
    SharedStorage& smem;
    TileCoord tile;
    PositionMask<BOUNDED_RIGHT> mask;
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
        Accumulator rS[TILES_N];  // 16 rows x 16 keys each
        scores_fragments<TILES_N, HEAD_DIM, LD>(rS, c.smem.sQ + row * LD, sK);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
            wmma_store_d_row(c.smem.sS + row * LD_S + first_key + n * WMMA_DIM, rS[n], LD_S);
    }
}

}  // namespace flashcore
