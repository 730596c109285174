// row_sharing.cuh - for heads that are too wide for one warp's registers, or leave one warp only 16
// rows, which take twice the reads of 32 from shared memory: WARPS_D warps have the same rows.
// Each computes the scores of its part of the keys and the output of its part of the columns, so
// they tell each other the rows' maxima and all of P, through shared memory.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

// The place for it in shared memory. A lane's rows are those of WarpRows; first_row is the warp's.
template <typename T, int WARPS_D, int BLOCK_M, int BLOCK_N>
struct RowSharing {
    using LayoutP = SharedLayout<T, BLOCK_M, BLOCK_N>;
    T sP[LayoutP::SIZE];
    float sRow[WARPS_D][BLOCK_M];  // a number per row and warp: the tile's maximum, at the end sums

    __device__ static __forceinline__ int row(int first_row, int m, int half) {
        return first_row + m * 16 + half * 8 + thread_index() % WARP_SIZE / 4;
    }

    // Returns when all warps that share the rows are here.
    __device__ __forceinline__ void meet(int barrier) const {
        named_barrier_sync(barrier, WARPS_D * WARP_SIZE);
    }

    // The same, and whether the condition holds in any of their lanes.
    __device__ __forceinline__ bool meet_any(int barrier, bool condition) const {
        return named_barrier_any(barrier, WARPS_D * WARP_SIZE, condition);
    }

    // x = op over all their x, a number per row. They meet in between, and have met since the last
    // call: everyone has read what is overwritten.
    template <int FRAGMENTS_M, typename Op>
    __device__ __forceinline__ void combine(float (&x)[FRAGMENTS_M][2], int first_row, int warp_d,
                                            int barrier, Op op) {
        if (thread_index() % 4 == 0) {
#pragma unroll
            for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    sRow[warp_d][row(first_row, m, half)] = x[m][half];
        }
        meet(barrier);
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

    // Where this lane's first pair of P belongs that its warp finds: from first_key on.
    __device__ static __forceinline__ int first_pair(int first_row, int first_key) {
        return LayoutP::element(row(first_row, 0, 0), first_key) + thread_index() % 4 * 2;
    }
    // P of the step-th 16 of these keys.
    template <int FRAGMENTS_M>
    __device__ __forceinline__ void put(const ProbabilityTile<T, FRAGMENTS_M>& rP, int first_pair,
                                        int step) {
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

// Which keys of a tile they see, each of its own ones (PAIRS to a lane); they all need all of V.
template <bool USED, int WARPS_M, int WARPS_D, int PAIRS>
struct SeenTogether {
    using Bits = KeyBits<true, PAIRS>;
    uint32 bits[WARPS_M][WARPS_D][4][Bits::WORDS];  // of the four lanes that share a row

    // `mine`: all rows added. They have met since the last call, and meet again before all().
    __device__ __forceinline__ void tell(const Bits& mine, int warp_m, int warp_d) {
        const int lane = thread_index() % WARP_SIZE;
        if (lane >= 4) return;
#pragma unroll
        for (int w = 0; w < Bits::WORDS; ++w) bits[warp_m][warp_d][lane][w] = mine.words[w];
    }
    struct All {
        Bits of[WARPS_D];
        __device__ __forceinline__ uint32 select(int n, uint32 values) const {
            return of[n / PAIRS].select(n % PAIRS, values);
        }
    };
    __device__ __forceinline__ All all(int warp_m) const {
        All all;
#pragma unroll
        for (int d = 0; d < WARPS_D; ++d)
#pragma unroll
            for (int w = 0; w < Bits::WORDS; ++w)
                all.of[d].words[w] = bits[warp_m][d][thread_index() % 4][w];
        return all;
    }
};
template <int WARPS_M, int WARPS_D, int PAIRS>
struct SeenTogether<false, WARPS_M, WARPS_D, PAIRS> {
    template <typename Bits>
    __device__ __forceinline__ void tell(const Bits&, int, int) {}
    __device__ __forceinline__ KeyBits<false, PAIRS> all(int) const { return {}; }
};

// A warp that has its rows to itself.
template <typename T, int BLOCK_M, int BLOCK_N>
struct RowSharing<T, 1, BLOCK_M, BLOCK_N> {
    using LayoutP = SharedLayout<T, BLOCK_M, BLOCK_N>;
    __device__ __forceinline__ void meet(int) const {}
    __device__ __forceinline__ bool meet_any(int, bool condition) const { return condition; }
    template <int FRAGMENTS_M, typename Op>
    __device__ __forceinline__ void combine(float (&)[FRAGMENTS_M][2], int, int, int, Op) {}
    __device__ static __forceinline__ int first_pair(int, int) { return 0; }
    template <typename P>
    __device__ __forceinline__ void put(const P&, int, int) {}
    __device__ __forceinline__ uint32 operand(int) const { return 0; }
};

}  // namespace flashcore
