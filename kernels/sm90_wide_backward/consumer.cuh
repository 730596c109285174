// consumer.cuh - what the warpgroups of bwd_sm90_wide.cu that compute have in common.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_backward/producer.cuh>
#include <sm90_backward/store.cuh>
#include <sm90_wide_backward/traits.cuh>

namespace flashcore {

// Of S, element 4 n + 2 half + e is of the lane's key `half` (0 or 1) and of query
// 8 n + 2 (lane % 4) + e.
struct Consumer : WarpContext {
    const HopperBackwardParams& p;
    SharedStorage& smem;

    // Calls visit(i, n, half, statistics) for each pair of a lane's neighbouring elements, i and
    // i + 1, of 8-query group n of its key `half`; their queries' statistics: of sShift or sDelta.
    template <typename Visit>
    __device__ __forceinline__ static void each_pair(const float (&statistics)[BLOCK_N], int lane,
                                                     Visit visit) {
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            const int query = n * 8 + lane % QUAD * 2;
            const float2 pair = *reinterpret_cast<const float2*>(&statistics[query]);
            const float of[2] = {pair.x, pair.y};
#pragma unroll
            for (int half = 0; half < 2; ++half) visit(4 * n + 2 * half, n, half, of);
        }
    }

    // The pipeline state of a tile. It is not kept from tile to tile: registers are scarce.
    template <int STAGES>
    __device__ __forceinline__ static PipelineState<STAGES> state_of(int nth) {
        return {nth % STAGES, uint32(nth / STAGES % 2)};
    }

    // gradient += first x tile, part by part.
    template <typename Layout, int NUM_PARTS, int COUNT>
    __device__ __forceinline__ static void multiply_columns(float (&gradient)[NUM_PARTS][COUNT],
                                                            uint32 (&first)[STEPS][4],
                                                            const T* tile) {
#pragma unroll
        for (int i = 0; i < NUM_PARTS; ++i)
            wgmma_pv<Layout>(gradient[i], first, tile + Layout::step(0, 0, i * 2 * COUNT));
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < NUM_PARTS; ++i) fence_registers(gradient[i]);
    }

    // Stores a gradient's rows, multiplied by `factor`; WHICH: 1 for dk, 2 for dv.
    template <int WHICH, int VALID_COLS, int NUM_PARTS, int COUNT>
    __device__ __forceinline__ void store_columns(const float (&x)[NUM_PARTS][COUNT], float factor,
                                                  void* base, const Strides& strides) const {
        static_assert(NUM_PARTS <= 2);
        store_gradient<WHICH, VALID_COLS>(*this, x[0], factor, base, strides);
        if constexpr (NUM_PARTS == 2)
            store_gradient<WHICH, VALID_COLS, 2 * COUNT>(*this, x[1], factor, base, strides);
    }

    // Where this thread's four elements of 8-query group n are handed on.
    __device__ __forceinline__ float4& handed(int n) const {
        return smem.sP[n][thread_index() % WARPGROUP_THREADS];
    }
};

}  // namespace flashcore
