// tile_scheduler.cuh - the tile scheduler of a persistent kernel: one warp of each CTA claims
// blocks of rows from a counter in global memory, works out which rows and keys they are, and
// queues them as work tiles for the CTA's other warps.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/scheduler/work.cuh>

namespace flashcore {

struct WorkTile : Work {
    int block;        // the number of the block of rows among all blocks
    int first_query;  // the query of its row 0
    TileRange tiles;  // the tiles of keys that some of its rows see
};

// Whether this work tile says that there is no more work.
__device__ __forceinline__ bool is_end(const Work& w) { return w.first_row < 0; }

// In shared memory. Three work tiles at a time: one that consumers work on, one whose keys are
// being loaded, and one that is known ahead.
struct WorkQueue {
    static constexpr int STAGES = 3;
    static constexpr int CLAIMS = 2;
    Pipeline<STAGES> pipeline;
    WorkTile tile[STAGES];
    // loaded[i % CLAIMS] completes a phase when all copies of the CTA's i-th block are started.
    uint64 loaded[CLAIMS];

    // One thread does this. readers: the warps that release a work tile.
    __device__ __forceinline__ void init(int readers) {
        pipeline.init(1, readers);
        for (int i = 0; i < CLAIMS; ++i) mbarrier_init(&loaded[i], 1);
    }

    // The producer has started the copies of the block that `state` counts; all its lanes call it.
    __device__ __forceinline__ void arrive_loaded(const PipelineState<CLAIMS>& state) {
        if (elect_one()) mbarrier_arrive(&loaded[state.stage]);
    }
    // Waits until the copies of the block CLAIMS before the one that `state` counts have been
    // started; for the first CLAIMS blocks there is none, and it returns at once.
    __device__ __forceinline__ void wait_loaded(const PipelineState<CLAIMS>& state) {
        mbarrier_wait(&loaded[state.stage], state.parity ^ 1);
    }
};
using WorkState = PipelineState<WorkQueue::STAGES>;
using LoadedState = PipelineState<WorkQueue::CLAIMS>;

// Queues a work tile. One warp does this; all of its lanes have the tile.
__device__ __forceinline__ void push(WorkQueue& queue, WorkState& state, const WorkTile& tile) {
    state.wait_empty(queue.pipeline);
    if (elect_one()) {
        queue.tile[state.stage] = tile;
        mbarrier_arrive(&queue.pipeline.full[state.stage]);
    }
    state.advance();
}

// Claims the next block that no CTA has claimed yet and returns its number, or `blocks` if there is
// none. One warp does this. CTA i has block i from the start, so where there are no more blocks
// than CTAs, no CTA asks the counter. Otherwise each CTA asks it once per block that it has had,
// which is `blocks` times in all. The CTA with the last answer sets it back to 0 for the next
// launch.
__device__ __forceinline__ int claim_block(const AttentionParams& p, int blocks) {
    if (grid_size() >= blocks) return blocks;
    int claimed = 0;
    if (thread_index() % WARP_SIZE == 0) {
        claimed = atomic_add(&counters_of(p).claimed, 1);
        if (claimed == blocks - 1) counters_of(p).claimed = 0;
    }
    return min(int(grid_size()) + shfl(claimed, 0), blocks);
}

// How many splits the keys of a block of rows have.
template <bool SPLIT_KV, int CLUSTER>
__device__ __forceinline__ int splits_of(const AttentionParams& p) {
    return CLUSTER > 1 ? CLUSTER : SPLIT_KV ? p.splits : 1;
}

// The scheduling warp. What it has claimed no other CTA can do any more, so it claims at most one
// block ahead of the block that is being loaded.
template <int BLOCK_M, int BLOCK_N, typename Mask, bool LAST_FIRST, bool VARLEN, bool PACK_GQA,
          bool SPLIT_KV, int CLUSTER>
struct TileScheduler {
    const AttentionParams& params;
    int blocks;   // blocks of rows, times the splits of their keys
    int claimed;  // the block that was claimed last
    WorkTile next;

    __device__ __forceinline__ explicit TileScheduler(const AttentionParams& p)
        : params(p),
          blocks((VARLEN ? 1 : p.batch) * (PACK_GQA ? p.heads_kv : p.heads_q) * p.m_blocks *
                 splits_of<SPLIT_KV, CLUSTER>(p)),
          claimed(block_index()) {}

    // Finds the first work tile, while another warp makes the barriers. The block_sync that follows
    // shows it to all warps.
    __device__ __forceinline__ void begin(WorkQueue& queue) {
        find();
        if (elect_one()) queue.tile[0] = next;
    }

    __device__ __forceinline__ void run(WorkQueue& queue) {
        WorkState state;
        LoadedState loaded;
        if (elect_one()) mbarrier_arrive(&queue.pipeline.full[0]);  // the tile that begin() found
        state.advance();
        loaded.advance();
#pragma unroll 1
        while (!is_end(next)) {
            queue.wait_loaded(loaded);
            loaded.advance();
            claimed = claim_block(params, blocks);
            find();
            push(queue, state, next);
        }
    }

  private:
    // Works out `next`, the work tile of the claimed block. While that has no rows, claims another.
    __device__ __forceinline__ void find() {
        for (; claimed < blocks; claimed = claim_block(params, blocks)) {
            // The CTAs of a cluster have the splits of the same rows.
            const BlockSplit which = CLUSTER > 1 ? BlockSplit{claimed / CLUSTER, claimed % CLUSTER}
                                     : SPLIT_KV  ? block_split(claimed, blocks / params.splits)
                                                 : BlockSplit{claimed, 0};
            if (!find_work<LAST_FIRST, VARLEN, PACK_GQA>(params, BLOCK_M, next, which)) continue;
            const Mask mask(params, next.seqlen_kv, next.diagonal);
            next.block = which.block;
            next.first_query = query_of<PACK_GQA>(next, 0);
            next.tiles = visible_tiles<BLOCK_N, PACK_GQA>(next, mask, 0, BLOCK_M,
                                                          splits_of<SPLIT_KV, CLUSTER>(params));
            return;
        }
        next.first_row = -1;
    }
};

}  // namespace flashcore
