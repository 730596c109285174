// mma_tf32_tile.cuh - the products of mma_sync_tile.cuh for fp32 inputs, at fp32's accuracy. Tensor
// cores multiply tf32, so each factor is split in two, x = hi + lo, and
//
//   x y = hi hi + (hi lo + lo hi)      lo lo, some 2^-24 of x y, is left out
//
// (Markidis et al. 2018; Ootomo and Yokota 2022). What keeps the sums accurate, too:
//   - Tensor cores truncate after every addition, so a long chain drifts towards zero: 2048 keys in
//     one chain cost O 3e-5 of |v|. So chains of hi hi are short (16 columns of Q K^T, the tile's
//     keys of P V) and begin at zero; fp32 additions, which round to nearest, add them up.
//   - The small terms have a chain of their own. It is 2^-11 as large, and so is its error. What
//     the fp32 additions of Q K^T round off is added to it: without that, one column of 1e5 cost
//     every later one its last bits, and scores of 1e4 had errors 1.3 times those of an fp32
//     product.
//   - An infinity has no lo (inf - inf is NaN), and its hi hi is the answer already: small terms
//     are not added to an infinite sum.
//
// Rows in shared memory are LD = HEAD_DIM + 4 floats long, 4 modulo 16. That makes them
// 16-byte aligned, and no two lanes meet in one of the 32 banks of 4 bytes:
//   ldmatrix reads 8 rows of 4 floats at once. Row r starts at bank r LD, which is 4 r or 20 r
//     modulo 32: 8 different multiples of 4.
//   V is read by keys 2(l%4) and columns l/4: bank 2(l%4) LD + l/4, or 8(l%4) + l/4 modulo 32.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>

namespace flashcore {

// Byte offset, from a tile's first element, of what this lane reads.
// Q, for ldmatrix: blocks (rows 0-7, 8-15) of columns 0-3, then of columns 4-7.
template <int LD>
__device__ __forceinline__ uint32 lane_offset_q_f32() {
    const int lane = thread_index() % WARP_SIZE;
    return 4 * (lane % 16 * LD + lane / 16 * 4);
}
// K, for ldmatrix: blocks of columns 0-3, 4-7, 8-11, 12-15, all of keys 0-7.
template <int LD>
__device__ __forceinline__ uint32 lane_offset_k_f32() {
    const int lane = thread_index() % WARP_SIZE;
    return 4 * (lane % 8 * LD + lane / 8 * 4);
}
// V: key 2(l%4), column l/4; its other key is the next.
template <int LD>
__device__ __forceinline__ uint32 lane_offset_v_f32() {
    const int lane = thread_index() % WARP_SIZE;
    return 4 * (lane % 4 * 2 * LD + lane / 4);
}

// Registers of an operand, split: 4 of A, 2 of B.
template <int REGISTERS>
struct SplitOperand {
    uint32 hi[REGISTERS], lo[REGISTERS];
};

// sum += A B in tf32, small += what tf32 left out.
__device__ __forceinline__ void mma_split(float (&sum)[4], float (&small)[4],
                                          const SplitOperand<4>& a, const SplitOperand<2>& b) {
    mma_m16n8k8_tf32(small, a.lo, b.hi[0], b.hi[1]);
    mma_m16n8k8_tf32(sum, a.hi, b.hi[0], b.hi[1]);
    mma_m16n8k8_tf32(small, a.hi, b.lo[0], b.lo[1]);
}

__device__ __forceinline__ void add(float (&sum)[4], const float (&x)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += x[e];
}

// small += what rounding takes from sum + x: all of it where |sum| >= |x| (Dekker 1971, Fast2Sum).
__device__ __forceinline__ void add(float (&sum)[4], float (&small)[4], const float (&x)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float rounded = sum[e] + x[e];
        small[e] += (sum[e] - rounded) + x[e];
        sum[e] = rounded;
    }
}

// Small terms of infinite factors are NaN and stand for nothing.
__device__ __forceinline__ void add_small(float (&sum)[4], const float (&small)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (fabsf(sum[e]) != -NEG_INFINITY) sum[e] += small[e];
}

// S = Q K^T. q and k: this lane's addresses (lane_offset_*_f32) of the warp's first row and key.
template <int FRAGMENTS_M, int TILES_N, int DEPTH, int LD>
__device__ __forceinline__ void multiply_qk_f32(AccumulatorTile<FRAGMENTS_M, TILES_N>& rS, uint32 q,
                                                uint32 k) {
    static_assert(DEPTH % 16 == 0 && LD % 16 == 4, "whole steps; no bank conflicts with this LD");
    AccumulatorTile<FRAGMENTS_M, TILES_N> rSmall;
    rS.clear();
    rSmall.clear();
#pragma unroll 2  // unrolled further, loads run ahead of their use and out of registers
    for (int d = 0; d < DEPTH; d += 16) {
        SplitOperand<4> rQ[FRAGMENTS_M][2];  // columns d to d + 7, d + 8 to d + 15
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                float x[4];
                ldmatrix_x4(x, q + 4 * (m * 16 * LD + d + step * 8));
#pragma unroll
                for (int i = 0; i < 4; ++i) split_tf32(x[i], rQ[m][step].hi[i], rQ[m][step].lo[i]);
            }
        }
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            float x[4];
            ldmatrix_x4(x, k + 4 * (n * 8 * LD + d));
            AccumulatorTile<FRAGMENTS_M, 1> rSum;
            rSum.clear();
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                SplitOperand<2> rK;
                split_tf32(x[2 * step], rK.hi[0], rK.lo[0]);
                split_tf32(x[2 * step + 1], rK.hi[1], rK.lo[1]);
