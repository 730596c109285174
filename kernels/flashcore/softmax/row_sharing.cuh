// row_sharing.cuh - WARPS_D warps have the same rows. This is for heads too wide for one warp's
// registers, or so wide that a warp would have only 16 rows, which read shared memory twice as
// often as 32. Each warp computes the scores of some of the keys, and some columns of O. So the
// warps exchange the rows' maxima and all of P, through shared memory.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

// In shared memory. A lane's rows are those of WarpRows; first_row is the warp's first row.
template <typename T, int WARPS_D, int BLOCK_M, int BLOCK_N>
struct RowSharing {
    using LayoutP = SharedLayout<T, BLOCK_M, BLOCK_N>;
    T sP[LayoutP::SIZE];           // BLOCK_M x BLOCK_N
    float sRow[WARPS_D][BLOCK_M];  // each warp's maximum of a row in the tile; at the end its sum

    __device__ static __forceinline__ int row(int first_row, int m, int half) {
        return first_row + m * 16 + half * 8 + thread_index() % WARP_SIZE / 4;
    }

    // A barrier for the warps that share the rows: each sees what the others wrote before it.
    __device__ __forceinline__ void sync(int barrier) const {
        named_barrier_sync(barrier, WARPS_D * WARP_SIZE);
    }

    // An all-reduce over the warps that share the rows: x becomes op over all warps' x, for each
    // row. There has to be a barrier between two calls: the second overwrites what the first reads.
    template <int FRAGMENTS_M, typename Op>
    __device__ __forceinline__ void all_reduce(float (&x)[FRAGMENTS_M][2], int first_row,
                                               int warp_d, int barrier, Op op) {
        if (thread_index() % 4 == 0) {
#pragma unroll
            for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    sRow[warp_d][row(first_row, m, half)] = x[m][half];
        }
        sync(barrier);  // all warps have written their numbers
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row(first_row, m, half);
                x[m][half] = sRow[0][r];
#pragma unroll
                for (int d = 1; d < WARPS_D; ++d) x[m][half] = op(x[m][half], sRow[d][r]);
            }
        }
    }

    // The index in sP of the first pair that this lane writes of its warp's keys from first_key on.
    __device__ static __forceinline__ int first_pair(int first_row, int first_key) {
        return LayoutP::element(row(first_row, 0, 0), first_key) + thread_index() % 4 * 2;
    }
    // Writes P of the step-th 16 of these keys.
    template <int FRAGMENTS_M>
    __device__ __forceinline__ void store_p(const ProbabilityTile<T, FRAGMENTS_M>& rP,
                                            int first_pair, int step) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    *reinterpret_cast<uint32*>(
                        sP + LayoutP::step(first_pair, m * 16 + half * 8, step * 16 + n * 8)) =
                        rP.pair(m, n, half);
    }

    // This lane's ldmatrix address of the warp's first row of P.
    __device__ __forceinline__ uint32 operand(int first_row) const {
        return lane_address_rows_first<LayoutP>(sP, first_row, 0);
    }
};

// Which keys of a tile are seen, put together from the warps that share rows: each has PAIRS pairs
// of keys in a lane.
template <bool HIDES_KEYS, int WARPS_D, int PAIRS>
struct SeenOfAll {
    KeyBits<HIDES_KEYS, PAIRS> by[WARPS_D];

    // published: a SeenKeys, in which the warps from first_warp on have published.
    template <typename Published>
    __device__ __forceinline__ SeenOfAll(const Published& published, int first_warp) {
#pragma unroll
        for (int d = 0; d < WARPS_D; ++d) by[d] = published.by(first_warp + d);
    }
    __device__ __forceinline__ uint32 select(int n, uint32 values) const {
        return by[n / PAIRS].select(n % PAIRS, values);
    }
};

// A warp that has its rows to itself shares nothing.
template <typename T, int BLOCK_M, int BLOCK_N>
struct RowSharing<T, 1, BLOCK_M, BLOCK_N> {
    using LayoutP = SharedLayout<T, BLOCK_M, BLOCK_N>;
    __device__ __forceinline__ void sync(int) const {}
    template <int FRAGMENTS_M, typename Op>
    __device__ __forceinline__ void all_reduce(float (&)[FRAGMENTS_M][2], int, int, int, Op) {}
    __device__ static __forceinline__ int first_pair(int, int) { return 0; }
    template <typename P>
    __device__ __forceinline__ void store_p(const P&, int, int) {}
    __device__ __forceinline__ uint32 operand(int) const { return 0; }
};

}  // namespace flashcore
