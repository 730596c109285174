// mma_sync_tile.cuh - tile products out of mma.sync fragments, one warp's share: S = Q K^T and O +=
// P V with S, P and O in registers. A warp owns FRAGMENTS_M times 16 rows; every fragment of K or V
// that it loads serves all of them.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

// Accumulator of FRAGMENTS_M * 16 rows and TILES * 8 columns; see ptx/mma.cuh for who holds what.
template <int FRAGMENTS_M, int TILES>
struct AccumulatorTile {
    float x[FRAGMENTS_M][TILES][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) x[m][n][e] = 0.0f;
    }

    // The two columns that a lane holds of tile n, in row `half` of fragment m.
    __device__ __forceinline__ void set_pair(int m, int n, int half, float lo, float hi) {
        x[m][n][2 * half] = lo;
        x[m][n][2 * half + 1] = hi;
    }
};

// The address of the row that this lane points ldmatrix at, for the 16 x 16 block of a tile that
// begins at (row, col).
// For A and V: blocks of rows 0-7 and 8-15 of the left columns, then of the right columns.
template <typename Layout, typename T>
__device__ __forceinline__ uint32 lane_address_rows_first(const T* sTile, int row, int col) {
    const int lane = thread_index_volatile() % WARP_SIZE;
    return shared_address(sTile + Layout::element(row + lane % 16, col + lane / 16 * 8));
}
// For K: blocks of left and right columns of the upper rows, then of the lower rows.
template <typename Layout, typename T>
__device__ __forceinline__ uint32 lane_address_columns_first(const T* sTile, int row, int col) {
    const int lane = thread_index_volatile() % WARP_SIZE;
    return shared_address(sTile +
                          Layout::element(row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * 8));
}

// S = Q K^T. q and k: this lane's ldmatrix addresses of the warp's first row and first key.
template <typename T, int FRAGMENTS_M, int TILES_N, typename LayoutQ, typename LayoutK>
__device__ __forceinline__ void multiply_qk(AccumulatorTile<FRAGMENTS_M, TILES_N>& rS, uint32 q,
                                            uint32 k) {
    rS.clear();
#pragma unroll
    for (int i = 0; i < LayoutQ::COLS / 16; ++i) {
        const int d = LayoutQ::nth_step(i);
        uint32 rQ[FRAGMENTS_M][4];  // 16 rows x 16 columns each
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) ldmatrix_x4(rQ[m], LayoutQ::step_bytes(q, m * 16, d));
#pragma unroll
        for (int n = 0; n < TILES_N; n += 2) {
            uint32 rK[4];  // 16 keys x 16 columns
            ldmatrix_x4(rK, LayoutK::step_bytes(k, n * 8, d));
#pragma unroll
            for (int m = 0; m < FRAGMENTS_M; ++m) {
                mma_m16n8k16<T>(rS.x[m][n], rQ[m], rK[0], rK[1]);
                mma_m16n8k16<T>(rS.x[m][n + 1], rQ[m], rK[2], rK[3]);
            }
        }
    }
}

// P as the A operand of a step of P V: FRAGMENTS_M * 16 rows, 16 keys, two values of T a register.
// The accumulator layout of two neighbouring 8-key tiles of S is the operand layout of one 16-key
// step, so a probability stays in the lane that computed it.
template <typename T, int FRAGMENTS_M>
struct ProbabilityTile {
    uint32 x[FRAGMENTS_M][4];

    // The pair of keys that a lane holds of 8-key tile n (0 or 1), in row `half` of fragment m.
    __device__ __forceinline__ void set_pair(int m, int n, int half, float lo, float hi) {
        x[m][2 * n + half] = pack2<T>(lo, hi);
    }
    __device__ __forceinline__ uint32 pair(int m, int n, int half) const {
        return x[m][2 * n + half];
    }
};

// O += P V for 16 keys, the step-th of v: this lane's ldmatrix address of the first key. A lane
// gets of V the keys that it has of S, two in a register; unseen ones count as zeros.
template <typename LayoutV, typename T, int FRAGMENTS_M, int TILES_D, typename Seen>
__device__ __forceinline__ void multiply_pv(AccumulatorTile<FRAGMENTS_M, TILES_D>& rO,
                                            const ProbabilityTile<T, FRAGMENTS_M>& rP, uint32 v,
                                            int step, const Seen& seen) {
#pragma unroll
    for (int d = 0; d < TILES_D; d += 2) {
        uint32 rV[4];  // 16 keys x 16 columns
        ldmatrix_x4_trans(rV, LayoutV::step_bytes(v, step * 16, d * 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) rV[i] = seen.select(step * 2 + i % 2, rV[i]);
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
            mma_m16n8k16<T>(rO.x[m][d], rP.x[m], rV[0], rV[1]);
            mma_m16n8k16<T>(rO.x[m][d + 1], rP.x[m], rV[2], rV[3]);
        }
    }
}

// The same with P in shared memory, for warps that share it; p: this lane's ldmatrix address of the
// warp's first row.
template <typename T, typename LayoutV, typename LayoutP, int FRAGMENTS_M, int TILES_D,
          typename Seen>
__device__ __forceinline__ void multiply_shared_pv(AccumulatorTile<FRAGMENTS_M, TILES_D>& rO,
                                                   uint32 p, uint32 v, const Seen& seen) {
#pragma unroll
    for (int step = 0; step < LayoutP::COLS / 16; ++step) {
        ProbabilityTile<T, FRAGMENTS_M> rP;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
            ldmatrix_x4(rP.x[m], LayoutP::step_bytes(p, m * 16, step * 16));
        multiply_pv<LayoutV>(rO, rP, v, step, seen);
    }
}

// The two products of attention for one warp's rows, by type: this one is for 16-bit inputs,
// mma_tf32_tile.cuh has the one for fp32.
template <typename T, int FRAGMENTS_M, int TILES_N, int TILES_D, typename LayoutQ, typename LayoutK,
          typename LayoutV>
struct TileProducts {
    using Scores = AccumulatorTile<FRAGMENTS_M, TILES_N>;
    static constexpr int STEPS = TILES_N / 2, STEP_TILES = 2;  // P V goes by steps of 16 keys
    using Probabilities = ProbabilityTile<T, FRAGMENTS_M>;
    using Output = AccumulatorTile<FRAGMENTS_M, TILES_D>;

    // This lane's addresses of the warp's first operands.
    __device__ static __forceinline__ uint32 lane_q(const T* sQ, int first_row) {
        return lane_address_rows_first<LayoutQ>(sQ, first_row, 0);
    }
    __device__ static __forceinline__ uint32 lane_k(const T* sK, int first_key) {
        return lane_address_columns_first<LayoutK>(sK, first_key, 0);
    }
    __device__ static __forceinline__ uint32 lane_v(const T* sV, int first_key, int first_column) {
        return lane_address_rows_first<LayoutV>(sV, first_key, first_column);
    }

    __device__ static __forceinline__ void scores(Scores& rS, uint32 q, uint32 k) {
        multiply_qk<T, FRAGMENTS_M, TILES_N, LayoutQ, LayoutK>(rS, q, k);
    }
    template <typename Seen>
    __device__ static __forceinline__ void output(Output& rO, const Probabilities& rP, uint32 v,
                                                  int step, const Seen& seen) {
        multiply_pv<LayoutV>(rO, rP, v, step, seen);
    }
};

}  // namespace flashcore
