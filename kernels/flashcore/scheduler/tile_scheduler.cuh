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
    TileRange tiles;  // the tiles of keys that some of its rows see; with lists: places in its list
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
    WorkTile next;  // what the scheduler works out; it has no registers for that
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

// Claims the next block that no CTA has claimed yet and returns its number, or `blocks` or more if
// there is none. One warp does this. CTA i has block i from the start, so where there are no more
// blocks than CTAs, no CTA asks the counter. Otherwise each CTA asks it once per block that it has
// had.
__device__ __forceinline__ int claim_block(const AttentionParams& p, int blocks) {
    if (grid_size() >= blocks) return blocks;
    int claimed = 0;
    if (thread_index() % WARP_SIZE == 0) claimed = atomic_add(&counters_of(p).claimed, 1);
    return int(grid_size()) + shfl(claimed, 0);
}

// Each CTA calls it with its last answer, for which there was no block. CTAs have asked `blocks`
// times in all, where that is how many blocks there are; the one with the last answer sets the
// counter back to 0 for the next launch.
__device__ __forceinline__ void end_claims(const AttentionParams& p, int claimed, int blocks) {
    if (claimed - int(grid_size()) == blocks - 1 && thread_index() % WARP_SIZE == 0)
        counters_of(p).claimed = 0;
}

// How many splits the keys of a block of rows have.
template <bool SPLIT_KV, int CLUSTER>
__device__ __forceinline__ int splits_of(const AttentionParams& p) {
    return CLUSTER > 1 ? CLUSTER : SPLIT_KV ? p.splits : 1;
}

// The scheduling warp. What it has claimed no other CTA can do any more, so it claims at most one
// block ahead of the block that is being loaded.
template <int BLOCK_M, int BLOCK_N, typename Mask, bool LAST_FIRST, bool VARLEN, bool PACK_GQA,
          bool SPLIT_KV, int CLUSTER, bool LISTED = false>
struct TileScheduler {
    // Splits are for few blocks, which all run at once in any order.
    static constexpr bool SORTED = VARLEN && !SPLIT_KV;

    const AttentionParams& params;
    int blocks;   // blocks of rows, times the splits of their keys; packed batches: at most
    int claimed;  // the block that was claimed last
    bool more;    // whether it is there
    PackedOrder order;

    __device__ __forceinline__ explicit TileScheduler(const AttentionParams& p)
        : params(p),
          blocks((VARLEN ? 1 : p.batch) * (PACK_GQA ? p.heads_kv : p.heads_q) * p.m_blocks *
                 splits_of<SPLIT_KV, CLUSTER>(p)),
          claimed(block_index()),
          more(true),
          order{packed_queries(p, PACK_GQA ? p.group : 1, BLOCK_M), packed_keys(p),
                PACK_GQA ? p.heads_kv : p.heads_q, blocks, BLOCK_N} {}

    // Finds the first work tile, while another warp makes the barriers. The block_sync that follows
    // shows it to all warps.
    __device__ __forceinline__ void begin(WorkQueue& queue) { more = find(queue.tile[0]); }

    __device__ __forceinline__ void run(WorkQueue& queue) {
        WorkState state;
        LoadedState loaded;
        if (elect_one()) mbarrier_arrive(&queue.pipeline.full[0]);  // the tile that begin() found
        state.advance();
        loaded.advance();
#pragma unroll 1
        while (more) {
            queue.wait_loaded(loaded);
            loaded.advance();
            claimed = claim_block(params, blocks);
            more = find(queue.next);
            warp_sync();  // all lanes have written it
            push(queue, state, queue.next);
            warp_sync();  // the lane that pushed has read it
        }
    }

  private:
    // Works out the work tile of the claimed block; returns false if that is the one that says that
    // there is no more. All lanes write the same.
    __device__ __forceinline__ bool find(WorkTile& next) {
        for (; claimed < blocks; claimed = claim_block(params, blocks)) {
            // The CTAs of a cluster have the splits of the same rows.
            const BlockSplit which = CLUSTER > 1 ? BlockSplit{claimed / CLUSTER, claimed % CLUSTER}
                                     : SPLIT_KV  ? block_split(claimed, blocks / params.splits)
                                                 : BlockSplit{claimed, 0};
            if (!find_rows(which, next)) {
                if (SORTED) break;  // fewer blocks than the host knows
                continue;
            }
            const Mask mask(params, next.seqlen_kv, next.diagonal);
            next.block = which.block;
            next.first_query = query_of<PACK_GQA>(next, 0);
            if constexpr (LISTED) {
                next.tiles = {0, TileLists(params).count(list_of(params, next))};
                return true;
            }
            next.tiles = visible_tiles<BLOCK_N, PACK_GQA>(next, mask, 0, BLOCK_M,
                                                          splits_of<SPLIT_KV, CLUSTER>(params));
            return true;
        }
        WorkTile end = {};
        end.first_row = -1;
        next = end;
        if (grid_size() >= blocks) return false;  // no CTA has asked
        if (SORTED) {
            PackedPlace none;
            order.find(blocks, none);  // counts them to the end
        }
        end_claims(params, claimed, SORTED ? order.before : blocks);
        return false;
    }

    __device__ __forceinline__ bool find_rows(const BlockSplit& which, WorkTile& next) {
        if constexpr (SORTED) {
            PackedPlace place;
            return order.find(which.block, place) && find_packed_work<LAST_FIRST, PACK_GQA>(
                                                         params, BLOCK_M, next, which.split, place);
        } else {
            return find_work<LAST_FIRST, VARLEN, PACK_GQA>(params, BLOCK_M, next, which);
        }
    }
};

}  // namespace flashcore
