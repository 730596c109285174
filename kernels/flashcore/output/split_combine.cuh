// split_combine.cuh - CTAs that share out the keys of the same rows. Each CTA publishes its
// partials where the others can read them: m, l, and O as far as it has been summed up. Then the
// partials of all parts are combined in the order of the keys, whichever CTA came first: the same
// bits every time.
//
// CTAs of a cluster publish in their shared memory, wait for each other, and combine some columns
// each. Other CTAs publish in global memory, and the last one to arrive combines everything.
// (fwd_sm80 has its own way, RowMerge in warp_rows.cuh: it publishes fragments as they are and goes
// on with them in registers. One way for both would change what one of them stores and its
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

// Four columns of a row: the sum of the partials that have been added.
struct CombinedColumns {
    float scale;  // of the maxima, to log2 units
    RowState row;
    float4 o{};

    // Adds the first `count` of PARTS partials; found: their m and l. All maxima come first, so
    // that no factor waits for another one.
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

// The four lanes that share a row, as wgmma leaves it, publish the row's partials. o(n, e): this
// lane's e-th column of columns 8 n to 8 n + 7. l is complete.
template <int COLS, typename Output>
__device__ __forceinline__ void publish_row(float* to, float2* state, const RowState& found,
                                            Output o) {
    const int lane = thread_index() % 4;
    if (lane == 0) *state = {found.max, found.sum};
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n)
        *reinterpret_cast<float2*>(to + n * 8 + lane * 2) = {o(n, 0), o(n, 1)};
}

// The partials of a block of ROWS rows of COLS columns. A cluster has PARTS parts. If PARTS is 1,
// there are params.splits parts, in global memory; select/sm90.py says how much room they take.
//   publish(row, m and l, o)      publishes one row of this part, see publish_row
//   sync(...)                     returns whether this CTA combines; all threads call it
//   combine(rows, scale, ...)     one thread gets columns col to col + 3 of a row of O, and m and l
//                                 with them: use(row, col, m and l, O)
//   end()                         the partials are not read any more
template <int ROWS, int COLS, int PARTS>
struct SplitRows {
    static constexpr int SMEM_BYTES = ROWS * (COLS + 8 + 2) * 4;
    float* mine;  // in shared memory, at the same place in all CTAs of the cluster

    __device__ __forceinline__ SplitRows(const AttentionParams&, int, int, void* shared)
        : mine(static_cast<float*>(shared)) {}

    template <typename Output>
    __device__ __forceinline__ void publish(int row, const RowState& found, Output o) const {
        publish_row<COLS>(output(row), state(row), found, o);
    }
    __device__ __forceinline__ bool sync(int&, bool, int, int) const {
        cluster_sync();  // all partials of the cluster are there
        return true;
    }
    template <typename Use>
    __device__ __forceinline__ void combine(int rows, float scale, int thread, int threads,
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
            CombinedColumns all = {scale};
            all.add(found, part, PARTS);
            use(row, col, all.row, all.o);
        }
    }
    __device__ __forceinline__ void end() const {
        cluster_meet();  // no CTA reads this one's partials any more
    }

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
    static constexpr int AT_A_TIME = 8;             // parts whose loads are in flight
    const AttentionParams& params;
    int block, mine;
    float* base;

    __device__ __forceinline__ SplitRows(const AttentionParams& p, int block, int split, void*)
        : params(p),
          block(block),
          mine(split),
          base(p.split_partial + int64(block) * p.splits * PART) {}

    template <typename Output>
    __device__ __forceinline__ void publish(int row, const RowState& found, Output o) const {
        publish_row<COLS>(output(mine, row), state(mine, row), found, o);
    }

    // The CTA that arrives last combines. `threads` threads, whole warps, meet at `barrier` and
    // share `last`; one of them `arrives` for all.
    __device__ __forceinline__ bool sync(int& last, bool arrives, int barrier, int threads) const {
        named_barrier_sync(barrier, threads);  // all threads have stored their partials
        if (arrives) {
            fence_gpu();  // the GPU sees the partials before it sees the arrival
            int& arrivals = counters_of(params).arrivals[block];
            last = atomic_add(&arrivals, 1) + 1 == params.splits;
            if (last) arrivals = 0;
            fence_gpu();  // the others' partials are read after their arrivals
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
        return base + int64(split) * PART + row * COLS;
    }
    __device__ __forceinline__ float2* state(int split, int row) const {
        return reinterpret_cast<float2*>(base + int64(split) * PART + ROWS * COLS) + row;
    }

    // Adds parts first, first + 1, ...: all are asked for before the first is waited for.
    __device__ __forceinline__ void add(CombinedColumns& all, int row, int col, int first) const {
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
