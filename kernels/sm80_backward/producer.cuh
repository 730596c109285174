// producer.cuh - how the threads of bwd_sm80.cu copy tiles into shared memory by cp.async, and when
// they wait for each other. Every thread copies its pieces of every tile: all are producers, and
// all are consumers.
#pragma once
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/tile/tile_copy.cuh>
#include <sm80_backward/traits.cuh>

namespace flashcore {

// Copies rows [first_row, first_row + Layout::ROWS) of a head; those outside of `valid` are zeros.
template <typename Layout, int VALID_COLS>
__device__ __forceinline__ void copy_rows(T* sTile, const void* base, const Strides& strides,
                                          int batch, int head, int start, int first_row,
                                          RowRange valid) {
    TileCopy<Layout, VALID_COLS, ALIGN_BYTES, NUM_THREADS>::load(
        sTile, head_row<T>(base, strides, batch, head, start + first_row), strides.row,
        valid.begin - first_row, valid.end - first_row);
}
constexpr bool COPIES_ASYNC = TileCopy<LayoutQK, DIM_QK, ALIGN_BYTES, NUM_THREADS>::ASYNC;

// Rows of a query's or a key's side: q and dO, or k and v.
template <bool QUERIES, typename LayoutQK_, typename LayoutVO_>
__device__ __forceinline__ void copy_side(const Context& c, T* sQK, T* sVO, int head, int first_row,
                                          RowRange valid) {
    const BackwardParams& p = c.params;
    const Work& w = c.work;
    const int batch = c.array_batch(), start = QUERIES ? w.start_q : w.start_kv;
    copy_rows<LayoutQK_, DIM_QK>(sQK, QUERIES ? p.q : p.k, QUERIES ? p.q_strides : p.k_strides,
                                 batch, head, start, first_row, valid);
    copy_rows<LayoutVO_, DIM_V>(sVO, QUERIES ? p.dout : p.v, QUERIES ? p.dout_strides : p.v_strides,
                                batch, head, start, first_row, valid);
}

__device__ __forceinline__ void load_own_rows(const Context& c) {
    const Work& w = c.work;
    copy_side<!OWNS_KEYS, LayoutOwnQK, LayoutOwnVO>(c, c.smem.sOwnQK, c.smem.sOwnVO,
                                                    OWNS_KEYS ? w.head_kv : w.head, w.first_row,
                                                    {0, OWNS_KEYS ? w.seqlen_kv : w.seqlen_q});
}

// Copies the statistics of a tile of queries; zeros for those that do not exist.
__device__ __forceinline__ void load_statistics(const Context& c, const WalkedTile& at, int stage) {
    const int first = at.tile * BLOCK_N;
    const int64 row = statistics_row(c.params, c.array_batch(), at.head) + c.work.start_q + first;
    for (int i = thread_index(); i < BLOCK_N; i += NUM_THREADS) {
        const bool valid = first + i < c.work.seqlen_q;
        const int64 from = valid ? row + i : 0;
        if constexpr (COPIES_ASYNC) {
            copy_async<4>(shared_address(&c.smem.sShift[stage][i]), c.params.shift + from, valid);
            copy_async<4>(shared_address(&c.smem.sDelta[stage][i]), c.params.delta + from, valid);
        } else {
            copy_sync<4>(&c.smem.sShift[stage][i], c.params.shift + from, valid);
            copy_sync<4>(&c.smem.sDelta[stage][i], c.params.delta + from, valid);
        }
    }
}

// Starts to copy the nth tile: the first, or the one behind that which is used. Waits until all
// threads have read the tile that its stage had before.
__device__ __forceinline__ void fill(const Context& c, const Walk& walk, int nth) {
    const int stage = nth % NUM_STAGES;
    mbarrier_wait(&c.smem.tiles.empty[stage], nth / NUM_STAGES % 2 ^ 1);
    const WalkedTile at = walk.to_copy(nth);
    copy_side<OWNS_KEYS, LayoutQK, LayoutVO>(c, c.smem.sQK[stage], c.smem.sVO[stage],
                                             OWNS_KEYS ? at.head : c.work.head_kv,
                                             at.tile * BLOCK_N, walk.met);
    if constexpr (OWNS_KEYS) load_statistics(c, at, stage);
    if constexpr (COPIES_ASYNC) {
        mbarrier_arrive_copied(&c.smem.tiles.full[stage]);
    } else {
        mbarrier_arrive(&c.smem.tiles.full[stage]);  // the copies were plain stores
    }
}

// Waits until the nth tile is in shared memory.
__device__ __forceinline__ void wait_full(const Context& c, int nth) {
    mbarrier_wait(&c.smem.tiles.full[nth % NUM_STAGES], nth / NUM_STAGES % 2);
}

// This thread has read the nth tile.
__device__ __forceinline__ void release(const Context& c, int nth) {
    mbarrier_arrive(&c.smem.tiles.empty[nth % NUM_STAGES]);
}

}  // namespace flashcore
