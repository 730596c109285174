// epilogue.cuh - the end of a consumer's rows: their LSE, and O, which leaves by TMA, from
// registers, or as partials of split keys.
#pragma once
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/output/split_combine.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/tile/tma_tile.cuh>
#include <sm90/consumer.cuh>
#include <sm90/traits.cuh>

namespace flashcore {

// The end of a row: see finish_row.cuh. Returns the factor for O.
__device__ __forceinline__ float Consumer::finish(RowState& row, const QueryRow& q,
                                                  bool writes_lse) const {
    return finish_row<RULES>(params, work_tile(), q, gate_row(q), row, writes_lse);
}
__device__ __forceinline__ T* Consumer::output_row(const QueryRow& q) const {
    const Work& w = work_tile();
    return const_cast<T*>(
        head_row<T>(params.o, params.o_strides, w.batch, q.head, w.start_q + q.query));
}

// Writes both rows' LSE, and sets factor to what O has to be multiplied by. The rows' state stays
// as it is, for some rows may have to be computed again.
__device__ __forceinline__ void Consumer::finish_rows(float (&factor)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        RowState end = state[half];
        end.sum = group_sum<QUAD>(end.sum);
        factor[half] = finish(end, query(half), lane() % QUAD == 0);
    }
}

// The box of the warp's rows of O.
__device__ __forceinline__ auto Consumer::output_box() const {
    const Work& w = work_tile();
    const int row = w.start_q + w.first_row + warp() * 16;
    if constexpr (VARLEN) {
        return SequenceBox{&params.o_map, row, w.start_q + w.seqlen_q, w.head, 16, -16};
    } else {
        return TileBox{&params.o_map, row, w.head, w.batch};
    }
}

// Normalises and writes O.
__device__ __forceinline__ void Consumer::store(const float (&factor)[2]) {
    const auto pair = [&](int n, int half) {
        return pack2<T>(scaled_output(rO[4 * n + 2 * half], factor[half]),
                        scaled_output(rO[4 * n + 2 * half + 1], factor[half]));
    };
    if constexpr (WRITES_OUTPUT<GATE> && STAGED_COLS < HEAD_DIM_V) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow q = query(half);
            store_quad_row<HEAD_DIM_V - STAGED_COLS, ALIGN_BYTES>(
                output_row(q) + STAGED_COLS, q.valid, DIM_V - STAGED_COLS,
                [&](int n) { return pair(STAGED_COLS / 8 + n, half); });
        }
    }
    if constexpr (STAGED_COLS > 0) {
        T* const tile = smem.sO[warp()];
        await_stored();  // TMA has read the rows of the block before
        put_rows<LayoutO>(shared_address(tile), pair);
        store_tile_tma<LayoutO>(tile, output_box(), EVICT_FIRST);
    }
}

// The end where keys are split: the CTA publishes its partials, and combines those of all splits of
// its rows if it is the CTA to do so.
__device__ __forceinline__ void Consumer::finish_split() {
    const Splits splits(params, work_tile().block, work_tile().split, smem.sK);
    // All warps have read K: a cluster's partials may be written over it.
    if (CLUSTER > 1) named_barrier_sync(BARRIER_CONSUMER + index, WARPGROUP_THREADS);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        state[half].sum = group_sum<QUAD>(state[half].sum);
        if (query(half).valid)
            splits.publish(row(half), state[half],
                           [&](int n, int e) { return rO[4 * n + 2 * half + e]; });
    }
    const int thread = thread_index_volatile() % WARPGROUP_THREADS;
    if (!splits.sync(smem.is_last, thread == 0, BARRIER_CONSUMER + index, WARPGROUP_THREADS))
        return;
    const int rows = min(rows_of(work_tile()) - work_tile().first_row, BLOCK_M);
    const auto use = [&](int row, int col, RowState& all, float4 o) {
        const QueryRow q = query_row<PACK_GQA>(work_tile(), row);
        const float factor = finish(all, q, col == 0);
        if constexpr (WRITES_OUTPUT<GATE>)
            store_four<ALIGN_BYTES>(output_row(q) + col, DIM_V - col, o, factor);
    };
    splits.combine(rows, exponent_scale<RULES>(params), thread, WARPGROUP_THREADS, use);
    splits.end();
}

}  // namespace flashcore
