// fwd_sm90.cu - forward attention for Hopper: TMA brings the tiles, wgmma multiplies them, and a
// warpgroup's softmax runs while its tensor cores work (FlashAttention-3, Shah et al. 2024).
//
//   O = softmax(rules(softmax_scale * Q K^T)) V,  LSE = log sum exp
//
// A CTA owns BLOCK_M rows of one head at a time and walks over the keys from the last visible ones
// to the first, BLOCK_N at a time. A row is a query; with PACK_GQA the query heads that share a
// head of K and V are rows side by side. The CTA's warpgroups have roles:
//
//   warpgroup 0    warp 0, the producer, starts the copies of Q, K_j, V_j as stages become empty
//                  (sm90/producer.cuh); warp 1 is the tile scheduler, which claims blocks of rows
//                  (flashcore/scheduler/tile_scheduler.cuh)
//   warpgroups 1.. the consumers (sm90/consumer.cuh): 64 rows each; m, l, O and the scores stay in
//                  their registers
//
// A consumer's step j, while the copies of NUM_STAGES tiles of K and V are in flight:
//
//   S_j = Q K_j^T            wgmma starts, both operands in shared memory
//   O  += P_{j-1} V_{j-1}    wgmma starts, P in registers
//   wait for S_j             rules, mask, m, p = exp2(S_j - m) while P V is still running
//   wait for O               O *= exp2(m_old - m); P_j replaces P_{j-1} in its registers
//
//   tensor cores  | S_j    | P_{j-1} V_{j-1} |                 | S_{j+1} | P_j V_j | ...
//   this warpgroup|        | softmax of S_j  | pack P, scale O |         | softmax of S_{j+1} ...
//
// The kernel is persistent: there are as many CTAs as multiprocessors. Each CTA claims blocks of
// rows until none is left, the longest first, and loads for the next block while it finishes the
// last one. With SPLIT_KV the keys of a block of rows are split, and each split is claimed by
// itself; their partials are combined at the end (flashcore/output/split_combine.cuh). With
// CLUSTER > 1 the CTAs of a cluster have one split each, of the same block of rows.
//
// Shared memory (SharedStorage in sm90/traits.cuh):
//   | sQ, Q_STAGES tiles | sK, NUM_STAGES tiles | sV, NUM_STAGES tiles | sO | barriers, work |
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/tile/tma_tile.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90/consumer.cuh>
#include <sm90/epilogue.cuh>
#include <sm90/listed_tiles.cuh>
#include <sm90/producer.cuh>
#include <sm90/softmax.cuh>
#include <sm90/traits.cuh>
#include <sm90/unseen_keys.cuh>

namespace flashcore {

// ---- the main loop: a consumer and the tiles of keys that its rows see -------------------------

// Software-pipelined: S of a tile is started before P V of the tile before it. Both are in flight
// then, and the softmax of S runs during P V. The first S, before the loop, and the last P V, after
// it, have nothing to overlap with. The loop is not unrolled: S, P and O of one step fill the
// registers.
__device__ __forceinline__ void Consumer::attend_tiles(const TileRange& tiles) {
    float factor[2];
    start_qk();
    pass_turn();
    look_up_kept(tiles.end - 1);
    wait_qk<0>();
    softmax_of(tiles.end - 1, factor);
    pack_p<T>(rP, rS);
#pragma unroll 1
    for (int tile = tiles.end - 2; tile >= tiles.begin; --tile) {
        const StateKV previous = kv;
        kv.advance();
        start_qk();
        start_pv(previous, tile + 1);
        pass_turn();
        look_up_kept(tile);
        wait_qk<1>();  // P V may still run
        softmax_of(tile, factor);
        wait_pv(previous);  // P V has read rP and written rO
        pack_p<T>(rP, rS);
        scale_output(factor);
    }
    // Nothing reads Q any more: the next block's may arrive during the last P V and the epilogue.
    q.release(smem.q);
    start_pv(kv, tiles.begin);
    wait_pv(kv);
    kv.advance();
}

// ---- a block of rows ---------------------------------------------------------------------------

// Skips tiles that only other consumers need. Stages are released when all consumers have, so this
// one releases them, too; and it takes and passes its turns, which the others count on.
__device__ __forceinline__ void Consumer::skip_tiles(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
        kv.wait_full(smem.k);
        kv.release(smem.k);
        wait_turn();
        pass_turn();
        kv.wait_full(smem.v);
        kv.release(smem.v);
        kv.advance();
    }
}

