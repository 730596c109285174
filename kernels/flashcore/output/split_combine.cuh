// split_combine.cuh - split keys: several CTAs have the same rows and a range of the keys each.
// Each CTA publishes its partials: m, l, and O over its own keys. Then the partials of all splits
// are combined in the order of the keys, whichever CTA came first: the same bits every time.
//
// CTAs of a cluster publish in their shared memory, wait for each other, and combine some columns
// each. Other CTAs publish in global memory, and the last one to arrive combines everything.
// (fwd_sm80 has its own way, RowCombine in warp_rows.cuh: it publishes fragments as they are and
// goes on with them in registers. One way for both would change what one of them stores and its
// registers.)
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/cluster.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/online_softmax.cuh>

namespace flashcore {

// Four columns of a row, combined from the partials that have been added.
struct CombinedColumns {
    float scale;  // from the unit of the maxima to log2 units
    RowState row;
    float4 o{};

    // Adds the first `count` of COUNT partials: `state` is their m and l, `output` their O. The new
    // maximum is found before any factor, so that no factor waits for another one.
    template <int COUNT>
    __device__ __forceinline__ void add(const float2 (&state)[COUNT], const float4 (&output)[COUNT],
                                        int count) {
        float max = row.max;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i < count) max = fmaxf(max, state[i].x);
        scale_by(rescale_to(row.max, max, scale));
        row.max = max;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i >= count) break;
            const float factor = rescale_to(state[i].x, max, scale);
            row.sum += state[i].y * factor;
            o.x += output[i].x * factor;
            o.y += output[i].y * factor;
            o.z += output[i].z * factor;
            o.w += output[i].w * factor;
        }
    }

  private:
    __device__ __forceinline__ void scale_by(float factor) {
        row.sum *= factor;
        o = {o.x * factor, o.y * factor, o.z * factor, o.w * factor};
    }
};

// The four lanes that share a row, as wgmma leaves it, store the row's partials: m and l, complete,
// to `state`, and O to `output`. o(n, e): this lane's e-th column of columns 8 n to 8 n + 7.
template <int COLS, typename Output>
__device__ __forceinline__ void publish_row(float* output, float2* state, const RowState& row,
                                            Output o) {
    const int lane = thread_index() % 4;
    if (lane == 0) *state = {row.max, row.sum};
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n)
        *reinterpret_cast<float2*>(output + n * 8 + lane * 2) = {o(n, 0), o(n, 1)};
}

// The partials of a block of ROWS rows of COLS columns.
//   publish(row, m and l, o)      publishes one row of this CTA's split: see publish_row
//   sync(...)                     returns whether this CTA combines; all threads call it
//   combine(rows, scale, ...)     calls use(row, col, m and l, O) for each four columns, col to
//                                 col + 3, of each row, in one thread each
//   end()                         this CTA's shared memory is not read any more
// CLUSTER > 1: a cluster's CTAs have a split each, in shared memory.
template <int ROWS, int COLS, int CLUSTER>
struct SplitRows {
    static constexpr int SMEM_BYTES = ROWS * (COLS + 8 + 2) * 4;
    float* mine;  // ROWS x (COLS + 8) of O, then ROWS x 2; at the same address in all CTAs

    __device__ __forceinline__ SplitRows(const AttentionParams&, int, int, void* shared)
        : mine(static_cast<float*>(shared)) {}

    template <typename Output>
    __device__ __forceinline__ void publish(int row, const RowState& found, Output o) const {
        publish_row<COLS>(output(row), state(row), found, o);
    }
    __device__ __forceinline__ bool sync(int&, bool, int, int) const {
        cluster_sync();  // all CTAs of the cluster have published
        return true;
    }
    template <typename Use>
    __device__ __forceinline__ void combine(int rows, float scale, int thread, int threads,
                                            Use use) const {
        constexpr int PIECES = COLS / 4;
#pragma unroll 1
        for (int i = cluster_rank() * threads + thread; i < rows * PIECES; i += CLUSTER * threads) {
            const int row = i / PIECES, col = i % PIECES * 4;
            float4 outputs[CLUSTER];
            float2 states[CLUSTER];
#pragma unroll
            for (int rank = 0; rank < CLUSTER; ++rank) {
                load_peer(outputs[rank], peer_address(shared_address(output(row) + col), rank));
                load_peer(states[rank], peer_address(shared_address(state(row)), rank));
            }
            CombinedColumns all = {scale};
            all.add(states, outputs, CLUSTER);
            use(row, col, all.row, all.o);
        }
    }
    __device__ __forceinline__ void end() const {
        cluster_sync_relaxed();  // all CTAs have read this one's partials: it may exit
    }

