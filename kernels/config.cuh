// config.cuh - the one place that reads the -DFC_* defines. A compiled kernel has one
// configuration, so everything below is a constant, and branches on it are `if constexpr`. Entry
// files and their pages include this; the building blocks of flashcore/ take what they need as
// template values.
#pragma once
#include <flashcore/debug.cuh>
#include <flashcore/types.cuh>

#if !defined(FC_DTYPE) || !defined(FC_DIM_QK) || !defined(FC_DIM_V) || !defined(FC_HEAD_DIM)
#error "define FC_DTYPE, FC_DIM_QK, FC_DIM_V and FC_HEAD_DIM"
#endif
#if !defined(FC_BLOCK_M) || !defined(FC_BLOCK_N) || !defined(FC_WARPS_M) || !defined(FC_WARPS_N)
#error "define FC_BLOCK_M, FC_BLOCK_N, FC_WARPS_M and FC_WARPS_N"
#endif
#if !defined(FC_NUM_STAGES) || !defined(FC_CP_ASYNC) || !defined(FC_WARP_SOFTMAX)
#error "define FC_NUM_STAGES, FC_CP_ASYNC and FC_WARP_SOFTMAX"
#endif
#if !defined(FC_HEAD_DIM_V) || !defined(FC_WARPS_D) || !defined(FC_PACK_GQA) || \
    !defined(FC_SPLIT_KV)
#error "define FC_HEAD_DIM_V, FC_WARPS_D, FC_PACK_GQA and FC_SPLIT_KV"
#endif
#if !defined(FC_BOUNDED_LEFT) || !defined(FC_RULES) || !defined(FC_VARLEN)
#error "define FC_BOUNDED_LEFT, FC_RULES and FC_VARLEN"
#endif
#if !defined(FC_FP8) || !defined(FC_BOUNDED_RIGHT) || !defined(FC_GATE) || !defined(FC_ALIGN_BYTES)
#error "define FC_FP8, FC_BOUNDED_RIGHT, FC_GATE and FC_ALIGN_BYTES"
#endif
#if !defined(FC_SMEM_BYTES) || !defined(FC_PARAMS_BYTES) || !defined(FC_MIN_BLOCKS)
#error "define FC_SMEM_BYTES, FC_PARAMS_BYTES and FC_MIN_BLOCKS"
#endif
#if !defined(FC_STAGED_COLS) || !defined(FC_CLUSTER) || !defined(FC_Q_STAGES)
#error "define FC_STAGED_COLS, FC_CLUSTER and FC_Q_STAGES"
#endif
#if !defined(FC_ONE_TILE) || !defined(FC_ALONE)
#error "define FC_ONE_TILE and FC_ALONE"
#endif
#if !defined(FC_OWNS_KEYS) || !defined(FC_GRADIENT_COLS)
#error "define FC_OWNS_KEYS and FC_GRADIENT_COLS"
#endif
#if !defined(FC_FP32_GRADIENTS) || !defined(FC_ACCUMULATES)
#error "define FC_FP32_GRADIENTS and FC_ACCUMULATES"
#endif
#if !defined(FC_SUMS_DISTANCES) || !defined(FC_ADDS_DQ) || !defined(FC_ORDERED)
#error "define FC_SUMS_DISTANCES, FC_ADDS_DQ and FC_ORDERED"
#endif

