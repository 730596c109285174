// producer.cuh - the warp of bwd_sm90.cu, or of bwd_sm90_wide.cu, that starts the copies: TMA of
// the block's own rows and of the tiles that it walks over, cp.async of what belongs to their
// queries.
#pragma once
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/params_backward_hopper.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/tma_tile.cuh>
#include <sm90_backward/tiles.cuh>

namespace flashcore {

using State = PipelineState<NUM_STAGES>;

// The map of a side's q or k, or of its dO or v.
__device__ __forceinline__ const TensorMap* map_qk(const HopperBackwardParams& p, bool of_keys) {
    return of_keys ? &p.k_map : &p.q_map;
}
__device__ __forceinline__ const TensorMap* map_vo(const HopperBackwardParams& p, bool of_keys) {
    return of_keys ? &p.v_map : &p.dout_map;
}

// Where a row of the sequence is in the maps of its side, which begin with row `map_begin`. Those
// of a packed batch show all of its sequences, side by side.
__device__ __forceinline__ int row_of_map(const Work& w, bool of_keys, int row, int map_begin) {
    if constexpr (VARLEN) return (of_keys ? w.start_kv : w.start_q) + row;
    return row - map_begin;
}

// Starts the copies of the block's own rows, which are guarded by one barrier.
template <typename Shared>
__device__ __forceinline__ void load_own_rows(const HopperBackwardParams& p, Shared& smem,
                                              const WarpContext& c) {
    const Work& w = c.work;
    const int map_begin = OWNS_KEYS ? c.mask().row_begin(0) : 0;
    const int row = row_of_map(w, OWNS_KEYS, w.first_row, map_begin);
    const int head = OWNS_KEYS ? w.head_kv : w.head, batch = c.array_batch();
    load_tile_tma<LayoutOwnQK, BOX_ROWS>(
        smem.sOwnQK, &smem.full_own, TileBox{map_qk(p, OWNS_KEYS), row, head, batch}, EVICT_FIRST);
    load_tile_tma<LayoutOwnVO, BOX_ROWS>(
        smem.sOwnVO, &smem.full_own, TileBox{map_vo(p, OWNS_KEYS), row, head, batch}, EVICT_FIRST);
}

// Copies the statistics of a tile of queries; zeros for those that do not exist. Every lane arrives
// at the tile's barrier when its copies are there.
template <typename Shared>
__device__ __forceinline__ void load_statistics(const HopperBackwardParams& p, Shared& smem,
                                                const WarpContext& c, const WalkedTile& at,
                                                int stage) {
    const Work& w = c.work;
    const int first = at.tile * BLOCK_N;
    const int64 row = statistics_row(p, c.array_batch(), at.head) + w.start_q + first;
    for (int i = thread_index() % WARP_SIZE; i < BLOCK_N; i += WARP_SIZE) {
        const bool valid = first + i < w.seqlen_q;
        const int64 from = valid ? row + i : 0;
        cp_async_4(shared_address(&smem.sShift[stage][i]), p.shift + from, valid ? 4 : 0);
        cp_async_4(shared_address(&smem.sDelta[stage][i]), p.delta + from, valid ? 4 : 0);
    }
    mbarrier_arrive_copied(&smem.qk.full[stage]);
}

// Starts the copies of a tile of the other side, as its stage becomes empty. map_begin: the row of
// the sequence that is the first of the side's maps.
template <typename Shared>
__device__ __forceinline__ void load_walked(const HopperBackwardParams& p, Shared& smem,
                                            const WarpContext& c, const WalkedTile& at,
                                            int map_begin, State& state) {
    const int row = row_of_map(c.work, !OWNS_KEYS, at.tile * BLOCK_N, map_begin);
    const int head = OWNS_KEYS ? at.head : c.work.head_kv, batch = c.array_batch();
    const int stage = state.stage;
    state.wait_empty(smem.qk);
    if constexpr (LISTED) {
        if (elect_one()) smem.list.walked[stage] = at;
        // Whichever lane arrives at the barrier, it comes after the one that has written.
        warp_sync();
    }
    load_tile_tma<LayoutQK, BOX_ROWS>(smem.sQK[stage], &smem.qk.full[stage],
                                      TileBox{map_qk(p, !OWNS_KEYS), row, head, batch}, EVICT_LAST);
    if constexpr (OWNS_KEYS) load_statistics(p, smem, c, at, stage);
    state.wait_empty(smem.vo);
    load_tile_tma<LayoutVO, BOX_ROWS>(smem.sVO[stage], &smem.vo.full[stage],
                                      TileBox{map_vo(p, !OWNS_KEYS), row, head, batch}, EVICT_LAST);
    state.advance();
}

// Waits for a consumer's next stage, and returns which tile it holds.
template <typename Shared>
__device__ __forceinline__ WalkedTile wait_walked(Shared& smem, const State& state) {
    state.wait_full(smem.qk);
    const WalkedTile at = smem.list.walked[state.stage];
    warp_sync();  // all lanes have read it before one of them releases the stage
    return at;
}

// Starts all copies of a block: of the tiles in its lists, or of those in a range.
template <typename Shared>
__device__ __forceinline__ void run_producer(const HopperBackwardParams& p, Shared& smem,
                                             const WarpContext& c, const RangeWalk& walk) {
    State state;
    if constexpr (LISTED) {
        ListedWalk list(c);
        if (list.is_empty()) return;
        load_own_rows(p, smem, c);
#pragma unroll 1
        for (; !list.is_empty(); list.advance())
            load_walked(p, smem, c, list.at(0), walk.met.begin, state);
    } else {
        if (walk.count() == 0) return;
        load_own_rows(p, smem, c);
#pragma unroll 1
        for (int nth = 0; nth < walk.count(); ++nth)
            load_walked(p, smem, c, walk[nth], walk.met.begin, state);
    }
}

}  // namespace flashcore
