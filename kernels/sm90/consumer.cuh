// consumer.cuh - one of the warpgroups of fwd_sm90.cu that compute: what it has in registers, where
// its rows are, and the two products. What else it does is defined in the entry file and in masks,
// softmax and epilogue.
#pragma once
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/scheduler/tile_scheduler.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/softmax/score_tile.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90/traits.cuh>

namespace flashcore {

struct Consumer {
    const HopperParams& params;
    SharedStorage& smem;
    int index;   // of the warpgroup among the consumers
    StateKV kv;  // the next tile of K and V
    StateQ q;
    WorkState work;
    bool takes_turns;
    Bits visible[2];    // which keys of the tile masks leave to each of the lane's rows
    Bits seen;          // which keys some row of the warp sees
    int tiles_synced;   // how often sync_seen_keys was called
    RowState state[2];  // of this lane's rows: lane / 4 and lane / 4 + 8 of the warp's 16
    // Element 4 n + 2 half + e is of row `half`: of S key 8 n + 2 (lane % 4) + e, of O that column.
    float rS[BLOCK_N / 2];
    uint32 rP[STEPS][4];  // P as T, pair by pair: the A operand of 16 keys each
    float rO[HEAD_DIM_V / 2];

    // ---- where this thread is ------------------------------------------------------------------

    __device__ __forceinline__ const WorkTile& work_tile() const {
        return smem.work.tile[work.stage];
    }
    __device__ __forceinline__ PositionMask mask() const { return mask_of(params, work_tile()); }
    __device__ __forceinline__ static int lane() { return thread_index_anew() % WARP_SIZE; }
    __device__ __forceinline__ static int warp() {  // among all consumers' warps, 16 rows each
        return thread_index_anew() / WARP_SIZE - WARPGROUP / WARP_SIZE;
    }
    __device__ __forceinline__ static int row(int half) {
        return warp() * 16 + half * 8 + lane() / QUAD;
    }
    __device__ __forceinline__ QueryRow query(int half) const {
        return query_row<PACK_GQA>(work_tile(), row(half));
    }
    __device__ __forceinline__ GateRow<GATE> gate_row(const QueryRow& q) const {
        return gate_of<RULES, GATE>(params, work_tile(), q);
    }
    __device__ __forceinline__ RowRules<T, RULES> rules_for(const QueryRow& q) const {
        return rules_of<T, RULES>(params, work_tile(), q);
    }
    // The first key of the tile that this lane has.
    __device__ __forceinline__ static int first_key(int tile) {
        return tile * BLOCK_N + thread_index_anew() % QUAD * 2;
    }
    // Whether some row of the warpgroup misses some key of the tile by its position.
    __device__ __forceinline__ bool needs_mask(int tile) const {
        const int first = query_of<PACK_GQA>(work_tile(), index * ROWS);
        const int last = last_query_of<PACK_GQA>(work_tile(), (index + 1) * ROWS);
        return mask().needs_mask(first, last, tile * BLOCK_N, (tile + 1) * BLOCK_N);
    }

    // ---- the products --------------------------------------------------------------------------

    // Starts S = Q K^T of the next tile when it is this warpgroup's turn.
    __device__ __forceinline__ void begin_scores() {
        kv.wait_full(smem.k);
        wait_turn();
        start_scores<LayoutQ, LayoutK>(rS, smem.sQ[q.stage] + LayoutQ::step(0, index * ROWS, 0),
                                       smem.sK[kv.stage]);
    }
    __device__ __forceinline__ void begin_output(const StateKV& of, int tile) {
        of.wait_full(smem.v);
        clear_unseen(tile, of.stage);
        start_output<LayoutV>(rO, rP, smem.sV[of.stage]);
    }
    // Waits for S. PENDING = 1: the product with V, which was started after it, goes on.
    template <int PENDING>
    __device__ __forceinline__ void end_scores() {
        wgmma_wait<PENDING>();
        fence_registers(rS);
        kv.release(smem.k);
    }
    __device__ __forceinline__ void end_output(const StateKV& of) {
        wgmma_wait<0>();
        fence_registers(rO);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) fence_registers(rP[step]);
        of.release(smem.v);
    }

    // Two warpgroups meet at a turn's barrier: one waits for its turn, the other passes it on.
    __device__ __forceinline__ void wait_turn() const {
        if (HAS_TURNS && takes_turns) named_barrier_sync(BARRIER_TURN + index, 2 * WARPGROUP);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (HAS_TURNS && takes_turns)
            named_barrier_arrive(BARRIER_TURN + (index + 1) % CONSUMERS, 2 * WARPGROUP);
    }

    // fwd_sm90.cu
    __device__ __forceinline__ void run();
    __device__ __forceinline__ void attend_work_tiles();
    __device__ __forceinline__ void attend();
    __device__ __forceinline__ void attend_tiles(const TileRange& tiles);
    __device__ __forceinline__ void skip_tiles(int count);
    __device__ __forceinline__ void next_work_tile();

    // masks.cuh
    __device__ __forceinline__ void attend_seen_tiles(const TileRange& tiles);
    template <bool MASKED>
    __device__ __forceinline__ void look_up_keys(int tile);
    __device__ __forceinline__ void look_up_keys_of(int tile);
    __device__ __forceinline__ void clear_unseen(int tile, int stage);
    __device__ __forceinline__ SeenExtent sync_seen_keys();
    __device__ __forceinline__ void clear_unseen_together();

    // softmax.cuh
    __device__ __forceinline__ void softmax_of(int tile, float (&factor)[2]);
    template <bool MASKED>
    __device__ __forceinline__ void find_maxima(int tile, float (&max)[2]);
    __device__ __forceinline__ void exponentiate(int tile, const float (&max)[2],
                                                 float (&factor)[2]);
    __device__ __forceinline__ void scale_output(const float (&factor)[2]);
    __device__ __forceinline__ bool has_far_rows() const;
    __device__ __forceinline__ void attend_exactly();

    // epilogue.cuh
    __device__ __forceinline__ float finish_row(RowState& row, const QueryRow& q,
                                                bool writes_lse) const;
    __device__ __forceinline__ T* output_row(const QueryRow& q) const;
    __device__ __forceinline__ void finish_rows(float (&factor)[2]) const;
    __device__ __forceinline__ void store(const float (&factor)[2]);
    __device__ __forceinline__ void finish_part();
};

}  // namespace flashcore
