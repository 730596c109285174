// turns.cuh - the order in which the CTAs of bwd_sm90.cu, or bwd_sm90_wide.cu, add to dQ, so that a
// sum has the same bits each time: to a tile of queries first adds the last block of keys that it
// sees, then the one before.
//
// A counter per tile says how many have added. One warp of a CTA sees to it: it looks at the
// counters of the next few tiles at once and tells the consumers which of them are the CTA's turn;
// and it counts on the tiles that they have added to. Blocks of keys are drawn in order, so
// whoever waits, waits for CTAs that run already: no CTA waits for one that cannot start. Under a
// causal mask a CTA begins with the queries at its own keys, whose turn is at once, and the CTA
// before it, which began with later queries, stays ahead. Without one, each is as far behind the
// one before it as handing on a tile takes, and from then on its turn has come when it comes to a
// tile.
#pragma once
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <sm90_backward/tiles.cuh>

namespace flashcore {

// The next block, for all threads of the CTA. Uses shared memory before anything else does.
template <typename Shared>
__device__ __forceinline__ int draw_block(const BackwardParams& p, Shared& smem) {
    if (thread_index() == 0) smem.block = atomic_add(p.turns, 1);
    block_sync();  // all threads see the block
    return smem.block;
}

// Whether the boundaries of a packed batch's keys rise, which nobody has checked. If they do not,
// some blocks may be found by no CTA, and whoever waited for their turn would never end. All lanes
// of the warp call it.
__device__ __forceinline__ bool has_all_blocks(const BackwardParams& p) {
    const PackedBatch kv = packed_keys(p);
    bool falls = false;
    for (int n = thread_index() % WARP_SIZE; n < kv.sequences; n += WARP_SIZE)
        falls = falls || kv.boundary(n) > kv.boundary(n + 1);
    return !warp_any(falls);
}

// How many CTAs add to a tile before this one.
__device__ __forceinline__ int turn_of(const WarpContext& c, int tile) {
    const int last_query = min((tile + 1) * BLOCK_N, c.work.seqlen_q) - 1;
    return (c.mask().row_end(last_query) - 1) / BLOCK_M - c.work.first_row / BLOCK_M;
}

// One warp does this, all its lanes.
template <typename Shared>
__device__ __forceinline__ void take_turns(const WarpContext& c, Shared& smem,
                                           const RangeWalk& walk) {
    const BackwardParams& p = c.params;
    const int count = walk.count();
    const auto counter = [&](int nth) {
        const WalkedTile at = walk[nth];
        return p.turns + 1 + tile_of_dq(p, c.work, at.head, at.tile);
    };
    int granted = 0, done = 0;  // tiles whose turn has come; that have been counted on
    while (done < count) {
        const int next = granted + c.lane;
        bool has_come = false;
        if (next < min(count, done + TURNS))
            has_come = read_count(counter(next)) >= turn_of(c, walk[next].tile);
        const int come = warp_leading_count(has_come);
        if (c.lane < come) mbarrier_arrive(&smem.turn[next % TURNS]);
        granted += come;

        const int last = done + c.lane;
        const bool added =
            last < granted && mbarrier_test_wait(&smem.added[last % TURNS], last / TURNS % 2);
        const int finished = warp_leading_count(added);
        if (c.lane < finished) {
            fence_gpu();  // the GPU sees the consumers' additions before the count
            red_add(counter(last), 1);
        }
        done += finished;
    }
}

}  // namespace flashcore
