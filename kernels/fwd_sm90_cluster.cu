// fwd_sm90_cluster.cu - forward attention for Hopper where there are few queries and few keys: all
// that a block of rows needs is asked for at once, and its keys are split over a cluster.
//
//   O = softmax(rules(softmax_scale * Q K^T)) V,  LSE = log sum exp
//
// A cluster of one CTA, or of two, owns 64 rows of one head, and each of its warpgroups every
// SPLITS-th tile of the keys. There is no producer and no scheduler: one warp of each warpgroup
// starts its copies in its first instructions, so that NUM_STAGES tiles are in flight before
// anybody waits. All that comes before that overlaps with the launch before, where that one allows
// it. What a warpgroup does with a tile, in two halves of its keys:
//
//   tensor cores   | S_0 | S_1 |                          | P_0 V_0 | P_1 V_1 |
//   the warpgroup  |     | max of S_0 | of S_1 | exp of S_0 | exp of S_1 |
//
// The warpgroups of a CTA are at different points of this, so the softmax of one runs during the
// products of another. In the end they combine their partials (sm90_cluster/combine.cuh), as flash
// decoding does (Dao et al. 2023), but on the chip.
//
// Shared memory (SharedStorage in sm90_cluster/traits.cuh):
//   | sQ | sK, NUM_STAGES tiles each | sV, NUM_STAGES tiles each | what others give | barriers |
#include <config.cuh>
#include <flashcore/ptx/cluster.cuh>
#include <flashcore/ptx/launches.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/tile/tma_tile.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_cluster/combine.cuh>
#include <sm90_cluster/softmax.cuh>
#include <sm90_cluster/traits.cuh>
#include <sm90_cluster/warpgroup.cuh>

namespace flashcore {

// ---- the main loop: one tile of keys -----------------------------------------------------------

__device__ __forceinline__ void Warpgroup::attend_tile(int nth) {
    const int tile = this->tile(nth), stage = nth % NUM_STAGES;
    const T* const sK = smem.sK[index][stage];
    T* const sV = smem.sV[index][stage];
    Bits visible[2];
    const SeenExtent extent = look_up_keys(tile, visible);

    if (nth == 0) mbarrier_wait(&smem.full_q, 0);
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        wait_full(smem.full_k[index][stage][half], nth);
        wgmma_qk<LayoutQ, LayoutK>(rS[half], smem.sQ, sK + LayoutK::step(0, half * KEYS, 0));
    }

    float max[2], shift[2];
    find_maxima(tile, visible, max);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        shift[r] = shift_of(max[r], scale);
        const float factor = raise_max(state[r], max[r], shift[r], scale);
        gate_row(query(r)).quad_tile_max(tile, max[r] * natural_scale<RULES>(params));
#pragma unroll
        for (int n = 0; nth > 0 && n < HEAD_DIM_V / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) rO[4 * n + 2 * r + e] *= factor;
    }
    // A warp gives its maxima as soon as they are final; not yet if it computes rows again.
    const bool is_final = !has(nth + 1) && !has_far_rows();
    if (is_final) give_maxima();
    exponentiate(tile, 0, shift);
    wait_full(smem.full_v[index][stage], nth);
    if (!extent.all) {
        smem.seen[index].template clear_unseen<LayoutV, WARPGROUP_WARPS>(sV, thread() / WARP_SIZE);
        fence_proxy_async();  // wgmma sees this thread's zeros
        sync();               // all warps have written theirs
    }
    wgmma_pv<LayoutV>(rO, rP[0], sV);
    if constexpr (HALVES == 2) {
        exponentiate(tile, 1, shift);
        wgmma_pv<LayoutV>(rO, rP[1], sV + LayoutV::step(0, KEYS, 0));
    }
    if (is_final) settle();  // while the tensor cores work
    wgmma_wait<0>();
    fence_registers(rO);
}

