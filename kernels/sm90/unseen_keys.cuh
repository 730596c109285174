// unseen_keys.cuh - what a consumer does about keys that no row of its CTA sees: it overwrites
// their rows of V with zeros, because their probability is 0, but 0 * NaN is not; and it skips
// tiles of which no row sees any key.
#pragma once
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90/consumer.cuh>
#include <sm90/traits.cuh>

namespace flashcore {

// Looks up which keys of a tile this lane's rows see by `mask` and mask_mod, before the scores are
// there. MASKED: by their positions, too.
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

// Packed batches: overwrites rows of V that no query sees, as far as the tile has any: those before
// the first key that one sees, and those behind the last of a sequence that ends in the array's
// first rows, which boxes reach behind. (All else TMA leaves out.) Every consumer does this for
// itself, and all write the same zeros. (For keys that masks hide, all consumers work together:
// attend_seen_tiles.)
__device__ __forceinline__ void Consumer::clear_unseen(int tile, int stage) {
    if constexpr (!VARLEN) return;
    const int begin = BOUNDED_LEFT ? mask().row_begin(0) - tile * BLOCK_N : 0;
    const int last = seen_end(params, work_tile());
    const int end = work_tile().start_kv + last < BLOCK_N ? last - tile * BLOCK_N : BLOCK_N;
    if (begin <= 0 && end >= BLOCK_N) return;
    constexpr int CHUNKS = HEAD_DIM_V / LayoutV::CHUNK;
    for (int i = thread_index_volatile() % WARPGROUP_THREADS; i < BLOCK_N * CHUNKS;
         i += WARPGROUP_THREADS) {
        const int key = i / CHUNKS;
        if (key >= begin && key < end) continue;
        T* const chunk = smem.sV[stage] + LayoutV::element(key, i % CHUNKS * LayoutV::CHUNK);
        *reinterpret_cast<Vector<16>*>(chunk) = Vector<16>();
    }
    fence_proxy_async();  // wgmma sees this thread's zeros
    // All four warps have written their zeros.
    named_barrier_sync(BARRIER_CONSUMER + index, WARPGROUP_THREADS);
}

// Publishes which keys of the tile this warp sees, and returns how much of it all consumers see
// together. One barrier per tile is enough, because there are two buffers: before a warp writes to
// a buffer again, it passes the next tile's barrier, at which every warp has read this one.
__device__ __forceinline__ SeenExtent Consumer::sync_seen_keys() {
    ++tiles_synced;
    smem.seen.buffer[tiles_synced % 2].publish(seen, warp());
    named_barrier_sync(BARRIER_ALL_CONSUMERS, CONSUMER_THREADS);  // all warps have published
    return smem.seen.buffer[tiles_synced % 2].extent();
}
__device__ __forceinline__ void Consumer::clear_unseen_together() {
    smem.seen.buffer[tiles_synced % 2].template clear_unseen<LayoutV, CONSUMER_WARPS>(
        smem.sV[kv.stage], warp());
    fence_proxy_async();                                          // wgmma sees this thread's zeros
    named_barrier_sync(BARRIER_ALL_CONSUMERS, CONSUMER_THREADS);  // all warps have written theirs
}

// The main loop where there are masks. The next tile's keys are looked up while P V runs. Then all
// consumers tell each other which keys they see, because all read V from the same stage: a tile of
// which no row sees any key is skipped, and in others the values of unseen keys become zeros.
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
            start_qk();
            look_up_kept(tile);
            wait_qk<0>();
            softmax_of(tile, factor);
            pack_p<T>(rP, rS);
            scale_output(factor);
            kv.wait_full(smem.v);
            if (!seen_keys.all) clear_unseen_together();
            wgmma_pv<LayoutV>(rO, rP, smem.sV[kv.stage]);
            if (tile > tiles.begin) look_up_keys_of(tile - 1);
            wait_pv(kv);
        }
        kv.advance();
    }
    q.release(smem.q);
}

}  // namespace flashcore
