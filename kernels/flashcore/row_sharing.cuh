// row_sharing.cuh - for heads too wide for one warp's registers: WARPS_D warps have the same rows.
// Each computes the scores of its part of the keys and the output of its part of the columns, so
// they tell each other the rows' maxima and all of P, through shared memory.
#pragma once
#include <flashcore/mma_sync_tile.cuh>
#include <flashcore/ptx_warp.cuh>
#include <flashcore/rows.cuh>
#include <flashcore/smem_tile.cuh>

namespace flashcore {

// The place for it in shared memory. A lane's rows are those of WarpRows; first_row is the warp's.
template <typename T, int WARPS_D, int BLOCK_M, int BLOCK_N>
struct RowSharing {
    using LayoutP = SharedLayout<T, BLOCK_M, BLOCK_N>;
    T sP[LayoutP::SIZE];
    float sRow[WARPS_D][BLOCK_M];  // a number per row and warp: the tile's maximum, at the end sums

    __device__ static __forceinline__ int row(int first_row, int m, int half) {
        return first_row + m * 16 + half * 8 + threadIdx.x % WARP_SIZE / 4;
    }

    // Barriers come from outside: one before sRow is written again, one before it is read.
    template <int FRAGMENTS_M>
    __device__ __forceinline__ void tell(const float (&x)[FRAGMENTS_M][2], int first_row,
                                         int warp_d) {
        if (threadIdx.x % 4 > 0) return;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) sRow[warp_d][row(first_row, m, half)] = x[m][half];
    }

    // combine(a, b) over what all warps told.
    template <int FRAGMENTS_M, typename Combine>
    __device__ __forceinline__ void hear(float (&x)[FRAGMENTS_M][2], int first_row,
                                         Combine combine) const {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = row(first_row, m, half);
                x[m][half] = sRow[0][r];
#pragma unroll
                for (int d = 1; d < WARPS_D; ++d) x[m][half] = combine(x[m][half], sRow[d][r]);
            }
        }
    }

    // The sum of a row: its quad's lanes, and the warps that share it, have summed different keys.
    template <int FRAGMENTS_M, int TILES_D>
    __device__ __forceinline__ void finish_sums(WarpRows<FRAGMENTS_M, TILES_D>& rows, int first_row,
                                                int warp_d) {
        float sum[FRAGMENTS_M][2];
        rows.quad_sums(sum);
        block_sync();  // the last tile's maxima have been heard
        tell(sum, first_row, warp_d);
        block_sync();  // the others' sums are there
        hear(sum, first_row, [](float a, float b) { return a + b; });
        rows.set_sums(sum);
    }

    // P of this warp's keys, from first_key on; returns when the others' is there, too.
    template <int FRAGMENTS_M, int STEPS>
    __device__ __forceinline__ void exchange(const ProbabilityTile<T, FRAGMENTS_M, STEPS>& rP,
                                             int first_row, int first_key, int barrier) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    *reinterpret_cast<uint32*>(
                        sP + LayoutP::element(row(first_row, m, half), first_key + n * 8) +
                        threadIdx.x % 4 * 2) = rP.pair(m, n, half);
        named_barrier_sync(barrier, WARPS_D * WARP_SIZE);
    }

    // This lane's ldmatrix address of the warp's first row of P.
    __device__ __forceinline__ uint32 operand(int first_row) const {
        return lane_address_rows_first<LayoutP>(sP, first_row, 0);
    }
};

// A warp that has its rows to itself.
template <typename T, int BLOCK_M, int BLOCK_N>
struct RowSharing<T, 1, BLOCK_M, BLOCK_N> {
    using LayoutP = SharedLayout<T, BLOCK_M, BLOCK_N>;
    template <int FRAGMENTS_M>
    __device__ __forceinline__ void tell(const float (&)[FRAGMENTS_M][2], int, int) {}
    template <int FRAGMENTS_M, typename Combine>
    __device__ __forceinline__ void hear(float (&)[FRAGMENTS_M][2], int, Combine) const {}
    template <typename P>
    __device__ __forceinline__ void exchange(const P&, int, int, int) {}
    template <int FRAGMENTS_M, int TILES_D>
    __device__ __forceinline__ void finish_sums(WarpRows<FRAGMENTS_M, TILES_D>& rows, int, int) {
        float sum[FRAGMENTS_M][2];
        rows.quad_sums(sum);
        rows.set_sums(sum);
    }
    __device__ __forceinline__ uint32 operand(int) const { return 0; }
};

}  // namespace flashcore
