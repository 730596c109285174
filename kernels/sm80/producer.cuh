// producer.cuh - how the threads of fwd_sm80.cu copy tiles into shared memory by cp.async, and when
// they wait for each other. Every thread copies its pieces of every tile: all are producers, and
// all are consumers.
#pragma once
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/tile/tile_copy.cuh>
#include <sm80/traits.cuh>

namespace flashcore {

__device__ __forceinline__ void load_q(const Context& c) {
    const AttentionParams& p = c.params;
    if constexpr (PACK_GQA) {
        const auto row_of = [&](int row, bool& valid) {
            return c.row_address(p.q, p.q_strides, row, valid);
        };
        gather_rows<LayoutQ, DIM_QK, ALIGN_BYTES, NUM_THREADS>(c.smem.sQ, row_of);
    } else {
        TileCopy<LayoutQ, DIM_QK, ALIGN_BYTES, NUM_THREADS>::load(
            c.smem.sQ,
            head_row<T>(p.q, p.q_strides, c.work.batch, c.work.head,
                        c.work.start_q + c.work.first_row),
            p.q_strides.row, 0, c.work.seqlen_q - c.work.first_row);
    }
}

using CopyK = TileCopy<LayoutK, DIM_QK, ALIGN_BYTES, NUM_THREADS>;
using CopyV = TileCopy<LayoutV, DIM_V, ALIGN_BYTES, NUM_THREADS>;

// Where a tile of K and V lies: its stage, the barriers (of SharedStorage::kv) that guard K and V
// there, and the parity of their phase. KV_TOGETHER: barriers_k and barriers_v are the same.
struct TileStage {
    int stage, barriers_k, barriers_v;
    uint32 parity;
};

// The walk over the keys: which tiles, and what this thread keeps from one to the next. With a list
// a tile has a place in it; without one its place is its number.
struct Walk {
    TileRange all;  // places
    const ListedTile* entries;
    ListedTile now, ahead;    // at this place, and at the next
    TileRange kept_unmasked;  // see unmasked
    // This thread's first piece of the next K and the next V to be copied, and the shared address
    // of that piece in sK[0]. It has the same offset in sV[0].
    const T *next_k, *next_v;
    uint32 target;
    static_assert(!KEEPS_COPIES || !CopyV::BY_PIECES ||
                      (LayoutK::PANEL == LayoutV::PANEL && LayoutK::LD == LayoutV::LD),
                  "a thread's pieces have the same offset in tiles of K and of V");

    __device__ __forceinline__ Walk(const Context& c, const TileRange& all)
        : all(all),
          kept_unmasked(unmasked(c)),
          next_k(CopyK::first_piece(c.smem.gK, c.params.k_strides.row, all.begin * BLOCK_N)),
          next_v(CopyV::first_piece(c.smem.gV, c.params.v_strides.row, all.begin * BLOCK_N)),
          target(CopyK::first_target(c.smem.sK[0])) {
        if constexpr (LISTED) {
            entries = TileLists(c.params).entries(list_of(c.params, c.work));
            now = entries[all.begin];
            ahead = entries[min(all.begin + 1, all.end - 1)];
        }
    }

    // The tile at this place, and the one at the next.
    __device__ __forceinline__ int tile(int place) const { return LISTED ? now.tile() : place; }
    __device__ __forceinline__ int next_tile(int place) const {
        return LISTED ? ahead.tile() : place + 1;
    }
    // Goes on to the next place.
    __device__ __forceinline__ void advance(int place) {
        if constexpr (LISTED) {
            now = ahead;
            ahead = entries[min(place + 2, all.end - 1)];
        }
    }
    // The blocks of a mask that the warp's rows meet in this tile.
    __device__ __forceinline__ BlocksOfRow blocks_in(const Context& c) const {
        return TileLists(c.params).blocks_of(now, c.work.first_row,
                                             c.work.first_row + c.first_row());
    }

    // Whether positions hide some key of the tile from some row of the block.
    __device__ __forceinline__ bool needs_mask(const Context& c, int tile) const {
        const TileRange tiles = KEEPS_EDGES ? kept_unmasked : unmasked(c);
        return tile >= tiles.end || (BOUNDED_LEFT && tile < tiles.begin);
    }
    // The tiles of which every row of the block sees every key.
    __device__ static __forceinline__ TileRange unmasked(const Context& c) {
        return unmasked_tiles<BLOCK_N, PACK_GQA>(c.work, c.mask(), 0, BLOCK_M);
    }

