// masks.cuh - what a consumer does about keys that nobody sees: their rows of V become zeros,
// because 0 * NaN is not 0; and tiles without a key that somebody sees are passed over.
#pragma once
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90/consumer.cuh>
#include <sm90/traits.cuh>

namespace flashcore {

// Looks up which keys masks leave to this lane's rows, before the scores are there. MASKED: which
// keys positions leave to them, too.
template <bool MASKED>
__device__ __forceinline__ void Consumer::look_up_keys(int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
        visible[half] = rules_for(query(half))
                            .template visible<MASKED, TILES_N, LOOKUPS>(mask(), first_key(tile));
}
__device__ __forceinline__ void Consumer::look_up_keys_of(int tile) {
    if constexpr (HIDES_KEYS) {
        if (needs_mask(tile)) {
            look_up_keys<true>(tile);
        } else {
            look_up_keys<false>(tile);
        }
        seen = Bits();
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (query(half).valid) seen.add(visible[half]);
        seen.add_rows();
    }
}

// Overwrites rows of V that lie outside the sequence. TMA leaves out what lies outside of all
// sequences; but in packed batches the box of a sequence's last keys reaches into the next
// sequence. Every consumer does this for itself, and all write the same. (What masks hide they find
// out together: attend_seen_tiles.)
__device__ __forceinline__ void Consumer::clear_unseen(int tile, int stage) {
    if constexpr (!VARLEN) return;
    const int begin = mask().row_begin(0) - tile * BLOCK_N;
    const int end = mask().row_end(work_tile().seqlen_q - 1) - tile * BLOCK_N;
    if (begin <= 0 && end >= BLOCK_N) return;
    for (int key = warp() % 4; key < BLOCK_N; key += 4) {
        if (key >= begin && key < end) continue;
        for (int d = lane() * 2; d < HEAD_DIM_V; d += 2 * WARP_SIZE)
            *reinterpret_cast<uint32*>(smem.sV[stage] + LayoutV::element(key, d)) = 0;
    }
    fence_proxy_async();                                      // wgmma sees this thread's zeros
    named_barrier_sync(BARRIER_CONSUMER + index, WARPGROUP);  // all four warps have written theirs
}

// Publishes which keys of the tile this warp sees, and returns what all consumers see together. The
// double buffer needs no second barrier: when a buffer is used again, all consumers have met once
// more, and they have read it before that.
__device__ __forceinline__ SeenExtent Consumer::sync_seen_keys() {
    ++tiles_synced;
    smem.seen.of[tiles_synced % 2].publish(seen, warp());
    named_barrier_sync(BARRIER_ALL_CONSUMERS, NUM_THREADS);  // all warps have published
    return smem.seen.of[tiles_synced % 2].extent();
}
__device__ __forceinline__ void Consumer::clear_unseen_together() {
    smem.seen.of[tiles_synced % 2].template clear_unseen<LayoutV>(smem.sV[kv.stage], warp());
    fence_proxy_async();                                     // wgmma sees this thread's zeros
    named_barrier_sync(BARRIER_ALL_CONSUMERS, NUM_THREADS);  // all warps have written theirs
}

// The main loop where there are masks. Which keys of the next tile they leave is looked up while P
// V runs; then all consumers tell each other what they see. A tile of which nobody sees anything is
// passed over; in others, values that nobody sees become zeros.
__device__ __forceinline__ void Consumer::attend_seen_tiles(const TileRange& tiles) {
    float factor[2];
    look_up_keys_of(tiles.end - 1);
#pragma unroll 1
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
        const SeenExtent seen_keys = sync_seen_keys();
        if (!seen_keys.some) {
            kv.wait_full(smem.k);
            kv.release(smem.k);
            kv.wait_full(smem.v);
            kv.release(smem.v);
            if (tile > tiles.begin) look_up_keys_of(tile - 1);
        } else {
            begin_scores();
            end_scores<0>();
            softmax_of(tile, factor);
            pack_p<T>(rP, rS);
            scale_output(factor);
            kv.wait_full(smem.v);
            if (!seen_keys.all) clear_unseen_together();
            start_output<LayoutV>(rO, rP, smem.sV[kv.stage]);
            if (tile > tiles.begin) look_up_keys_of(tile - 1);
            end_output(kv);
        }
        kv.advance();
    }
    q.release(smem.q);
}

}  // namespace flashcore
