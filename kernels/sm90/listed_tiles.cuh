// listed_tiles.cuh - a consumer's main loop over a list of tiles (rules/listed_tiles.cuh).
//
// It is software-pipelined as the main loop without a list is. The producer says in shared memory
// which tile a stage holds. A consumer's 64 rows are of one block of queries, so for a tile it does
// one of three things: it looks up nothing where their blocks are full, it looks up the mask and
// mask_mod where some are not, and it computes nothing where all are empty.
//
// Keys that no row of the CTA sees must not reach O: their probability is 0, but 0 * NaN is not. A
// list says in which tiles there may be any. There the consumers publish which keys they see right
// after they have looked them up. They read it a step later, before P V, when all have published:
// so they hardly ever wait for each other.
#pragma once
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/listed_tiles.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90/consumer.cuh>
#include <sm90/softmax.cuh>
#include <sm90/traits.cuh>

namespace flashcore {

__device__ __forceinline__ void init_listed(SharedStorage& smem) {
    mbarrier_init(&smem.listed.published[0], CONSUMER_WARPS);
    mbarrier_init(&smem.listed.published[1], CONSUMER_WARPS);
}

// Waits for the K of the next stage, and returns which tile it is.
__device__ __forceinline__ ListedTile Consumer::wait_listed() {
    kv.wait_full(smem.k);
    const ListedTile at = smem.listed.tile[kv.stage];
    warp_sync();  // all lanes have read it before one of them releases K's stage
    return at;
}

// The blocks that this consumer's rows meet in a tile.
__device__ __forceinline__ BlocksOfRow Consumer::blocks_in(const ListedTile& at) const {
    const int first_row = work_tile().first_row;
    return TileLists(params).blocks_of(at, first_row, first_row + index * ROWS);
}

// ---- which keys are seen -----------------------------------------------------------------------

template <bool MASKED>
__device__ __forceinline__ void Consumer::look_up_blocks(const ListedTile& at) {
    const BlocksOfRow blocks = blocks_in(at);
#pragma unroll
    for (int half = 0; half < 2; ++half)
        visible[half] = rules_for(query(half))
                            .template visible_in<MASKED, TILES_N, LOOKUPS>(blocks, mask(),
                                                                           first_key(at.tile()));
}

// Looks up which keys of a tile this lane's rows see, unless their blocks are full and positions
// hide nothing; returns whether it has. Publishes them where the consumers have to know.
__device__ __forceinline__ bool Consumer::look_up_listed(const ListedTile& at) {
    const bool masked = needs_mask(at.tile());
    // Keys behind the sequence need no look: TMA has left out their values.
    const bool looks_up = !blocks_in(at).are_full() || ((BOUNDED_RIGHT || BOUNDED_LEFT) && masked);
    seen = Bits();
    if (looks_up) {
        if (masked) {
            look_up_blocks<true>(at);
        } else {
            look_up_blocks<false>(at);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (query(half).valid) seen.add(visible[half]);
        seen.add_rows();
    } else {
        seen.set_all();
    }
    if (at.has_unseen()) publish_seen();
    return looks_up;
}

// Publishes which keys of a tile this warp sees. There are two buffers: before a warp writes to one
// again, it has waited for what all have published of the next tile, at which all have read this.
__device__ __forceinline__ void Consumer::publish_seen() {
    ++tiles_synced;
    smem.seen.buffer[tiles_synced % 2].publish(seen, warp());
    warp_sync();  // all lanes have written before one of them arrives
    if (elect_one()) mbarrier_arrive(&smem.listed.published[tiles_synced % 2]);
}
// Waits until all warps have published what they see of the tile that this one published last.
__device__ __forceinline__ void Consumer::await_published() const {
    mbarrier_wait(&smem.listed.published[tiles_synced % 2], (tiles_synced - 1) / 2 % 2);
}

// Starts O += P V with the V of stage `v`. Before, every consumer overwrites the values of unseen
// keys by itself, and all write the same zeros.
__device__ __forceinline__ void Consumer::start_listed_pv(const StateKV& v, const ListedTile& at) {
    v.wait_full(smem.v);
    if (at.has_unseen()) {
        await_published();
        const auto& all = smem.seen.buffer[tiles_synced % 2];
        if (!all.extent().all) {
            all.template clear_unseen<LayoutV, WARPGROUP_WARPS>(smem.sV[v.stage],
                                                                warp() % WARPGROUP_WARPS);
            fence_proxy_async();  // wgmma sees this thread's zeros
            // All four warps have written their zeros.
            named_barrier_sync(BARRIER_CONSUMER + index, WARPGROUP_THREADS);
        }
    }
    wgmma_pv<LayoutV>(rO, rP, smem.sV[v.stage]);
}

// ---- the main loop -----------------------------------------------------------------------------

__device__ __forceinline__ void Consumer::softmax_of_listed(const ListedTile& at, bool looked_up,
                                                            float (&factor)[2]) {
    const int tile = at.tile();
    const bool masked = needs_mask(tile);
    float max[2];
    if (looked_up) {
        // Positions are among what was looked up; only rules that look up arrays still have to know
        // that keys may lie behind the sequence.
        if ((RULES & SCORE_RULES) && masked) {
            find_maxima<true, HIDES_KEYS>(tile, max);
        } else {
            find_maxima<false, HIDES_KEYS>(tile, max);
        }
        exponentiate(tile, max, factor);
    } else {
        if (masked) {
            find_maxima<true, false>(tile, max);
        } else {
            find_maxima<false, false>(tile, max);
        }
        exponentiate(tile, max, factor);
    }
}

// Passes over a tile of which this consumer's rows see no key: its turn, its stages, and what all
// publish.
__device__ __forceinline__ void Consumer::skip_listed(const ListedTile& at) {
    kv.release(smem.k);
    wait_turn();
    pass_turn();
    if (at.has_unseen()) {
        seen = Bits();
        publish_seen();
        await_published();  // or this warp could publish two tiles ahead of who still reads
    }
    kv.wait_full(smem.v);
    kv.release(smem.v);
    kv.advance();
}

// left: how many tiles there are. Tiles that these rows see follow each other without a gap in the
// pipeline; before one that they do not see, the last P V is finished, so that its stage is free.
__device__ __forceinline__ void Consumer::attend_listed_tiles(int left) {
    float factor[2];
#pragma unroll 1
    while (left > 0) {
        ListedTile at = wait_listed();
        if (blocks_in(at).are_empty()) {
            skip_listed(at);
            if (--left == 0) q.release(smem.q);
            continue;
        }
        start_qk();
        pass_turn();
        bool looked_up = look_up_listed(at);
        look_up_kept(at.tile());
        wait_qk<0>();
        softmax_of_listed(at, looked_up, factor);
        pack_p<T>(rP, rS);
        scale_output(factor);
        StateKV last = kv;  // the stage of the tile whose P V is still to come
        ListedTile last_at = at;
#pragma unroll 1
        while (--left > 0) {
            kv.advance();
            at = wait_listed();
            if (blocks_in(at).are_empty()) break;
            start_qk();
            start_listed_pv(last, last_at);
            pass_turn();
            looked_up = look_up_listed(at);
            look_up_kept(at.tile());
            wait_qk<1>();  // P V may still run
            softmax_of_listed(at, looked_up, factor);
            wait_pv(last);  // P V has read rP and written rO
            pack_p<T>(rP, rS);
            scale_output(factor);
            last = kv;
            last_at = at;
        }
        if (left == 0) {
            q.release(smem.q);  // the next block's Q may arrive during the last P V
            kv.advance();
        }
        start_listed_pv(last, last_at);
        wait_pv(last);
    }
}

}  // namespace flashcore
