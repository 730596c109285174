// bwd_rows.cu - what the backward kernels need of every query, before they are launched:
//
//   delta = rowsum(dO * O) - dLSE       dS = P (dP - delta)
//   shift = LSE in log2 units           P = exp2(S - shift); +inf for a query that sees no key
//
// A few lanes of a warp have a query, of all heads and batches. Where blocks of keys will add to
// dQ, it clears the sums that they add to in any order, or the counters of whose turn it is.
#include <config.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/tile_copy.cuh>

namespace flashcore {

// As many lanes as a row has pieces, rounded up to a power of two.
__device__ constexpr int lanes_of_row(int columns, int vec) {
    int lanes = 1;
    while (lanes < WARP_SIZE && lanes * vec < columns) lanes *= 2;
    return lanes;
}

static_assert(sizeof(BackwardParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

constexpr int VEC = ALIGN_BYTES / int(sizeof(T));
constexpr int LANES = lanes_of_row(DIM_V, VEC);  // that share a query

union Piece {
    Vector<ALIGN_BYTES> vector;
    T element[VEC];
};

// Fills with zeros; size: of 4-byte words, a multiple of 4.
__device__ __forceinline__ void clear(void* words, int64 size) {
    const int64 step = int64(grid_size()) * NUM_THREADS;
    for (int64 i = int64(block_index()) * NUM_THREADS + thread_index(); i < size / 4; i += step)
        static_cast<float4*>(words)[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    bwd_rows(const __grid_constant__ BackwardParams params) {
    const BackwardParams& p = params;
    if (p.turns != nullptr) {
        clear(p.turns, p.turns_size);
    } else if (p.dq_sum != nullptr) {
        clear(p.dq_sum, p.dq_sum_size);
    }
    const int lane = thread_index() % LANES;
    const int64 row = (int64(block_index()) * NUM_THREADS + thread_index()) / LANES;
    const int head_index = int(row / p.seqlen_q);
    const int query = int(row - int64(head_index) * p.seqlen_q);
    const int batch = head_index / p.heads_q, head = head_index - batch * p.heads_q;
    const bool exists = batch < (VARLEN ? 1 : p.batch);
    float sum = 0.0f;
    if (exists) {
        const T* const gO = head_row<T>(p.o, p.o_strides, batch, head, query);
        const T* const gdO = head_row<T>(p.dout, p.dout_strides, batch, head, query);
        for (int d = lane * VEC; d < DIM_V; d += LANES * VEC) {
            Piece o, dout;
            o.vector = *reinterpret_cast<const Vector<ALIGN_BYTES>*>(gO + d);
            dout.vector = *reinterpret_cast<const Vector<ALIGN_BYTES>*>(gdO + d);
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const float x = to_float(o.element[i]);
                if (x != 0.0f) sum += x * to_float(dout.element[i]);  // unseen dO may be NaN
            }
        }
    }
    sum = group_sum<LANES>(sum);
    if (lane > 0 || !exists) return;
    if (p.dlse != nullptr)
        sum -= p.dlse[batch * p.dlse_strides.batch + head * p.dlse_strides.head + query];
    const float lse = p.lse[batch * p.lse_strides.batch + head * p.lse_strides.head + query];
    p.delta[row] = sum;
    p.shift[row] = lse == NEG_INFINITY ? -NEG_INFINITY : lse * LOG2_E;
}

}  // namespace flashcore