  private:
    __device__ __forceinline__ float* output(int row) const {
        return mine + row * (COLS + 8);  // 8 floats of padding shift rows by 8 banks
    }
    __device__ __forceinline__ float2* state(int row) const {
        return reinterpret_cast<float2*>(mine + ROWS * (COLS + 8)) + row;
    }
};

// No cluster: params.splits splits, in global memory, for which select/sm90.py allocates room.
template <int ROWS, int COLS>
struct SplitRows<ROWS, COLS, 1> {
    static constexpr int SMEM_BYTES = 0;
    static constexpr int FLOATS = ROWS * (COLS + 2);  // of a split: O, ROWS x COLS; m, l, ROWS x 2
    static constexpr int AT_A_TIME = 8;               // splits whose loads are in flight together
    const AttentionParams& params;
    int block, mine;
    float* base;

    __device__ __forceinline__ SplitRows(const AttentionParams& p, int block, int split, void*)
        : params(p),
          block(block),
          mine(split),
          base(p.split_partials + int64(block) * p.splits * FLOATS) {}

    template <typename Output>
    __device__ __forceinline__ void publish(int row, const RowState& found, Output o) const {
        publish_row<COLS>(output(mine, row), state(mine, row), found, o);
    }

    // The CTA that arrives last combines. All `threads` threads, whole warps, call this; one of
    // them `arrives` for all, and tells them by `last`, which lies in shared memory.
    __device__ __forceinline__ bool sync(int& last, bool arrives, int barrier, int threads) const {
        named_barrier_sync(barrier, threads);  // all threads have stored their partials
        if (arrives) {
            fence_gpu();  // the GPU sees the partials before it sees the arrival
            int& arrivals = counters_of(params).arrivals[block];
            last = atomic_add(&arrivals, 1) + 1 == params.splits;
            if (last) arrivals = 0;
            fence_gpu();  // the other CTAs' partials are read after their arrivals are seen
        }
        named_barrier_sync(barrier, threads);  // all threads see `last`
        return last;
    }

    template <typename Use>
    __device__ __forceinline__ void combine(int rows, float scale, int thread, int threads,
                                            Use use) const {
        constexpr int PIECES = COLS / 4;
#pragma unroll 1
        for (int i = thread; i < rows * PIECES; i += threads) {
            const int row = i / PIECES, col = i % PIECES * 4;
            CombinedColumns all = {scale};
#pragma unroll 1
            for (int first = 0; first < params.splits; first += AT_A_TIME)
                add(all, row, col, first);
            use(row, col, all.row, all.o);
        }
    }
    __device__ __forceinline__ void end() const {}

  private:
    __device__ __forceinline__ float* output(int split, int row) const {
        return base + int64(split) * FLOATS + row * COLS;
    }
    __device__ __forceinline__ float2* state(int split, int row) const {
        return reinterpret_cast<float2*>(base + int64(split) * FLOATS + ROWS * COLS) + row;
    }

    // Adds AT_A_TIME splits from `first` on. All loads are started before the first is waited for.
    __device__ __forceinline__ void add(CombinedColumns& all, int row, int col, int first) const {
        float4 outputs[AT_A_TIME];
        float2 states[AT_A_TIME];
#pragma unroll
        for (int i = 0; i < AT_A_TIME; ++i) {
            const int split = min(first + i, params.splits - 1);
            outputs[i] = load_l2(reinterpret_cast<const float4*>(output(split, row) + col));
            states[i] = load_l2(state(split, row));
        }
        all.add(states, outputs, params.splits - first);
    }
};

}  // namespace flashcore
