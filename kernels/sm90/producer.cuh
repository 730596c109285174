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
    int batch, v_map_begin;  // the key that is row 0 of v_map

    __device__ __forceinline__ Boxes(const HopperParams& p, const WorkTile& w)
        : p(p),
          w(w),
          batch(VARLEN ? 0 : w.batch),
          v_map_begin(VARLEN ? 0 : mask_of(p, w).row_begin(0)) {}
    __device__ __forceinline__ TileBox q() const {
        const int query = w.start_q + w.first_query;
        // Of a packed group q_map has heads before queries: a query's rows come one after the
        // other.
        if (PACK_GQA) return {&p.q_map, w.head * w.group, query, batch};
        return {&p.q_map, query, w.head, batch};
    }
    __device__ __forceinline__ TileBox k(int tile) const {
        return {&p.k_map, w.start_kv + tile * BLOCK_N, w.head_kv, batch};
    }
    __device__ __forceinline__ TileBox v(int tile) const {
        return {&p.v_map, w.start_kv + tile * BLOCK_N - v_map_begin, w.head_kv, batch};
    }
};

// Starts all copies of a work tile.
__device__ __forceinline__ void load_block(const HopperParams& p, SharedStorage& smem,
                                           const WorkTile& w, StateQ& q, StateKV& kv) {
    const TileRange tiles = w.tiles;
    const Boxes boxes(p, w);
#pragma unroll 1
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
        const int stage = kv.stage;
        kv.wait_empty(smem.k);
        load_tile_tma<LayoutK, BLOCK_N>(smem.sK[stage], &smem.k.full[stage], boxes.k(tile),
                                        POLICY_KV);
        // K before Q: its stage is free earlier, for the block before releases Q after its last K.
        if (tile == tiles.end - 1) {
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
