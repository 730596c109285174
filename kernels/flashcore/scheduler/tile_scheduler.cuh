// tile_scheduler.cuh - what the CTAs of a persistent kernel do next. One warp of each CTA claims
// blocks of rows, finds out what they are, and hands them, as work tiles, to the warps that
// compute.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/scheduler/schedule.cuh>

namespace flashcore {

struct WorkTile : Work {
    int block;        // the number of the block of rows, among all blocks
    int first_query;  // the query of row 0
    TileRange tiles;  // the tiles of keys that some row sees
};

// Whether this tile says that there is no more work.
__device__ __forceinline__ bool is_end(const Work& w) { return w.first_row < 0; }

// In shared memory: the work tiles that are worked on, loaded for, and known ahead.
struct WorkQueue {
    static constexpr int STAGES = 3;
    Pipeline<STAGES> pipeline;
    WorkTile tile[STAGES];
    // A block has a stage from its claim until all its copies have been started. Nobody waits for
    // `full`.
    Pipeline<2> claims;
};
using WorkState = PipelineState<WorkQueue::STAGES>;
using ClaimState = PipelineState<2>;

// One warp does this; all of its lanes have the tile.
__device__ __forceinline__ void push(WorkQueue& queue, WorkState& state, const WorkTile& tile) {
    state.wait_empty(queue.pipeline);
    if (elect_one()) {
        queue.tile[state.stage] = tile;
        mbarrier_arrive(&queue.pipeline.full[state.stage]);
    }
    state.advance();
}

// Claims the next block that no CTA has claimed yet, and returns its number; returns `blocks` if
// there is none. One warp does this. The first grid_size() blocks are claimed by the launch: CTA i
// has block i. If these are all blocks, no CTA asks. Otherwise all CTAs together ask `blocks`
// times, once for each block that they have worked on; the one that gets the last answer sets the
// counter back to 0 for the next launch.
__device__ __forceinline__ int claim_block(const AttentionParams& p, int blocks) {
    if (grid_size() >= blocks) return blocks;
    int claimed = 0;
    if (thread_index() % WARP_SIZE == 0) {
        claimed = atomic_add(&counters_of(p).claimed, 1);
        if (claimed == blocks - 1) counters_of(p).claimed = 0;
    }
    return min(int(grid_size()) + shfl(claimed, 0), blocks);
}

// Into how many parts the keys of a block of rows are split.
template <bool SPLIT_KV, int CLUSTER>
__device__ __forceinline__ int parts_of_keys(const AttentionParams& p) {
    return CLUSTER > 1 ? CLUSTER : SPLIT_KV ? p.splits : 1;
}

// The warp that finds the work. No other CTA can do what it has claimed, so it claims no more than
// one block ahead of the block that is being loaded.
template <int BLOCK_M, int BLOCK_N, typename Mask, bool LAST_FIRST, bool VARLEN, bool PACK_GQA,
          bool SPLIT_KV, int CLUSTER>
struct TileScheduler {
    const AttentionParams& params;
    int blocks;   // blocks of rows, times the parts of their keys
    int claimed;  // the block that was claimed last
    WorkTile next;

    __device__ __forceinline__ explicit TileScheduler(const AttentionParams& p)
        : params(p),
          blocks((VARLEN ? 1 : p.batch) * (PACK_GQA ? p.heads_kv : p.heads_q) * p.m_blocks *
                 parts_of_keys<SPLIT_KV, CLUSTER>(p)),
          claimed(block_index()) {}

    // Runs while another warp makes the barriers: the block barrier after it publishes the first
    // tile.
    __device__ __forceinline__ void begin(WorkQueue& queue) {
        find();
        if (elect_one()) queue.tile[0] = next;
    }

    __device__ __forceinline__ void run(WorkQueue& queue) {
        WorkState state;
        ClaimState claims;
        if (elect_one()) mbarrier_arrive(&queue.pipeline.full[0]);
        state.advance();
        claims.advance();
#pragma unroll 1
        while (!is_end(next)) {
            claims.wait_empty(queue.claims);
            claims.advance();
            claimed = claim_block(params, blocks);
            find();
            push(queue, state, next);
        }
    }

  private:
    // Makes `next` of the claimed block. If that has no rows, claims others until one has some.
    __device__ __forceinline__ void find() {
        for (; claimed < blocks; claimed = claim_block(params, blocks)) {
            // The CTAs of a cluster have the parts of the same rows.
            const BlockPart part = CLUSTER > 1 ? BlockPart{claimed / CLUSTER, claimed % CLUSTER}
                                   : SPLIT_KV  ? block_part(claimed, blocks / params.splits)
                                               : BlockPart{claimed, 0};
            if (!find_work<LAST_FIRST, VARLEN, PACK_GQA>(params, BLOCK_M, next, part)) continue;
            const Mask mask(params, next.seqlen_kv, next.diagonal);
            next.block = part.block;
            next.first_query = query_of<PACK_GQA>(next, 0);
            next.tiles = tiles_seen<BLOCK_N, PACK_GQA>(next, mask, 0, BLOCK_M,
                                                       parts_of_keys<SPLIT_KV, CLUSTER>(params));
            return;
        }
        next.first_row = -1;
    }
};

}  // namespace flashcore