namespace flashcore {

template <int DTYPE>
struct DataType;
template <>
struct DataType<0> {
    using type = half_t;
};
template <>
struct DataType<1> {
    using type = bfloat16_t;
};
template <>
struct DataType<2> {
    using type = float;
};

using T = DataType<FC_DTYPE>::type;        // q, k, v, o, and P as it enters P V
constexpr int DIM_QK = FC_DIM_QK;          // columns of q and k in memory
constexpr int DIM_V = FC_DIM_V;            // columns of v and o in memory
constexpr int HEAD_DIM = FC_HEAD_DIM;      // columns of the tiles of Q and K: the rest is zeros
constexpr int HEAD_DIM_V = FC_HEAD_DIM_V;  // columns of the tiles of V and O
constexpr int BLOCK_M = FC_BLOCK_M;        // queries per tile (Br)
constexpr int BLOCK_N = FC_BLOCK_N;        // keys per tile (Bc)
constexpr int WARPS_M = FC_WARPS_M;        // warps along the queries
constexpr int WARPS_N = FC_WARPS_N;        // warps along the keys (S) or the head dim (O)
constexpr int WARPS_D = FC_WARPS_D;        // warps along the columns of O, sharing a row's scores
constexpr int NUM_STAGES = FC_NUM_STAGES;  // of K and V
constexpr int Q_STAGES = FC_Q_STAGES;      // 2: the next block's Q arrives while this one is used
constexpr bool CP_ASYNC = FC_CP_ASYNC;     // asynchronous copies; needs sm_80
constexpr bool WARP_SOFTMAX = FC_WARP_SOFTMAX;
constexpr bool FP8 = FC_FP8;  // q, k, v arrive as e4m3 with a scale per head
// Whether the window has a right and a left side: a query sees no key further from its own position
// than that. Causal is a right side of 0; see position_mask.cuh.
constexpr bool BOUNDED_RIGHT = FC_BOUNDED_RIGHT;
constexpr bool BOUNDED_LEFT = FC_BOUNDED_LEFT;
constexpr int RULES = FC_RULES;         // bits of score.cuh
constexpr bool VARLEN = FC_VARLEN;      // packed sequences: see work.cuh
constexpr bool PACK_GQA = FC_PACK_GQA;  // the query heads of a group share a tile
constexpr bool SPLIT_KV = FC_SPLIT_KV;  // a row's keys may be split over several CTAs
constexpr int CLUSTER = FC_CLUSTER;  // CTAs that combine splits through each other's shared memory
constexpr bool ONE_TILE = FC_ONE_TILE;  // a warpgroup has one tile of keys at most
constexpr bool ALONE = FC_ALONE;        // shared memory leaves no room for a second CTA
#if FC_CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(FC_CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif
constexpr int GATE = FC_GATE;
constexpr int ALIGN_BYTES = FC_ALIGN_BYTES;  // every row of q, k, v, o starts and ends on this
constexpr int STAGED_COLS = FC_STAGED_COLS;  // columns of O that leave through shared memory
// Backward: whose gradients a CTA computes, how many columns of them at most, which are stored in
// fp32 whatever T is (bits: dq or dk, dv, dbias), whether they are added to what is there, whether
// rows sum up what ALiBi's slopes need, and whether a CTA that owns keys adds to dQ, too.
constexpr bool OWNS_KEYS = FC_OWNS_KEYS;
constexpr int GRADIENT_COLS = FC_GRADIENT_COLS;
constexpr int FP32_GRADIENTS = FC_FP32_GRADIENTS;
constexpr bool ACCUMULATES = FC_ACCUMULATES;
constexpr bool SUMS_DISTANCES = FC_SUMS_DISTANCES;
constexpr bool ADDS_DQ = FC_ADDS_DQ;
constexpr bool ORDERED = FC_ORDERED;           // and does so when it is its turn
constexpr int MIN_BLOCKS = FC_MIN_BLOCKS;      // CTAs per multiprocessor to leave registers for
constexpr int SMEM_BYTES = FC_SMEM_BYTES;      // dynamic shared memory, as the package computes it
constexpr int PARAMS_BYTES = FC_PARAMS_BYTES;  // of the struct that the package packs

// The warps that compute: all of a CTA's, but in fwd_sm90 a warpgroup more loads (sm90/traits.cuh).
constexpr int NUM_WARPS = WARPS_M * WARPS_N * WARPS_D;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;

static_assert(BLOCK_M > 0 && BLOCK_N > 0 && NUM_STAGES > 0, "sizes are positive");
static_assert(NUM_THREADS <= 1024, "a thread block has at most 1024 threads");
static_assert(DIM_QK <= HEAD_DIM && DIM_V <= HEAD_DIM_V, "the tile holds a whole row");
static_assert(ALIGN_BYTES == 2 || ALIGN_BYTES == 4 || ALIGN_BYTES == 8 || ALIGN_BYTES == 16,
              "rows are loaded in pieces of 2, 4, 8 or 16 bytes");
static_assert(GATE >= GATE_NONE && GATE <= GATE_DS, "an unknown debug gate");

}  // namespace flashcore