__device__ __forceinline__ void Warpgroup::attend() {
#pragma unroll
    for (int e = 0; e < HEAD_DIM_V / 2; ++e) rO[e] = 0.0f;
    if constexpr (ONE_TILE) {
        if (has(0)) attend_tile(0);
    }
#pragma unroll 1
    for (int nth = 0; !ONE_TILE && has(nth); ++nth) {
        attend_tile(nth);
        if (has(nth + NUM_STAGES)) {
            sync();  // all warps have read the stage
            if (thread() < WARP_SIZE) {
                load_k(nth + NUM_STAGES);
                load_v(nth + NUM_STAGES);
            }
        }
    }
    if (is_settled) return;
    if (has_far_rows()) attend_exactly();
    give_maxima();
    settle();
}

// ---- the first copies --------------------------------------------------------------------------

// Fetches the maps and makes the barriers of what warpgroup `index` loads. One warp does this.
__device__ __forceinline__ void make_barriers(const HopperParams& params, SharedStorage& smem,
                                              int index) {
    if (elect_one()) {
        prefetch_tensormap(&params.q_map);
        prefetch_tensormap(&params.k_map);
        prefetch_tensormap(&params.v_map);
        if (index == 0) mbarrier_init(&smem.full_q, 1);
#pragma unroll
        for (int stage = 0; stage < NUM_STAGES; ++stage) {
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
                mbarrier_init(&smem.full_k[index][stage][half], 1);
            mbarrier_init(&smem.full_v[index][stage], 1);
        }
        if (SPLITS > 1) {
            mbarrier_init(&smem.full_max[index], GIVING_ARRIVALS);
            mbarrier_init(&smem.full_o[index], GIVING_ARRIVALS);
        }
        fence_mbarrier_init();  // TMA and the peer see the new barriers
    }
}

// Starts the warpgroup's first copies. The same warp does this.
__device__ __forceinline__ void Warpgroup::begin_loads() const {
    if (index == 0 && has(0))  // the first warpgroup has the first tile of the CTA
        load_tile_tma<LayoutQ, BLOCK_M>(
            smem.sQ, &smem.full_q, TileBox{&params.q_map, work.first_row, work.head, work.batch},
            EVICT_FIRST);
    if (has(0)) load_k(0);
#pragma unroll 1
    for (int nth = 0; nth < NUM_STAGES && has(nth); ++nth) {
        if (nth > 0) load_k(nth);
        load_v(nth);
    }
    if (CLUSTER > 1 && elect_one()) {
        mbarrier_arrive_expect_tx(&smem.full_max[index], PEER_MAX_BYTES);
        mbarrier_arrive_expect_tx(&smem.full_o[index], PEER_O_BYTES);
    }
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    fwd_sm90_cluster(const __grid_constant__ HopperParams params) {
    griddepcontrol_launch_dependents();  // a launch behind this one need not wait to set itself up
    SharedStorage& smem =
        *reinterpret_cast<SharedStorage*>(dynamic_shared<alignof(SharedStorage)>());
    const int warp = shfl(int(thread_index() / WARP_SIZE), 0);
    if (warp % WARPGROUP_WARPS == 0) make_barriers(params, smem, warp / WARPGROUP_WARPS);
    const int block = block_index() / CLUSTER, rank = block_index() % CLUSTER;
    Work work;
    find_work<BOUNDED_RIGHT, VARLEN, PACK_GQA>(params, BLOCK_M, work, BlockSplit{block, rank});
    Warpgroup group = {params, smem, work, rank, warp / WARPGROUP_WARPS};
    group.tiles = visible_tiles<BLOCK_N, PACK_GQA>(work, group.mask(), 0, BLOCK_M, 1);
    group.scale = exponent_scale<RULES>(params);
    griddepcontrol_wait();  // what earlier launches write is there, and what they read is free
    if (warp % WARPGROUP_WARPS == 0) group.begin_loads();
    block_sync();  // all warps see the barriers
    // Only the peer's barriers have to be there when they are needed; their init is fenced already.
    if (CLUSTER > 1) cluster_arrive_relaxed();
    group.find_output();
    if (CLUSTER > 1) cluster_wait();
    group.attend();
    float own[OWN_COLS / 2];
    group.exchange(own);
    group.finish(own);
}

}  // namespace flashcore
