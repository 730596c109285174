// traits.cuh - the sizes of bwd_sm80.cu, its shared memory, and what a thread keeps in registers.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>
#include <flashcore/tile/mma_tf32_tile.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

using LayoutOwnQK = SharedLayout<T, BLOCK_M, HEAD_DIM>;
using LayoutOwnVO = SharedLayout<T, BLOCK_M, HEAD_DIM_V>;
using LayoutQK = SharedLayout<T, BLOCK_N, HEAD_DIM>;
using LayoutVO = SharedLayout<T, BLOCK_N, HEAD_DIM_V>;
constexpr int ROWS_PER_WARP = BLOCK_M / WARPS_M;
constexpr int FRAGMENTS_M = ROWS_PER_WARP / 16;
// With masks: which of its pairs each of a lane's rows sees.
template <bool LOOKED_UP>
using Visible = KeyBits<LOOKED_UP, TILES_N>[FRAGMENTS_M][2];
using AllKept = Kept[FRAGMENTS_M][2];  // with dropout: which of them are kept

static_assert(BLOCK_M % (16 * WARPS_M) == 0, "warps own whole 16-row fragments");
static_assert(BLOCK_N % 16 == 0 && HEAD_DIM % 16 == 0 && HEAD_DIM_V % 16 == 0, "steps of 16");
static_assert(!LISTED || (64 % BLOCK_N == 0 && 64 % ROWS_PER_WARP == 0),
              "a warp meets one block of a mask in each tile");
static_assert(WARPS_N == 1 && WARPS_D == 1 && !PACK_GQA && !SPLIT_KV && CP_ASYNC,
              "a warp has all of its rows' columns");

// Columns of the gradients that a CTA has. Where they are fewer than all, several CTAs own the same
// rows, and each computes the scores again.
constexpr int COLS_QK = GRADIENT_COLS < HEAD_DIM ? GRADIENT_COLS : HEAD_DIM;
constexpr int COLS_VO = GRADIENT_COLS < HEAD_DIM_V ? GRADIENT_COLS : HEAD_DIM_V;
constexpr int COLUMN_BLOCKS =
    div_up(OWNS_KEYS && HEAD_DIM_V > HEAD_DIM ? HEAD_DIM_V : HEAD_DIM, GRADIENT_COLS);
static_assert(HEAD_DIM % COLS_QK == 0 && (!OWNS_KEYS || HEAD_DIM_V % COLS_VO == 0),
              "equal blocks of columns");
static_assert(COLUMN_BLOCKS == 1 || GRADIENT_COLS % 64 == 0,
              "a block of columns begins with a panel: step_bytes relies on it");

// S = own q or k times the other; and what dS is multiplied by.
using ProductsQK =
    TileProducts<T, FRAGMENTS_M, TILES_N, COLS_QK / 8, LayoutOwnQK, LayoutQK, LayoutQK>;
// dP = own v or dO times the other; and what P is multiplied by.
using ProductsVO =
    TileProducts<T, FRAGMENTS_M, TILES_N, COLS_VO / 8, LayoutOwnVO, LayoutVO, LayoutVO>;
using Scores = ProductsQK::Scores;
using Probabilities = ProductsQK::Probabilities;
constexpr int STEPS = ProductsQK::STEPS, STEP_TILES = ProductsQK::STEP_TILES;

// A warp's gradients, in mma fragments: of its keys dK and dV, of its queries dQ.
struct Gradients {
    ProductsQK::Output rQK;
    ProductsVO::Output rVO;  // OWNS_KEYS
    float distances[FRAGMENTS_M]
                   [2];   // SUMS_DISTANCES: of the lane's rows, for the slopes' gradient
    PerElement elements;  // of all of the lane's rows, for gradients of mod_args

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < MOD_ELEMENTS; ++n) elements.x[n] = 0.0f;
        rQK.clear();
        if (OWNS_KEYS) rVO.clear();
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) distances[m][0] = distances[m][1] = 0.0f;
    }
};

struct alignas(128) SharedStorage {
    T sOwnQK[LayoutOwnQK::SIZE];        // BLOCK_M x HEAD_DIM: K, or Q. In the end dK, or dQ
    T sOwnVO[LayoutOwnVO::SIZE];        // BLOCK_M x HEAD_DIM_V: V, or dO. In the end dV
    T sQK[NUM_STAGES][LayoutQK::SIZE];  // BLOCK_N x HEAD_DIM: Q, or K
    T sVO[NUM_STAGES][LayoutVO::SIZE];  // BLOCK_N x HEAD_DIM_V: dO, or V
    float sShift[NUM_STAGES][BLOCK_N];  // OWNS_KEYS: of the queries
    float sDelta[NUM_STAGES][BLOCK_N];
    Pipeline<NUM_STAGES> tiles;  // guards a stage of all four
    Work work;
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");
static_assert(sizeof(BackwardParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

// What a thread knows for the whole kernel.
struct Context : WarpContext {
    SharedStorage& smem;
    int first_col;  // of the CTA's columns of the gradients

    __device__ __forceinline__ Context(const BackwardParams& params, SharedStorage& smem,
                                       const Work& work, int first_col)
        : WarpContext{params, work,
                      shfl(int(thread_index_volatile()) / WARP_SIZE, 0) * ROWS_PER_WARP,
                      int(thread_index_volatile() % WARP_SIZE)},
          smem(smem),
          first_col(first_col) {}

    // Whether some of the CTA's columns are among the `dims` of a gradient.
    __device__ __forceinline__ bool has_columns(int dims) const {
        return COLUMN_BLOCKS == 1 || first_col < dims;
    }
};

}  // namespace flashcore
