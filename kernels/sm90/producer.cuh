// producer.cuh - the warp of fwd_sm90.cu that starts the copies of Q, K_j and V_j by TMA.
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
    int batch, first_value;

    __device__ __forceinline__ Boxes(const HopperParams& p, const WorkTile& w)
        : p(p),
          w(w),
          batch(VARLEN ? 0 : w.batch),
          first_value(VARLEN ? 0 : mask_of(p, w).row_begin(0)) {}  // row 0 of v_map
    __device__ __forceinline__ TileBox q() const {
        const int query = w.start_q + w.first_query;
        // All rows of a packed group's query come one after the other: heads before queries.
        if (PACK_GQA) return {&p.q_map, w.head * w.group, query, batch};
        return {&p.q_map, query, w.head, batch};
    }
    __device__ __forceinline__ TileBox k(int tile) const {
        return {&p.k_map, w.start_kv + tile * BLOCK_N, w.head_kv, batch};
    }
    __device__ __forceinline__ TileBox v(int tile) const {
        return {&p.v_map, w.start_kv + tile * BLOCK_N - first_value, w.head_kv, batch};
    }
};

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

// Starts the copies as stages become empty, for one work tile after the other.
__device__ __forceinline__ void load(const HopperParams& p, SharedStorage& smem) {
    StateKV kv;
    StateQ q;
    WorkState work;
    ClaimState claims;
#pragma unroll 1
    while (true) {
        const WorkTile& w = smem.work.tile[work.stage];
        if (is_end(w)) return;
        load_block(p, smem, w, q, kv);
        claims.release(smem.work.claims);
        claims.advance();
        warp_sync();  // all lanes have read the work tile before its stage is released
        work.release(smem.work.pipeline);
        work.advance();
        work.wait_full(smem.work.pipeline);
    }
}

}  // namespace flashcore
