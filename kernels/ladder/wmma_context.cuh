// wmma_context.cuh - what wmma_fused.cu and its two softmaxes know: sizes, shared memory, the
// problem.
#pragma once
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/rules/mask.cuh>
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

}  // namespace flashcore
