// bwd_scale.cu - dQ from the sums that blocks of keys have added to: scaled, and converted to what
// it is stored in. The sums lie as the consumers of bwd_sm90.cu, and of bwd_sm90_wide.cu, have
// them: tile after tile of BLOCK_N queries, in each one unit after the other of 64 queries by
// GRADIENT_COLS columns, in each the accumulators' elements, four of every thread side by side. A
// CTA has a unit. Of packed batches there is room for tiles of each sequence, and of the rows that
// belong to none.
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/scheduler/work.cuh>

namespace flashcore {

constexpr int UNIT_ROWS = 64, UNIT_COLS = GRADIENT_COLS;
constexpr int UNITS_N = HEAD_DIM / UNIT_COLS, UNITS = BLOCK_N / UNIT_ROWS * UNITS_N;

// Which rows of dQ a unit's tile has, counted from `start`: [first, length) at most.
struct TileRows {
    int start, first, length;
};

// tile: among those of a head.
__device__ __forceinline__ TileRows rows_of(const BackwardParams& p, int tile) {
    if constexpr (VARLEN) {
        const PackedBatch q = packed_queries(p, 1, BLOCK_N);
        const int piece = q.find(tile), start = q.start(piece);
        return {start, (tile - q.first_block(piece, start)) * BLOCK_N, q.length(piece)};
    }
    return {0, tile * BLOCK_N, p.seqlen_q};
}

__device__ __forceinline__ int tiles_per_head(const BackwardParams& p) {
    if constexpr (VARLEN) return packed_queries(p, 1, BLOCK_N).places();
    return (p.seqlen_q + BLOCK_N - 1) / BLOCK_N;
}

static_assert(NUM_THREADS == 128, "a unit is a warpgroup's");
static_assert(sizeof(BackwardParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    bwd_scale(const __grid_constant__ BackwardParams params) {
    const BackwardParams& p = params;
    const int tiles = tiles_per_head(p);
    const int unit = block_index() % UNITS, tile = block_index() / UNITS % tiles;
    const int head_index = block_index() / (UNITS * tiles);
    const int batch = head_index / p.heads_q, head = head_index - batch * p.heads_q;
    const int lane = thread_index() % WARP_SIZE, first_col = unit % UNITS_N * UNIT_COLS;
    const TileRows rows = rows_of(p, tile);
    const int first_row =
        rows.first + unit / UNITS_N * UNIT_ROWS + thread_index() / WARP_SIZE * 16 + lane / 4;
    const float4* const from = reinterpret_cast<const float4*>(p.dq_sum) +
                               int64(block_index()) * (UNIT_ROWS * UNIT_COLS / 4) + thread_index();
    // Where blocks of keys add by turns, and none has, nothing has been stored.
    const bool added = p.turns == nullptr || p.turns[1 + block_index() / UNITS] > 0;
    float4 x[UNIT_COLS / 8];  // columns 8 n + 2 (lane % 4) and the next, of two rows
#pragma unroll
    for (int n = 0; n < UNIT_COLS / 8; ++n)
        x[n] = added ? from[n * NUM_THREADS] : float4{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + half * 8;
        const bool valid = row < rows.length;
        const auto two = [&](int n) {
            const float2 pair = half == 0 ? float2{x[n].x, x[n].y} : float2{x[n].z, x[n].w};
            return float2{pair.x * p.softmax_scale, pair.y * p.softmax_scale};
        };
        if constexpr (ACCUMULATES || FP32_GRADIENTS & 1) {
            float* const to = const_cast<float*>(head_row<float>(p.dq, p.dq_strides, batch, head,
                                                                 rows.start + row)) +
                              first_col;
#pragma unroll
            for (int n = 0; n < UNIT_COLS / 8; ++n) {
                const int col = n * 8 + lane % 4 * 2;
                const float pair[2] = {two(n).x, two(n).y};
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (!valid || first_col + col + e >= DIM_QK) continue;
                    to[col + e] = ACCUMULATES ? to[col + e] + pair[e] : pair[e];
                }
            }
        } else {
            T* const to =
                const_cast<T*>(head_row<T>(p.dq, p.dq_strides, batch, head, rows.start + row));
            store_quad_row<UNIT_COLS, ALIGN_BYTES>(
                to + first_col, valid, DIM_QK - first_col,
                [&](int n) { return pack2<T>(two(n).x, two(n).y); });
        }
    }
}

}  // namespace flashcore
