// producer.cuh - the warp of fwd_sm90.cu that starts the TMA copies of Q, K_j and V_j.
#pragma once
#include <config.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/scheduler/tile_scheduler.cuh>
#include <flashcore/tile/tma_tile.cuh>
#include <sm90/traits.cuh>

namespace flashcore {

// The boxes of q, k, v that a work tile needs, in the coordinates of their maps.
struct Boxes {
    const HopperParams& p;
    const WorkTile& w;
    int v_map_begin;  // the key that is row 0 of v_map; packed batches have none

    __device__ __forceinline__ Boxes(const HopperParams& p, const WorkTile& w)
        : p(p), w(w), v_map_begin(VARLEN ? 0 : mask_of(p, w).row_begin(0)) {}
    __device__ __forceinline__ auto keys(const TensorMap* map, int tile, int map_begin) const {
        const int key = w.start_kv + tile * BLOCK_N;
        if constexpr (VARLEN) {
            const int end = w.start_kv + seen_end(p, w);
            return SequenceBox{map, key, end, w.head_kv, min(BLOCK_N, p.seqlen_kv), 0};
        } else {
            return TileBox{map, key - map_begin, w.head_kv, w.batch};
        }
    }
    __device__ __forceinline__ auto q() const {
        const int query = w.start_q + w.first_query;
        // Of a packed group q_map has heads before queries: a query's rows come one after the
        // other.
        if constexpr (PACK_GQA) {
            return TileBox{&p.q_map, w.head * w.group, query, VARLEN ? 0 : w.batch};
        } else if constexpr (VARLEN) {
            const int end = w.start_q + w.seqlen_q;
            return SequenceBox{&p.q_map, query, end, w.head, min(ROWS, p.seqlen_q), 0};
        } else {
            return TileBox{&p.q_map, query, w.head, w.batch};
        }
    }
    __device__ __forceinline__ auto k(int tile) const { return keys(&p.k_map, tile, 0); }
    __device__ __forceinline__ auto v(int tile) const { return keys(&p.v_map, tile, v_map_begin); }
};

// With lists: the tiles of a work tile in the order in which they are loaded, one read ahead.
struct ListReader {
    const ListedTile* next;
    ListedTile ahead;

    __device__ __forceinline__ ListReader(const HopperParams& p, const WorkTile& w) {
        if (!LISTED || w.tiles.end == 0) return;
        next = TileLists(p).entries(list_of(p, w)) + w.tiles.end - 1;
        ahead = *next;
    }
    // Returns the tile at `place` of the list, which is the one before the last that was asked for.
    __device__ __forceinline__ ListedTile take(int place) {
        const ListedTile found = ahead;
        if (place > 0) ahead = *--next;
        return found;
    }
};

// Starts all copies of a work tile.
__device__ __forceinline__ void load_block(const HopperParams& p, SharedStorage& smem,
                                           const WorkTile& w, StateQ& q, StateKV& kv) {
    const TileRange tiles = w.tiles;
    const Boxes boxes(p, w);
    ListReader list(p, w);
#pragma unroll 1
    for (int place = tiles.end - 1; place >= tiles.begin; --place) {
        const int stage = kv.stage;
        int tile = place;
        kv.wait_empty(smem.k);
        if constexpr (LISTED) {
            const ListedTile listed = list.take(place);
            tile = listed.tile();
            if (elect_one()) smem.listed.tile[stage] = listed;
            // Whichever lane arrives at K's barrier, it comes after the one that has written.
            warp_sync();
        }
        load_tile_tma<LayoutK, BLOCK_N>(smem.sK[stage], &smem.k.full[stage], boxes.k(tile),
                                        POLICY_KV);
        // K before Q: its stage is free earlier, for the block before releases Q after its last K.
        if (place == tiles.end - 1) {
            q.wait_empty(smem.q);
            load_tile_tma<LayoutQ, ROWS>(smem.sQ[q.stage], &smem.q.full[q.stage], boxes.q(),
                                         EVICT_FIRST);
            q.advance();
        }
        kv.wait_empty(smem.v);
        load_tile_tma<LayoutV, BLOCK_N>(smem.sV[stage], &smem.v.full[stage], boxes.v(tile),
                                        POLICY_KV);
        kv.advance();
    }
}

// Starts the copies of one work tile after the other, as stages become empty.
__device__ __forceinline__ void run_producer(const HopperParams& p, SharedStorage& smem) {
    StateKV kv;
    StateQ q;
    WorkState work;
    LoadedState loaded;
#pragma unroll 1
    while (true) {
        const WorkTile& w = smem.work.tile[work.stage];
        if (is_end(w)) return;
        load_block(p, smem, w, q, kv);
        smem.work.arrive_loaded(loaded);
        loaded.advance();
        warp_sync();  // all lanes have read the work tile before its stage is released
        work.release(smem.work.pipeline);
        work.advance();
        work.wait_full(smem.work.pipeline);
    }
}

}  // namespace flashcore
