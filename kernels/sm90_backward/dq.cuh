// dq.cuh - dQ += dS K of a step of bwd_sm90.cu, where a CTA owns keys: all consumers' dS meet in
// shared memory, and what comes of them is added to fp32 sums in global memory.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_backward/traits.cuh>
#include <sm90_backward/turns.cuh>
#include <sm90_backward/unseen_rows.cuh>

namespace flashcore {

// Writes dS^T of a consumer's keys into shared memory, with queries as rows. The other consumers
// have multiplied what was there: they have come to the barrier of a later tile.
template <typename Shared>
__device__ __forceinline__ void share_ds(const WarpContext& c, Shared& smem, int stage,
                                         const uint32 (&rdS)[STEPS][4]) {
    // Of four 8 x 8 blocks, a lane points to a row of their transposes.
    const int query = c.lane / 16 * 8 + c.lane % 8, key = c.first_row + c.lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        stmatrix_x4_trans(
            shared_address(smem.sDS[stage] + LayoutDS::element(step * 16 + query, key)), rdS[step]);
    fence_proxy_async();  // wgmma sees this thread's dS
    named_barrier_sync(BARRIER_DS_WRITTEN, NUM_THREADS);
}

// dQ of the tile over all consumers' keys, or this consumer's columns of it, starts.
template <typename Shared>
__device__ __forceinline__ void multiply_dq(Shared& smem, int stage, int consumer,
                                            float (&rDQ)[COLS_DQ / 2]) {
    const int col = DQ_UNITS > 1 ? consumer * COLS_DQ : 0;
    wgmma_shared<LayoutDS, LayoutOwnQK>(rDQ, smem.sDS[stage],
                                        keys_of_dq(smem) + LayoutOwnQK::step(0, 0, col));
}

// Adds to the sums in global memory, which lie as the accumulators do. ORDERED: the first to come
// to a tile finds nothing there, and stores.
template <typename Shared>
__device__ __forceinline__ void add_dq(const WarpContext& c, Shared& smem, const WalkedTile& at,
                                       int nth, int consumer, const float (&rDQ)[COLS_DQ / 2]) {
    const BackwardParams& p = c.params;
    const int unit = DQ_UNITS > 1 ? consumer : 0;
    const int64 first = tile_of_dq(p, c.work, at.head, at.tile) * DQ_UNITS + unit;
    float4* const to = reinterpret_cast<float4*>(p.dq_sum) + first * (ROWS * COLS_DQ / 4) +
                       thread_index() % WARPGROUP_THREADS;
    const bool is_first = ORDERED && turn_of(c, at.tile) == 0;
    if constexpr (ORDERED) mbarrier_wait(&smem.turn[nth % TURNS], nth / TURNS % 2);
#pragma unroll
    for (int n = 0; n < COLS_DQ / 8; ++n) {
        const float4 x = {rDQ[4 * n], rDQ[4 * n + 1], rDQ[4 * n + 2], rDQ[4 * n + 3]};
        float4* const address = to + n * WARPGROUP_THREADS;
        if (is_first) {
            *address = x;
        } else {
            red_add(&address->x, x);
        }
    }
    if constexpr (ORDERED) {
        warp_sync();  // all lanes have added
        if (elect_one()) mbarrier_arrive(&smem.added[nth % TURNS]);
    }
}

}  // namespace flashcore
