// wgmma_tile.cuh - the two products of attention for the 64 rows of a warpgroup, out of wgmma:
// S = Q K^T and O += P V, with S, P and O in registers. Both start and return; see ptx/wgmma.cuh
// for what a caller may touch until they are waited for.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

// S = Q K^T. sQ: the warpgroup's first row; sK: the first of as many keys as rS has columns, which
// may be a part of the tile. All columns of the tiles of Q and K.
template <typename LayoutQ, typename LayoutK, typename T, int COUNT>
__device__ __forceinline__ void wgmma_qk(float (&rS)[COUNT], const T* sQ, const T* sK) {
    constexpr int SWIZZLE = LayoutK::PANEL * int(sizeof(T));
    const uint64 q = matrix_descriptor(matrix_layout<SWIZZLE>(), shared_address(sQ));
    const uint64 k = matrix_descriptor(matrix_layout<SWIZZLE>(), shared_address(sK));
    fence_registers(rS);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < LayoutQ::COLS; d += 16)
        wgmma<T, 2 * COUNT>(rS, advance_descriptor(q, LayoutQ::step(0, 0, d) * sizeof(T)),
                            advance_descriptor(k, LayoutK::step(0, 0, d) * sizeof(T)), d > 0);
    wgmma_commit();
}

// The same with Q in registers. rQ: the A operand of 16 columns each, all of them.
template <typename LayoutK, typename T, int STEPS, int COUNT>
__device__ __forceinline__ void wgmma_qk(float (&rS)[COUNT], uint32 (&rQ)[STEPS][4], const T* sK) {
    constexpr int SWIZZLE = LayoutK::PANEL * int(sizeof(T));
    static_assert(LayoutK::COLS == 16 * STEPS);
    const uint64 k = matrix_descriptor(matrix_layout<SWIZZLE>(), shared_address(sK));
    fence_registers(rS);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) fence_registers(rQ[step]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        wgmma<T, 2 * COUNT>(rS, rQ[step],
                            advance_descriptor(k, LayoutK::step(0, 0, step * 16) * sizeof(T)),
                            step > 0);
    wgmma_commit();
}

// O += P V, or O = P V unless it `accumulates`. rP: the A operand of 16 keys each; sV: the first of
// these keys, which may be a part of the tile, in the panel that has the first of O's columns.
template <typename LayoutV, typename T, int COUNT, int STEPS>
__device__ __forceinline__ void wgmma_pv(float (&rO)[COUNT], uint32 (&rP)[STEPS][4], const T* sV,
                                         bool accumulates = true) {
    static_assert(2 * COUNT == LayoutV::COLS || 2 * COUNT % LayoutV::PANEL == 0, "whole panels");
    constexpr int SWIZZLE = LayoutV::PANEL * int(sizeof(T));
    constexpr uint32 PANEL_BYTES = LayoutV::ROWS * SWIZZLE;
    const uint64 v = matrix_descriptor(matrix_layout<SWIZZLE>(PANEL_BYTES), shared_address(sV));
    fence_registers(rO);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) fence_registers(rP[step]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        wgmma<T, 2 * COUNT, true>(rO, rP[step], advance_descriptor(v, step * 16 * SWIZZLE),
                                  accumulates || step > 0);
    wgmma_commit();
}

// C = A B, both in shared memory: sA: 64 rows of LayoutA, K-major; sB: LayoutA::COLS rows of
// LayoutB, from the panel on that has the first of N columns.
template <typename LayoutA, typename LayoutB, typename T, int COUNT>
__device__ __forceinline__ void wgmma_shared(float (&rC)[COUNT], const T* sA, const T* sB) {
    constexpr int SWIZZLE_A = LayoutA::PANEL * int(sizeof(T));
    constexpr int SWIZZLE_B = LayoutB::PANEL * int(sizeof(T));
    constexpr uint32 PANEL_BYTES = LayoutB::ROWS * SWIZZLE_B;
    const uint64 a = matrix_descriptor(matrix_layout<SWIZZLE_A>(), shared_address(sA));
    const uint64 b = matrix_descriptor(matrix_layout<SWIZZLE_B>(PANEL_BYTES), shared_address(sB));
    fence_registers(rC);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < LayoutA::COLS; k += 16)
        wgmma<T, 2 * COUNT, true>(rC, advance_descriptor(a, LayoutA::step(0, 0, k) * sizeof(T)),
                                  advance_descriptor(b, k * SWIZZLE_B), k > 0);
    wgmma_commit();
}

// Packs probabilities, which lie where S was, as the A operand: a pair of them is one register.
template <typename T, int STEPS>
__device__ __forceinline__ void pack_p(uint32 (&rP)[STEPS][4], const float (&rS)[STEPS * 8]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            rP[step][i] = pack2<T>(rS[8 * step + 2 * i], rS[8 * step + 2 * i + 1]);
}

}  // namespace flashcore
