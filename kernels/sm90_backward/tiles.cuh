// tiles.cuh - what bwd_sm90.cu and bwd_sm90_wide.cu have in common: tiles in shared memory, and
// which of dQ's tiles is which.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

using LayoutOwnQK = SharedLayout<T, BLOCK_M, HEAD_DIM>;
using LayoutOwnVO = SharedLayout<T, BLOCK_M, HEAD_DIM_V>;
using LayoutQK = SharedLayout<T, BLOCK_N, HEAD_DIM>;
using LayoutVO = SharedLayout<T, BLOCK_N, HEAD_DIM_V>;
using LayoutDS = SharedLayout<T, BLOCK_N, BLOCK_M>;  // ADDS_DQ: of a tile, for dQ += dS K

constexpr int ROWS = 64;      // of a consumer: wgmma's M
constexpr int BOX_ROWS = 64;  // that one copy brings
constexpr int CONSUMER_WARPS = NUM_WARPS;
constexpr int CONSUMERS = CONSUMER_WARPS / WARPGROUP_WARPS;
constexpr int CTA_THREADS = NUM_THREADS + WARPGROUP_THREADS;
constexpr int STEPS = BLOCK_N / 16;  // 16-column steps of P dO, dS Q, dS K

constexpr int TURNS = 4;  // tiles whose turn may have come before the first of them is added to

// Which tile of all heads' and batches' queries. A packed batch has room for tiles of each
// sequence: bwd_scale.cu finds them there.
__device__ __forceinline__ int64 tile_of_dq(const BackwardParams& p, const Work& w, int head,
                                            int tile) {
    if constexpr (VARLEN) {
        const PackedBatch q = packed_queries(p, 1, BLOCK_N);
        return int64(head) * q.places() + q.first_block(w.batch + 1, w.start_q) + tile;
    }
    const int per_head = (p.seqlen_q + BLOCK_N - 1) / BLOCK_N;
    return int64(w.batch * p.heads_q + head) * per_head + tile;
}

static_assert(BLOCK_N % BOX_ROWS == 0, "whole boxes");
static_assert(LayoutQK::SWIZZLED && LayoutVO::SWIZZLED, "head dims of whole panels");

}  // namespace flashcore
