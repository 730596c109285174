// split_combine.cuh - thread blocks that share out the keys of the same rows. Each leaves what it has
// found where the others can read it: O as far as it has been summed up, m and l. Then all parts
// are added up, in the order of the keys, whoever came when: the same bits every time.
//
// Thread blocks of a cluster leave it in their shared memory, wait for each other, and merge some
// columns each. Others leave it in global memory, and the last one to arrive merges all.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/cluster.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/online_softmax.cuh>

namespace flashcore {

// Four columns of a row, of all parts that have been added.
struct MergedColumns {
    float scale;  // of the maxima, to log2 units
    RowState row;
    float4 o{};

    // The first `count` of PARTS parts; found: their m and l. All maxima first, so that no factor
    // waits for another one.
    template <int PARTS>
    __device__ __forceinline__ void add(const float2 (&found)[PARTS], const float4 (&part)[PARTS],
                                        int count) {
        float max = row.max;
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
            if (i < count) max = fmaxf(max, found[i].x);
        scale_by(rescale_to(row.max, max, scale));
        row.max = max;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            if (i >= count) break;
            const float factor = rescale_to(found[i].x, max, scale);
            row.sum += found[i].y * factor;
            o.x += part[i].x * factor;
            o.y += part[i].y * factor;
            o.z += part[i].z * factor;
            o.w += part[i].w * factor;
        }
    }

  private:
    __device__ __forceinline__ void scale_by(float factor) {
        row.sum *= factor;
        o = {o.x * factor, o.y * factor, o.z * factor, o.w * factor};
    }
};

// A row of a part's, by the four lanes that share it as a wgmma leaves it: o(n, e) is this lane's
// e-th of columns 8 n to 8 n + 7. Its l is complete.
template <int COLS, typename Output>
__device__ __forceinline__ void leave_row(float* to, float2* state, const RowState& found,
                                          Output o) {
    const int lane = thread_index() % 4;
    if (lane == 0) *state = {found.max, found.sum};
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n)
        *reinterpret_cast<float2*>(to + n * 8 + lane * 2) = {o(n, 0), o(n, 1)};
}

// All parts of a block of ROWS rows of COLS columns: PARTS of them, of a cluster; or, if PARTS is
// 1, params.splits, in global memory, where workspace.py reserves the place.
//   leave(row, m and l, o)        what this part has found, see leave_row
//   await_others(...)             whether this thread block merges; by all threads
//   merge(rows, scale, ...)       of each row's columns col to col + 3 one thread gets O, and with
//                                 it m and l: use(row, col, m and l, O)
//   end()
template <int ROWS, int COLS, int PARTS>
struct SplitRows {
    static constexpr int SMEM_BYTES = ROWS * (COLS + 8 + 2) * 4;
    float* mine;  // in shared memory, at the same place in all thread blocks of the cluster

    __device__ __forceinline__ SplitRows(const AttentionParams&, int, int, void* shared)
        : mine(static_cast<float*>(shared)) {}

    template <typename Output>
    __device__ __forceinline__ void leave(int row, const RowState& found, Output o) const {
        leave_row<COLS>(output(row), state(row), found, o);
    }
    __device__ __forceinline__ bool await_others(int&, bool, int, int) const {
        cluster_sync();
        return true;
    }
    template <typename Use>
    __device__ __forceinline__ void merge(int rows, float scale, int thread, int threads,
                                          Use use) const {
        constexpr int PIECES = COLS / 4;
#pragma unroll 1
        for (int i = cluster_rank() * threads + thread; i < rows * PIECES; i += PARTS * threads) {
            const int row = i / PIECES, col = i % PIECES * 4;
            float4 part[PARTS];
            float2 found[PARTS];
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                load_peer(part[p], peer_address(shared_address(output(row) + col), p));
                load_peer(found[p], peer_address(shared_address(state(row)), p));
            }
            MergedColumns all = {scale};
            all.add(found, part, PARTS);
            use(row, col, all.row, all.o);
        }
    }
    __device__ __forceinline__ void end() const { cluster_meet(); }  // nobody reads this any longer

  private:
    __device__ __forceinline__ float* output(int row) const {
        return mine + row * (COLS + 8);  // 8 banks further than the row before
    }
    __device__ __forceinline__ float2* state(int row) const {
        return reinterpret_cast<float2*>(mine + ROWS * (COLS + 8)) + row;
    }
};

template <int ROWS, int COLS>
struct SplitRows<ROWS, COLS, 1> {
    static constexpr int SMEM_BYTES = 0;
    static constexpr int PART = ROWS * (COLS + 2);  // floats of a part: O, then m and l
    static constexpr int AT_A_TIME = 8;             // parts on their way
    const AttentionParams& params;
    int block, mine;
    float* base;

    __device__ __forceinline__ SplitRows(const AttentionParams& p, int block, int split, void*)
        : params(p),
          block(block),
          mine(split),
          base(p.split_partial + int64(block) * p.splits * PART) {}

    template <typename Output>
    __device__ __forceinline__ void leave(int row, const RowState& found, Output o) const {
        leave_row<COLS>(output(mine, row), state(mine, row), found, o);
    }

    // The last one to say that its part is there merges. `threads` threads, whole warps, meet at
    // `barrier` and share `last`, and one of them speaks for all; the counters are 0 between
    // launches, and the first one of them is not a block's, see take_block.
    __device__ __forceinline__ bool await_others(int& last, bool speaks, int barrier,
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

    template <typename Use>
    __device__ __forceinline__ void merge(int rows, float scale, int thread, int threads,
                                          Use use) const {
        constexpr int PIECES = COLS / 4;
#pragma unroll 1
        for (int i = thread; i < rows * PIECES; i += threads) {
            const int row = i / PIECES, col = i % PIECES * 4;
            MergedColumns all = {scale};
#pragma unroll 1
            for (int first = 0; first < params.splits; first += AT_A_TIME)
                add(all, row, col, first);
            use(row, col, all.row, all.o);
        }
    }
    __device__ __forceinline__ void end() const {}

  private:
    __device__ __forceinline__ float* output(int split, int row) const {
        return base + int64(split) * PART + row * COLS;
    }
    __device__ __forceinline__ float2* state(int split, int row) const {
        return reinterpret_cast<float2*>(base + int64(split) * PART + ROWS * COLS) + row;
    }

    // Parts first, first + 1, ...: all asked for before the first is waited for.
    __device__ __forceinline__ void add(MergedColumns& all, int row, int col, int first) const {
        float4 part[AT_A_TIME];
        float2 found[AT_A_TIME];
#pragma unroll
        for (int i = 0; i < AT_A_TIME; ++i) {
            const int split = min(first + i, params.splits - 1);
            part[i] = load_l2(reinterpret_cast<const float4*>(output(split, row) + col));
            found[i] = load_l2(state(split, row));
        }
        all.add(found, part, params.splits - first);
    }
};

}  // namespace flashcore
