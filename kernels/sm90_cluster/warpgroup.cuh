// warpgroup.cuh - one of the warpgroups of fwd_sm90_cluster.cu: what it has in registers, which
// rows and keys are its own, how its tiles are loaded. Its other methods are defined in the entry
// file, in softmax and in combine.
#pragma once
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/softmax/score_tile.cuh>
#include <flashcore/tile/tma_tile.cuh>
#include <sm90_cluster/traits.cuh>

namespace flashcore {

struct Warpgroup {
    const HopperParams& params;
    SharedStorage& smem;
    const Work& work;
    int rank;         // of the CTA in its cluster
    int index;        // of the warpgroup in its CTA
    TileRange tiles;  // that some row of the block sees
    // Where the rows' own columns of O go. Found while the first copies are on their way.
    T* output[2];
    RowState state[2];        // of this lane's rows: lane / 4 and lane / 4 + 8 of the warp's 16
    bool is_settled = false;  // m and l are over all keys
    float scale;              // of scores, to log2 units
    float to_common[2];       // then: the factors that O still needs
    // Element 4 n + 2 r + e is of row r: of S key 8 n + 2 (lane % 4) + e, of O that column.
    float rS[HALVES][KEYS / 2];
    uint32 rP[HALVES][STEPS][4];  // P as T, pair by pair: the A operand of 16 keys each
    float rO[HEAD_DIM_V / 2];

    // ---- where this thread is ------------------------------------------------------------------

    __device__ __forceinline__ static int thread() { return thread_index() % WARPGROUP_THREADS; }
    __device__ __forceinline__ static int lane() { return thread_index() % WARP_SIZE; }
    __device__ __forceinline__ static int row(int r) {
        return thread() / WARP_SIZE * 16 + r * 8 + lane() / QUAD;
    }
    __device__ __forceinline__ QueryRow query(int r) const {
        return query_row<false>(work, row(r));
    }
    __device__ __forceinline__ Positions mask() const {
        return {params, work.seqlen_kv, work.diagonal};
    }
    __device__ __forceinline__ GateRow<GATE> gate_row(const QueryRow& q) const {
        return gate_of<RULES, GATE>(params, work, q);
    }
    __device__ __forceinline__ RowRules<T, RULES> rules_for(const QueryRow& q) const {
        return rules_of<T, RULES>(params, work, q);
    }
    __device__ __forceinline__ void sync() const {
        named_barrier_sync(BARRIER_WARPGROUP + index, WARPGROUP_THREADS);
    }

    // ---- its tiles -----------------------------------------------------------------------------

    // The warpgroups of the cluster have every SPLITS-th tile, so that under a mask all have as
    // much to do.
    __device__ __forceinline__ int split() const { return rank * WARPGROUPS + index; }
    __device__ __forceinline__ int tile(int nth) const {
        return tiles.begin + split() + nth * SPLITS;
    }
    __device__ __forceinline__ bool has(int nth) const {
        return !(ONE_TILE && nth > 0) && tile(nth) < tiles.end;
    }
    // The first key of a half of a tile that this lane has.
    __device__ __forceinline__ static int first_key(int tile, int half) {
        return tile * BLOCK_N + half * KEYS + lane() % QUAD * 2;
    }
    // Whether positions hide some key of the tile from some row.
    __device__ __forceinline__ bool needs_mask(int tile) const {
        return mask().needs_mask(query_of<false>(work, 0), last_query_of<false>(work, BLOCK_M),
                                 tile * BLOCK_N, (tile + 1) * BLOCK_N);
    }

    // Starts the copies of the n-th tile, K before V. One warp does this.
    __device__ __forceinline__ void load_k(int nth) const {
        T* const sK = smem.sK[index][nth % NUM_STAGES];
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            const int first = tile(nth) * BLOCK_N + half * KEYS;
            const TileBox box = {&params.k_map, first, work.head_kv, work.batch};
            load_tile_tma<LayoutK, KEYS, KEYS>(sK + LayoutK::step(0, half * KEYS, 0),
                                               &smem.full_k[index][nth % NUM_STAGES][half], box,
                                               EVICT_LAST);
        }
    }
    __device__ __forceinline__ void load_v(int nth) const {
        const int first = tile(nth) * BLOCK_N - mask().row_begin(0);  // the map's first key
        const TileBox box = {&params.v_map, first, work.head_kv, work.batch};
        load_tile_tma<LayoutV, BLOCK_N>(smem.sV[index][nth % NUM_STAGES],
                                        &smem.full_v[index][nth % NUM_STAGES], box, EVICT_LAST);
    }
    // Waits for a part of the n-th tile by the barrier of that part in its stage.
    __device__ __forceinline__ static void wait_full(uint64& full, int nth) {
        mbarrier_wait(&full, nth / NUM_STAGES % 2);
    }

    // fwd_sm90_cluster.cu
    __device__ __forceinline__ void begin_loads() const;
    __device__ __forceinline__ void attend();
    __device__ __forceinline__ void attend_tile(int nth);

    // softmax.cuh
    __device__ __forceinline__ SeenExtent look_up_keys(int tile, Bits (&visible)[2]) const;
    template <bool MASKED>
    __device__ __forceinline__ void raise_by_half(int tile, int half, const Bits (&visible)[2],
                                                  float (&max)[2]);
    __device__ __forceinline__ void find_maxima(int tile, const Bits (&visible)[2],
                                                float (&max)[2]);
    __device__ __forceinline__ void exponentiate(int tile, int half, const float (&shift)[2]);
    __device__ __forceinline__ bool has_far_rows() const;
    __device__ __forceinline__ void attend_exactly();

    // combine.cuh
    __device__ __forceinline__ void find_output();
    __device__ __forceinline__ int neighbour(int place) const;
    __device__ __forceinline__ void give(int cta, float4& place, const float4& x, uint64& full);
    __device__ __forceinline__ void give_pair(InboxRows Inbox::* rows, float low, float high,
                                              uint64 (&full)[WARPGROUPS]);
    template <int SPLIT>
    __device__ __forceinline__ void give_output(float (&own)[OWN_COLS / 2]);
    __device__ __forceinline__ void arrive(uint64 (&full)[WARPGROUPS]);
    __device__ __forceinline__ void give_maxima();
    __device__ __forceinline__ void settle();
    __device__ __forceinline__ void exchange(float (&own)[OWN_COLS / 2]);
    __device__ __forceinline__ void finish(const float (&own)[OWN_COLS / 2]);
};

}  // namespace flashcore
