// dq.cuh - the warpgroup of bwd_sm90_wide.cu that computes dQ of a tile, and adds it to fp32 sums
// in global memory.
#pragma once
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_backward/turns.cuh>
#include <sm90_wide_backward/consumer.cuh>
#include <sm90_wide_backward/traits.cuh>

namespace flashcore {

struct ConsumerDQ : Consumer {
    // Multiplies a tile's dS by K, and adds what comes of it to the sums in global memory, which
    // lie as the accumulators do.
    __device__ __forceinline__ void attend_tile(const WalkedTile& at, int nth) {
        const State state = state_of<NUM_STAGES>(nth);
        const int stage = state.stage;
        // ORDERED: the first to come to a tile finds nothing there, and stores.
        const bool is_first = ORDERED && turn_of(*this, at.tile) == 0;
        state.wait_full(smem.ds);
#pragma unroll
        for (int unit = 0; unit < DQ_UNITS; ++unit) {
            float rDQ[COLS_DQ / 2];
            wgmma_shared<LayoutDS, LayoutOwnQK>(
                rDQ, smem.sDS[stage], smem.sOwnQK + LayoutOwnQK::step(0, 0, unit * COLS_DQ));
            wgmma_wait<0>();
            fence_registers(rDQ);
            if (unit == DQ_UNITS - 1) state.release(smem.ds);
            if (ORDERED && unit == 0) mbarrier_wait(&smem.turn[nth % TURNS], nth / TURNS % 2);
            add(at, unit, is_first, rDQ);
        }
        if constexpr (ORDERED) {
            warp_sync();  // all lanes have added
            if (elect_one()) mbarrier_arrive(&smem.added[nth % TURNS]);
        }
    }

    __device__ __forceinline__ void add(const WalkedTile& at, int unit, bool is_first,
                                        const float (&rDQ)[COLS_DQ / 2]) const {
        const int64 nth_unit = tile_of_dq(p, work, at.head, at.tile) * DQ_UNITS + unit;
        float4* const to = reinterpret_cast<float4*>(p.dq_sum) + nth_unit * (ROWS * COLS_DQ / 4) +
                           thread_index() % WARPGROUP_THREADS;
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
    }

    __device__ __forceinline__ void run(const Walk& walk) {
        if (walk.count() > 0) mbarrier_wait(&smem.full_own, 0);
#pragma unroll 1
        for (int nth = 0; nth < walk.count(); ++nth) attend_tile(walk[nth], nth);
    }
};

}  // namespace flashcore
