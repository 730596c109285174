// consumer.cuh - one of the warpgroups of fwd_sm90.cu that compute: what it has in registers, which
// rows are its own, and the two products. Its other methods are defined in the entry file and in
// unseen_keys, listed_tiles, softmax and epilogue.
#pragma once
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/rules/dropout.cuh>
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
    StateKV kv;  // the next stage of K and V
    StateQ q;
    WorkState work;
    bool takes_turns;  // in this block: see HAS_TURNS
    Bits visible[2];   // with masks: which of its keys of the tile each of the lane's rows sees
    Bits seen;         // which of these keys some row of the warp sees
    KeptBits<RULES, TILES_N> kept[2];  // with dropout: which of its rows' probabilities are kept
    int tiles_synced;                  // how often sync_seen_keys was called; chooses its buffer
    RowState state[2];  // of this lane's rows: lane / 4 and lane / 4 + 8 of the warp's 16
    // Of S and O, element 4 n + 2 half + e is of the lane's row `half` (0 or 1) and of column
    // 8 n + 2 (lane % 4) + e; the columns of S are keys.
    float rS[BLOCK_N / 2];
    uint32 rP[STEPS][4];  // P as T, two to a register: the A operand of 16 keys each
    float rO[HEAD_DIM_V / 2];

    // ---- where this thread is ------------------------------------------------------------------

    __device__ __forceinline__ const WorkTile& work_tile() const {
        return smem.work.tile[work.stage];
    }
    __device__ __forceinline__ Positions mask() const { return mask_of(params, work_tile()); }
    __device__ __forceinline__ static int lane() { return thread_index_volatile() % WARP_SIZE; }
    // The number of this warp among all consumers' warps, which have 16 rows each.
    __device__ __forceinline__ static int warp() {
        return thread_index_volatile() / WARP_SIZE - WARPGROUP_WARPS;
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
    // The first of the keys of the tile that this lane has.
    __device__ __forceinline__ static int first_key(int tile) {
        return tile * BLOCK_N + thread_index_volatile() % QUAD * 2;
    }
    // Whether positions hide some key of the tile from some row of the warpgroup.
    __device__ __forceinline__ bool needs_mask(int tile) const {
        const int first = query_of<PACK_GQA>(work_tile(), index * ROWS);
        const int last = last_query_of<PACK_GQA>(work_tile(), (index + 1) * ROWS);
        return mask().needs_mask(first, last, tile * BLOCK_N, (tile + 1) * BLOCK_N);
    }

    // ---- the products --------------------------------------------------------------------------

    // Starts S = Q K^T of the next tile when it is this warpgroup's turn.
    __device__ __forceinline__ void start_qk() {
        kv.wait_full(smem.k);
        wait_turn();
        wgmma_qk<LayoutQ, LayoutK>(rS, smem.sQ[q.stage] + LayoutQ::step(0, index * ROWS, 0),
                                   smem.sK[kv.stage]);
    }
    // Starts O += P V with the V of stage `v`, which is of tile `tile`.
    __device__ __forceinline__ void start_pv(const StateKV& v, int tile) {
        v.wait_full(smem.v);
        clear_unseen(tile, v.stage);
        wgmma_pv<LayoutV>(rO, rP, smem.sV[v.stage]);
    }
    // Waits for S, and releases K. PENDING = 1: P V, which was started after it, goes on.
    template <int PENDING>
    __device__ __forceinline__ void wait_qk() {
        wgmma_wait<PENDING>();
        fence_registers(rS);
        kv.release(smem.k);
    }
    // Waits for O, and releases V.
    __device__ __forceinline__ void wait_pv(const StateKV& v) {
        wgmma_wait<0>();
        fence_registers(rO);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) fence_registers(rP[step]);
        v.release(smem.v);
    }

    // Each consumer's turn is a barrier of two warpgroups: its own waits there, and the one before
    // it arrives there when it has started its products.
    __device__ __forceinline__ void wait_turn() const {
        if (HAS_TURNS && takes_turns)
            named_barrier_sync(BARRIER_TURN + index, 2 * WARPGROUP_THREADS);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (HAS_TURNS && takes_turns)
            named_barrier_arrive(BARRIER_TURN + (index + 1) % CONSUMERS, 2 * WARPGROUP_THREADS);
    }

    // fwd_sm90.cu
    __device__ __forceinline__ void run();
    __device__ __forceinline__ void attend_work_tiles();
    __device__ __forceinline__ void attend();
    __device__ __forceinline__ void attend_tiles(const TileRange& tiles);
    __device__ __forceinline__ void skip_tiles(int count);
    __device__ __forceinline__ void next_work_tile();

    // unseen_keys.cuh
    __device__ __forceinline__ void attend_seen_tiles(const TileRange& tiles);
    template <bool MASKED>
    __device__ __forceinline__ void look_up_keys(int tile);
    __device__ __forceinline__ void look_up_keys_of(int tile);
    __device__ __forceinline__ void clear_unseen(int tile, int stage);
    __device__ __forceinline__ SeenExtent sync_seen_keys();
    __device__ __forceinline__ void clear_unseen_together();

    // listed_tiles.cuh
    __device__ __forceinline__ void attend_listed_tiles(int left);
    __device__ __forceinline__ ListedTile wait_listed();
    __device__ __forceinline__ BlocksOfRow blocks_in(const ListedTile& at) const;
    __device__ __forceinline__ bool look_up_listed(const ListedTile& at);
    template <bool MASKED>
    __device__ __forceinline__ void look_up_blocks(const ListedTile& at);
    __device__ __forceinline__ void publish_seen();
    __device__ __forceinline__ void await_published() const;
    __device__ __forceinline__ void softmax_of_listed(const ListedTile& at, bool looked_up,
                                                      float (&factor)[2]);
    __device__ __forceinline__ void start_listed_pv(const StateKV& v, const ListedTile& at);
    __device__ __forceinline__ void skip_listed(const ListedTile& at);

    // softmax.cuh
    __device__ __forceinline__ void look_up_kept(int tile);
    __device__ __forceinline__ void softmax_of(int tile, float (&factor)[2]);
    template <bool MASKED, bool LOOKED_UP>
    __device__ __forceinline__ void find_maxima(int tile, float (&max)[2]);
    __device__ __forceinline__ void exponentiate(int tile, const float (&max)[2],
                                                 float (&factor)[2]);
    __device__ __forceinline__ void scale_output(const float (&factor)[2]);
    __device__ __forceinline__ bool has_far_rows() const;
    __device__ __forceinline__ void attend_exactly();

    // epilogue.cuh
    __device__ __forceinline__ float finish(RowState& row, const QueryRow& q,
                                            bool writes_lse) const;
    __device__ __forceinline__ T* output_row(const QueryRow& q) const;
    __device__ __forceinline__ void finish_rows(float (&factor)[2]) const;
    __device__ __forceinline__ auto output_box() const;
    __device__ __forceinline__ void store(const float (&factor)[2]);
    __device__ __forceinline__ void finish_split();
};

}  // namespace flashcore
