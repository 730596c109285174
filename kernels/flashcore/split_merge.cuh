// split_merge.cuh - thread blocks that share out the keys of the same rows. Each leaves what it has
// found in global memory: O as far as it has been summed up, m and l. The last one to arrive adds
// all parts up, in the order of the keys, whoever came when: the same bits every time.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx_global.cuh>
#include <flashcore/ptx_warp.cuh>
#include <flashcore/softmax.cuh>

namespace flashcore {

// All parts of a block of ROWS rows of COLS columns; workspace.py reserves the place.
template <int ROWS, int COLS>
struct SplitRows {
    static constexpr int PART = ROWS * (COLS + 2);  // floats of a part: O, then m and l
    static constexpr int AT_A_TIME = 8;             // parts on their way
    const AttentionParams& params;
    float* base;

    __device__ __forceinline__ SplitRows(const AttentionParams& p, int block)
        : params(p), base(p.split_partial + int64(block) * p.splits * PART) {}

    // A row of a part's, by the four lanes that share it as a wgmma leaves it: o(n, e) is this
    // lane's e-th of columns 8 n to 8 n + 7. Its l is complete.
    template <typename Output>
    __device__ __forceinline__ void leave(int split, int row, const RowState& found,
                                          Output o) const {
        const int lane = threadIdx.x % 4;
        if (lane == 0) *state(split, row) = {found.max, found.sum};
#pragma unroll
        for (int n = 0; n < COLS / 8; ++n)
            *reinterpret_cast<float2*>(output(split, row) + n * 8 + lane * 2) = {o(n, 0), o(n, 1)};
    }

    // Says that this part is there; whether it is the last. By `threads` threads, whole warps, that
    // meet at `barrier` and share `last`, one of which speaks for all; the counters are 0 between
    // launches, and the first one of them is not a block's, see take_block.
    __device__ __forceinline__ bool is_last(int block, int& last, bool speaks, int barrier,
                                            int threads) const {
        named_barrier_sync(barrier, threads);  // all findings are on their way
        if (speaks) {
            fence_gpu();  // the findings first, then the news of them
            int* const arrivals = params.split_arrivals + 1 + block;
            last = atomic_add(arrivals, 1) + 1 == params.splits;
            if (last) *arrivals = 0;
            fence_gpu();  // the news first, then the others' findings
        }
        named_barrier_sync(barrier, threads);
        return last;
    }

    // Adds all parts up; of each row's columns col to col + 3 one thread gets O, and with it m and
    // l: use(row, col, m and l, O).
    template <typename Use>
    __device__ __forceinline__ void merge(int rows, int thread, int threads, Use use) const {
        constexpr int PIECES = COLS / 4;
#pragma unroll 1
        for (int i = thread; i < rows * PIECES; i += threads) {
            const int row = i / PIECES, col = i % PIECES * 4;
            RowState all;
            float4 o{};
#pragma unroll 1
            for (int first = 0; first < params.splits; first += AT_A_TIME)
                add(all, o, row, col, first);
            use(row, col, all, o);
        }
    }

  private:
    __device__ __forceinline__ float* output(int split, int row) const {
        return base + int64(split) * PART + row * COLS;
    }
    __device__ __forceinline__ float2* state(int split, int row) const {
        return reinterpret_cast<float2*>(base + int64(split) * PART + ROWS * COLS) + row;
    }

    // Parts first, first + 1, ...: all asked for before the first is waited for.
    __device__ __forceinline__ void add(RowState& all, float4& o, int row, int col,
                                        int first) const {
        float4 part[AT_A_TIME];
        float2 found[AT_A_TIME];
#pragma unroll
        for (int i = 0; i < AT_A_TIME; ++i) {
            const int split = min(first + i, params.splits - 1);
            part[i] = load_l2(reinterpret_cast<const float4*>(output(split, row) + col));
            found[i] = load_l2(state(split, row));
        }
#pragma unroll
        for (int i = 0; i < AT_A_TIME; ++i) {
            if (first + i >= params.splits) break;
            const MergeFactors by(all.max, found[i].x);
            all.max = by.max;
            all.sum = all.sum * by.a + found[i].y * by.b;
            o.x = o.x * by.a + part[i].x * by.b;
            o.y = o.y * by.a + part[i].y * by.b;
            o.z = o.z * by.a + part[i].z * by.b;
            o.w = o.w * by.a + part[i].w * by.b;
        }
    }
};

}  // namespace flashcore