    __device__ __forceinline__ TileStage stage_of(int place) const {
        const uint32 nth = place - all.begin;
        const int stage = nth % NUM_STAGES;
        return {stage, stage, KV_TOGETHER ? stage : 1, nth / NUM_STAGES % 2};
    }

    // The last tile may have keys that do not exist or that no query sees; bounded on the left, so
    // may the first one.
    __device__ __forceinline__ bool has_all_keys(int tile) const {
        return tile > all.begin && tile + 1 < all.end;
    }
};

__device__ __forceinline__ void load_k(const Context& c, Walk& walk, int tile, int stage) {
    const int64 row_stride = c.params.k_strides.row;
    const int first_key = tile * BLOCK_N;
    if (KEEPS_COPIES && CopyK::BY_PIECES && walk.has_all_keys(tile)) {
        CopyK::load_all(walk.target + stage * LayoutK::BYTES, walk.next_k, row_stride);
    } else {
        CopyK::load(c.smem.sK[stage], c.smem.gK + first_key * row_stride, row_stride, 0,
                    c.mask().seqlen_kv - first_key);
    }
    walk.next_k += BLOCK_N * row_stride;
}

// Values that no query of the sequence sees are filled with zeros: their probability is 0, but
// 0 * NaN is not.
__device__ __forceinline__ void load_v(const Context& c, Walk& walk, int tile, int stage) {
    const int64 row_stride = c.params.v_strides.row;
    const int first_key = tile * BLOCK_N;
    if (KEEPS_COPIES && CopyV::BY_PIECES && walk.has_all_keys(tile)) {
        CopyV::load_all(walk.target + NUM_STAGES * LayoutK::BYTES + stage * LayoutV::BYTES,
                        walk.next_v, row_stride);
    } else {
        CopyV::load(c.smem.sV[stage], c.smem.gV + first_key * row_stride, row_stride,
                    c.mask().row_begin(0) - first_key,
                    c.mask().row_end(c.work.seqlen_q - 1) - first_key);
    }
    walk.next_v += BLOCK_N * row_stride;
}

// ---- who waits for what ------------------------------------------------------------------------
// Every thread arrives at both barriers. To let one lane arrive at `empty` for its warp is 1 %
// faster, but compute-sanitizer's racecheck cannot follow it.

// Waits until all threads' copies are in shared memory.
__device__ __forceinline__ void wait_full(const Context& c, const TileStage& at, int barriers) {
    mbarrier_wait(&c.smem.kv.full[barriers], at.parity);
}
// Arrives at `full` when the copies that this thread has started are in shared memory.
__device__ __forceinline__ void commit(const Context& c, int barriers) {
    if (CopyK::ASYNC) {
        mbarrier_arrive_copied(&c.smem.kv.full[barriers]);
    } else {
        mbarrier_arrive(&c.smem.kv.full[barriers]);  // the copies were plain stores
    }
}
// Waits until all threads have read the tile that the stage had before.
__device__ __forceinline__ void wait_empty(const Context& c, const TileStage& at, int barriers) {
    mbarrier_wait(&c.smem.kv.empty[barriers], at.parity ^ 1);
}
__device__ __forceinline__ void release(const Context& c, int barriers) {
    mbarrier_arrive(&c.smem.kv.empty[barriers]);
}

// Starts to copy K of the tile at a place; and V, too, where they share barriers.
__device__ __forceinline__ void fill_tile(const Context& c, Walk& walk, int place, int tile) {
    const TileStage at = walk.stage_of(place);
    wait_empty(c, at, at.barriers_k);
    load_k(c, walk, tile, at.stage);
    if (KV_TOGETHER) load_v(c, walk, tile, at.stage);
    commit(c, at.barriers_k);
}
// Starts to copy V of the tile at a place, where it has barriers of its own.
__device__ __forceinline__ void fill_v(const Context& c, Walk& walk, int place, int tile) {
    const TileStage at = walk.stage_of(place);
    wait_empty(c, at, at.barriers_v);
    load_v(c, walk, tile, at.stage);
    commit(c, at.barriers_v);
}

}  // namespace flashcore