#pragma unroll
                for (int m = 0; m < FRAGMENTS_M; ++m)
                    mma_split(rSum.x[m][0], rSmall.x[m][n], rQ[m][step], rK);
            }
#pragma unroll
            for (int m = 0; m < FRAGMENTS_M; ++m) add(rS.x[m][n], rSmall.x[m][n], rSum.x[m][0]);
        }
    }
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) add_small(rS.x[m][n], rSmall.x[m][n]);
}

// O += P V. rP: probabilities in the accumulator layout of S. v: this lane's address of the first
// key. A sum over keys may take them in any order, so P need not leave the lanes that computed it:
// k = l%4 of the product stands for key 2(l%4) of an 8-key tile, k = l%4 + 4 for the key after it,
// the two that lane l holds, and V is read to match; unseen ones count as zeros.
template <int LD, int FRAGMENTS_M, int TILES_N, int TILES_D, typename Seen>
__device__ __forceinline__ void multiply_pv_f32(AccumulatorTile<FRAGMENTS_M, TILES_D>& rO,
                                                const AccumulatorTile<FRAGMENTS_M, TILES_N>& rP,
                                                uint32 v, const Seen& seen) {
    static_assert(TILES_N <= 8 && LD % 16 == 4, "short chains; no bank conflicts with this LD");
    SplitOperand<4> rA[FRAGMENTS_M][TILES_N];
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            // Accumulator: row, keys 2(l%4), +1; row + 8, the same. Operand: down the rows first.
#pragma unroll
            for (int e = 0; e < 4; ++e)
                split_tf32(rP.x[m][n][e], rA[m][n].hi[e % 2 * 2 + e / 2],
                           rA[m][n].lo[e % 2 * 2 + e / 2]);
        }
    }
#pragma unroll
    for (int d = 0; d < TILES_D; ++d) {
        AccumulatorTile<FRAGMENTS_M, 1> rSum, rSmall;
        rSum.clear();
        rSmall.clear();
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            SplitOperand<2> rV;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float x = load_shared(v + 4 * ((n * 8 + i) * LD + d * 8));
                split_tf32(seen.select(n, i, x), rV.hi[i], rV.lo[i]);
            }
#pragma unroll
            for (int m = 0; m < FRAGMENTS_M; ++m)
                mma_split(rSum.x[m][0], rSmall.x[m][0], rA[m][n], rV);
        }
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
            add(rO.x[m][d], rSum.x[m][0]);
            add_small(rO.x[m][d], rSmall.x[m][0]);
        }
    }
}

template <int FRAGMENTS_M, int TILES_N, int TILES_D, typename LayoutQ, typename LayoutK,
          typename LayoutV>
struct TileProducts<float, FRAGMENTS_M, TILES_N, TILES_D, LayoutQ, LayoutK, LayoutV> {
    static constexpr int LD = LayoutQ::LD, LD_V = LayoutV::LD;
    using Scores = AccumulatorTile<FRAGMENTS_M, TILES_N>;
    static constexpr int STEPS = 1, STEP_TILES = TILES_N;  // P V takes all keys at once
    using Probabilities = Scores;
    using Output = AccumulatorTile<FRAGMENTS_M, TILES_D>;

    __device__ static __forceinline__ uint32 lane_q(const float* sQ, int first_row) {
        return shared_address(sQ + first_row * LD) + lane_offset_q_f32<LD>();
    }
    __device__ static __forceinline__ uint32 lane_k(const float* sK, int first_key) {
        return shared_address(sK + first_key * LD) + lane_offset_k_f32<LD>();
    }
    __device__ static __forceinline__ uint32 lane_v(const float* sV, int first_key, int column) {
        return shared_address(sV + first_key * LD_V + column) + lane_offset_v_f32<LD_V>();
    }

    __device__ static __forceinline__ void scores(Scores& rS, uint32 q, uint32 k) {
        multiply_qk_f32<FRAGMENTS_M, TILES_N, LayoutQ::COLS, LD>(rS, q, k);
    }
    template <typename Seen>
    __device__ static __forceinline__ void output(Output& rO, const Probabilities& rP, uint32 v,
                                                  int, const Seen& seen) {
        multiply_pv_f32<LD_V>(rO, rP, v, seen);
    }
};

}  // namespace flashcore