__device__ __forceinline__ void Consumer::attend() {
    const TileRange all = work_tile().tiles, mine = tiles_of(params, work_tile(), index);
    takes_turns = all.end - all.begin > SHORT_BLOCK;
    state[0] = state[1] = RowState();
#pragma unroll
    for (int e = 0; e < HEAD_DIM_V / 2; ++e) rO[e] = 0.0f;
    if (mine.end == 0) {  // its rows see no key
        skip_tiles(all.end - all.begin);
        if (all.end > 0) q.release(smem.q);
    } else {
        q.wait_full(smem.q);
        skip_tiles(all.end - mine.end);
        if constexpr (LISTED) {
            attend_listed_tiles(mine.end);
        } else if constexpr (HIDES_KEYS) {
            attend_seen_tiles(mine);
        } else {
            attend_tiles(mine);
        }
        skip_tiles(mine.begin - all.begin);
    }
    if (all.end > 0) q.advance();
}

// ---- all work of a consumer --------------------------------------------------------------------

// Hands the work tile's stage back to the tile scheduler, and waits for the next one.
__device__ __forceinline__ void Consumer::next_work_tile() {
    warp_sync();  // all lanes have read the work tile before its stage is released
    work.release(smem.work.pipeline);
    work.advance();
    work.wait_full(smem.work.pipeline);
}

// Works on blocks of rows until there are none, or until one has rows that have to be computed
// again.
__device__ __forceinline__ void Consumer::attend_work_tiles() {
#pragma unroll 1
    for (; !is_end(work_tile()); next_work_tile()) {
        attend();
        if (SPLIT_KV && has_far_rows()) attend_exactly();
        if (SPLIT_KV && params.splits > 1) {
            finish_split();
            continue;
        }
        const bool again = !SPLIT_KV && has_far_rows();
        float factor[2];
        finish_rows(factor);
        if (again) return;
        store(factor);
    }
}

// Computing rows again stands in a loop of its own: inside the main loop's it would take registers
// that the main loop needs.
__device__ __forceinline__ void Consumer::run() {
    takes_turns = true;  // for the pass_turn below
    tiles_synced = 0;
    if (index == CONSUMERS - 1) pass_turn();  // the first consumer has the first turn
#pragma unroll 1
    for (attend_work_tiles(); !SPLIT_KV && !is_end(work_tile()); attend_work_tiles()) {
        float factor[2];
        attend_exactly();
        finish_rows(factor);
        store(factor);
        next_work_tile();
    }
    if (STAGED_COLS > 0) await_stored();  // shared memory must outlive TMA's reads
}

// ---- roles -------------------------------------------------------------------------------------

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(CTA_THREADS, MIN_BLOCKS)
    fwd_sm90(const __grid_constant__ HopperParams params) {
    // The swizzle of TMA and wgmma depends on the address modulo 1024, so tiles begin on multiples
    // of that. A launch promises less; SMEM_BYTES has 1 KiB to spare for it.
    char* const smem_raw = dynamic_shared<1>();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(
        smem_raw + (1024 - shared_address(smem_raw) % 1024) % 1024);
    const int warp = shfl(int(thread_index() / WARP_SIZE), 0);
    Scheduler scheduler(params);
    // To find the first work tile, to make the barriers and to fetch the tensor maps takes half a
    // microsecond each, so three warps do it side by side.
    if (warp == 1) scheduler.begin(smem.work);
    if (thread_index() == 2 * WARP_SIZE) {
        smem.q.init(1, CONSUMER_WARPS);
        smem.k.init(1, CONSUMER_WARPS);
        smem.v.init(1, CONSUMER_WARPS);
        smem.work.init(CONSUMER_WARPS + 1);  // and the producer
        if constexpr (LISTED) init_listed(smem);
        fence_mbarrier_init();  // TMA sees the new barriers
    }
    if (thread_index() == 3 * WARP_SIZE) {
        prefetch_tensormap(&params.k_map);
        prefetch_tensormap(&params.q_map);
        prefetch_tensormap(&params.v_map);
    }
    block_sync();  // all warps see the barriers and the first work tile
    const int warpgroup = warp / WARPGROUP_WARPS;
    if (warpgroup == 0) {
        if constexpr (MOVES_REGISTERS) registers_dec<PRODUCER_REGISTERS>();
        if (warp == 0) run_producer(params, smem);
        if (warp == 1) scheduler.run(smem.work);
    } else {
        if constexpr (MOVES_REGISTERS) registers_inc<CONSUMER_REGISTERS>();
        Consumer consumer = {params, smem, warpgroup - 1};
        consumer.run();
    }
}

}  // namespace flashcore
