// warp_rows.cuh - what one warp has found out about its rows so far: m, l and O, in mma fragments, and
// how two such findings about the same rows, from different keys, are added.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>

namespace flashcore {

// A lane's rows are two of each 16-row fragment: lane / 4 and lane / 4 + 8.
template <int FRAGMENTS_M, int TILES_D>
struct WarpRows {
    RowState state[FRAGMENTS_M][2];
    AccumulatorTile<FRAGMENTS_M, TILES_D> rO;

    // Of a lane: m, l and O of each of its rows.
    static constexpr int VALUES_OF_ROW = 2 + TILES_D * 2;
    static constexpr int VALUES = FRAGMENTS_M * 2 * VALUES_OF_ROW;

    __device__ __forceinline__ void scale_output(int m, const float (&factor)[2]) {
#pragma unroll
        for (int d = 0; d < TILES_D; ++d)
#pragma unroll
            for (int e = 0; e < 4; ++e) rO.x[m][d][e] *= factor[e / 2];
    }

    __device__ __forceinline__ void quad_sums(float (&sum)[FRAGMENTS_M][2]) const {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) sum[m][half] = group_sum<4>(state[m][half].sum);
    }
    __device__ __forceinline__ void set_sums(const float (&sum)[FRAGMENTS_M][2]) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) state[m][half].sum = sum[m][half];
    }

    // Calls put(i, value) for i = 0 ... VALUES - 1. Of 8 rows that all lie from row `end` of the
    // warp's on, there is nothing to tell.
    template <typename Put>
    __device__ __forceinline__ void hand_over(int end, Put put) const {
        int i = 0;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half, i += VALUES_OF_ROW) {
                if (m * 16 + half * 8 >= end) continue;
                put(i, state[m][half].max);
                put(i + 1, state[m][half].sum);
#pragma unroll
                for (int d = 0; d < TILES_D; ++d)
#pragma unroll
                    for (int e = 0; e < 2; ++e) put(i + 2 + 2 * d + e, rO.x[m][d][2 * half + e]);
            }
        }
    }

    // Adds another warp's findings: get(i) is what hand_over put there. scale: of the maxima, to
    // log2 units.
    template <typename Get>
    __device__ __forceinline__ void absorb(int end, float scale, Get get) {
        int i = 0;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half, i += VALUES_OF_ROW) {
                if (m * 16 + half * 8 >= end) continue;
                RowState& row = state[m][half];
                const float max = get(i), sum = get(i + 1);
                const MergeFactors merge(row.max, max, scale);
                row.max = merge.max;
                row.sum = row.sum * merge.a + sum * merge.b;
#pragma unroll
                for (int d = 0; d < TILES_D; ++d) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& o = rO.x[m][d][2 * half + e];
                        o = o * merge.a + get(i + 2 + 2 * d + e) * merge.b;
                    }
                }
            }
        }
    }
};

// Merges the findings of all who have the same rows. Only the first `end` rows of the warp matter.
template <int WARPS_M, int WARPS_N>
struct RowMerge {
    float* sMerge;  // place for those of the warps n = 1, 2, ...
    int warp_m, warp_n;
    int end;
    float scale;  // of the maxima, to log2 units

    // Adds what the warps n = 1, 2, ... have found to what warp 0 has, in this order.
    template <typename Rows>
    __device__ __forceinline__ void warps(Rows& rows) const {
        if constexpr (WARPS_N > 1) {
            block_sync();  // no warp reads K or V any more: the findings may take their place
            if (warp_n > 0)
                rows.hand_over(end, [&](int i, float x) { shared_value<Rows>(warp_n, i) = x; });
            block_sync();  // the findings of the other warps are there
            if (warp_n > 0) return;
#pragma unroll 1
            for (int other = 1; other < WARPS_N; ++other)
                rows.absorb(end, scale, [&](int i) { return shared_value<Rows>(other, i); });
        }
    }

    // Across the thread blocks that share out these rows' keys. Each leaves its findings in global
    // memory; the one that arrives last adds up all parts, in the order of the keys, whoever came
    // when: the same bits every time. Returns whether this is that block. All warps take part.
    template <typename Rows>
    __device__ __forceinline__ bool splits(const AttentionParams& p, int mine, int& sArrived,
                                           Rows& rows) const {
        const int lane = thread_index() % WARP_SIZE;
        const int64 block = block_index() % (grid_size() / p.splits);
        const auto part = [&](int split) {  // of this warp's rows; lanes next to each other
            const int64 slot = (block * p.splits + split) * WARPS_M + warp_m;
            return p.split_partial + slot * Rows::VALUES * WARP_SIZE + lane;
        };
        if (warp_n == 0) {
            float* gMine = part(mine);
            rows.hand_over(end, [&](int i, float x) { gMine[i * WARP_SIZE] = x; });
            fence_gpu();  // the findings first, then the news of them
        }
        block_sync();  // all warps' findings are out
        if (thread_index() == 0) sArrived = atomic_add(p.split_arrivals + block, 1) + 1;
        block_sync();  // everyone knows whether this block is the last
        if (sArrived < p.splits) return false;
        fence_gpu();  // the news first, then the others' findings
        if (thread_index() == 0) p.split_arrivals[block] = 0;  // for the next launch
        rows = Rows();
        rows.rO.clear();
        // Warps that share out the keys share out the parts, a range each.
        const int share = div_up(p.splits, WARPS_N);
        const int last = min((warp_n + 1) * share, p.splits);
#pragma unroll 2
        for (int split = warp_n * share; split < last; ++split) {
            const float* gPart = part(split);
            rows.absorb(end, scale, [&](int i) { return load_l2(gPart + i * WARP_SIZE); });
        }
        warps(rows);
        return true;
    }

  private:
    // Value i of a lane of a warp: lanes next to each other, hence no bank conflicts.
    template <typename Rows>
    __device__ __forceinline__ float& shared_value(int n, int i) const {
        const int warp = (n - 1) * WARPS_M + warp_m;
        return sMerge[(warp * Rows::VALUES + i) * WARP_SIZE + thread_index() % WARP_SIZE];
    }
};

}  // namespace flashcore
