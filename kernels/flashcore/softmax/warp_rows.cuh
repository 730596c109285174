// warp_rows.cuh - one warp's rows: m, l and O, in mma fragments. And how the partials of warps and
// CTAs that have different keys of the same rows are combined.
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
    RowState state[FRAGMENTS_M][2];  // of the lane's two rows of each fragment
    AccumulatorTile<FRAGMENTS_M, TILES_D> rO;

    // Floats that a lane publishes: m, l and O of each of its rows.
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

    // Calls put(i, value) for i = 0 ... VALUES - 1, but not for groups of 8 rows that begin at the
    // warp's row `end` or behind it.
    template <typename Put>
    __device__ __forceinline__ void publish(int end, Put put) const {
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

    // Combines the partials of another warp with this one's: get(i) returns what publish put there.
    // scale: from the unit of the maxima to log2 units.
    template <typename Get>
    __device__ __forceinline__ void combine(int end, float scale, Get get) {
        int i = 0;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half, i += VALUES_OF_ROW) {
                if (m * 16 + half * 8 >= end) continue;
                RowState& row = state[m][half];
                const float max = get(i), sum = get(i + 1);
                const CombineFactors by(row.max, max, scale);
                row.max = by.max;
                row.sum = row.sum * by.a + sum * by.b;
#pragma unroll
                for (int d = 0; d < TILES_D; ++d) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& o = rO.x[m][d][2 * half + e];
                        o = o * by.a + get(i + 2 + 2 * d + e) * by.b;
                    }
                }
            }
        }
    }
};

// Combines the partials of all warps and CTAs that have the same rows. Of a warp's rows only the
// first `end` exist.
template <int WARPS_M, int WARPS_N>
struct RowCombine {
    float* sPartials;  // (WARPS_N - 1) x WARPS_M warps x VALUES x 32 lanes
    int warp_m, warp_n;
    int end;
    float scale;  // from the unit of the maxima to log2 units

    // Warp n = 0 adds the partials of the warps n = 1, 2, ... to its own, in this order.
    template <typename Rows>
    __device__ __forceinline__ void warps(Rows& rows) const {
        if constexpr (WARPS_N > 1) {
            block_sync();  // all warps have read K and V: partials may be written over them
            if (warp_n > 0)
                rows.publish(end, [&](int i, float x) { shared_value<Rows>(warp_n, i) = x; });
            block_sync();  // all other warps have published
            if (warp_n > 0) return;
#pragma unroll 1
            for (int other = 1; other < WARPS_N; ++other)
                rows.combine(end, scale, [&](int i) { return shared_value<Rows>(other, i); });
        }
    }

    // Split keys: each CTA publishes its partials in global memory. The one that arrives last
    // combines those of all splits in the order of the keys, whichever came first: the same bits
    // every time. Returns whether this CTA is the last. All warps call it.
    template <typename Rows>
    __device__ __forceinline__ bool splits(const AttentionParams& p, int mine, int& sArrived,
                                           Rows& rows) const {
        const int lane = thread_index() % WARP_SIZE;
        const int64 block = block_index() % (grid_size() / p.splits);
        // The partials of this warp's rows: VALUES x 32 lanes.
        const auto partials_of = [&](int split) {
            const int64 slot = (block * p.splits + split) * WARPS_M + warp_m;
            return p.split_partials + slot * Rows::VALUES * WARP_SIZE + lane;
        };
        if (warp_n == 0) {
            float* gMine = partials_of(mine);
            rows.publish(end, [&](int i, float x) { gMine[i * WARP_SIZE] = x; });
            fence_gpu();  // the GPU sees the partials before it sees the arrival
        }
        block_sync();  // all warps have published
        if (thread_index() == 0) sArrived = atomic_add(p.counters + block, 1) + 1;
        block_sync();  // all threads see whether this CTA is the last
        if (sArrived < p.splits) return false;
        fence_gpu();  // the other CTAs' partials are read after their arrivals are seen
        if (thread_index() == 0) p.counters[block] = 0;  // for the next launch
        rows = Rows();
        rows.rO.clear();
        // The WARPS_N warps of the same rows combine a range of the splits each, and then warps()
        // what they have got.
        const int share = div_up(p.splits, WARPS_N);
        const int last = min((warp_n + 1) * share, p.splits);
#pragma unroll 2
        for (int split = warp_n * share; split < last; ++split) {
            const float* gPartials = partials_of(split);
            rows.combine(end, scale, [&](int i) { return load_l2(gPartials + i * WARP_SIZE); });
        }
        warps(rows);
        return true;
    }

  private:
    // Value i of a lane of warp n. The lanes are side by side, so there are no bank conflicts.
    template <typename Rows>
    __device__ __forceinline__ float& shared_value(int n, int i) const {
        const int warp = (n - 1) * WARPS_M + warp_m;
        return sPartials[(warp * Rows::VALUES + i) * WARP_SIZE + thread_index() % WARP_SIZE];
    }
};

}  // namespace flashcore
