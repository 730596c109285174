// tile_scheduler.cuh - what the thread blocks of a persistent kernel do next: a warp of each takes
// blocks of rows, finds out what they are, and hands them to the warps that work on them.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/scheduler/schedule.cuh>

namespace flashcore {

struct Item : Work {
    int block;        // of rows, among all
    int first_query;  // that row 0 belongs to
    TileRange tiles;  // of keys, that some row sees
};

// Behind the last block of rows.
__device__ __forceinline__ bool is_end(const Work& w) { return w.first_row < 0; }

// Items on their way: one is being worked on, one loaded for, and one is known ahead.
struct WorkQueue {
    static constexpr int SIZE = 3;
    Pipeline<SIZE> places;
    Item item[SIZE];
    Pipeline<2> claims;  // blocks that are taken and not all loaded
};
using WorkRing = PipelineState<WorkQueue::SIZE>;
using ClaimRing = PipelineState<2>;

// By one warp, all of whose lanes have the item.
__device__ __forceinline__ void put(WorkQueue& queue, WorkRing& at, const Item& item) {
    at.wait_empty(queue.places);
    if (elect_one()) {
        queue.item[at.stage] = item;
        mbarrier_arrive(&queue.places.full[at.stage]);
    }
    at.advance();
}

// The next block after those that are taken, by whomever; `blocks` if there is none. The first
// grid_size() are everyone's own, and where that is all, nobody asks. All thread blocks together ask
// `blocks` times, once per block that they have had, so the one who gets the last answer sets the
// counter back for the next launch. By one warp.
__device__ __forceinline__ int take_block(const AttentionParams& p, int blocks) {
    if (grid_size() >= blocks) return blocks;
    int taken = 0;
    if (thread_index() % WARP_SIZE == 0) {
        taken = atomic_add(p.split_arrivals, 1);
        if (taken == blocks - 1) *p.split_arrivals = 0;
    }
    return min(int(grid_size()) + shfl(taken, 0), blocks);
}

// Of the keys of a block of rows.
template <bool SPLIT_KV, int CLUSTER>
__device__ __forceinline__ int parts_of_keys(const AttentionParams& p) {
    return CLUSTER > 1 ? CLUSTER : SPLIT_KV ? p.splits : 1;
}

// One warp finds the work. What it has taken nobody else can do, so it takes no more than one block
// beyond the one that is being loaded.
template <int BLOCK_M, int BLOCK_N, typename Mask, bool LAST_FIRST, bool VARLEN, bool PACK_GQA,
          bool SPLIT_KV, int CLUSTER>
struct Dispatcher {
    const AttentionParams& params;
    int blocks;  // of rows, times the parts of their keys
    int taken;
    Item next;  // work, or the end

    __device__ __forceinline__ explicit Dispatcher(const AttentionParams& p)
        : params(p),
          blocks((VARLEN ? 1 : p.batch) * (PACK_GQA ? p.heads_kv : p.heads_q) * p.m_blocks *
                 parts_of_keys<SPLIT_KV, CLUSTER>(p)),
          taken(block_index()) {}

    // While the barriers are made. Nobody waits for the first item at one of them.
    __device__ __forceinline__ void begin(WorkQueue& queue) {
        find();
        if (elect_one()) queue.item[0] = next;
    }

    __device__ __forceinline__ void run(WorkQueue& queue) {
        WorkRing at;
        ClaimRing claims;
        if (elect_one()) mbarrier_arrive(&queue.places.full[0]);
        at.advance();
        claims.advance();
#pragma unroll 1
        while (!is_end(next)) {
            claims.wait_empty(queue.claims);
            claims.advance();
            taken = take_block(params, blocks);
            find();
            put(queue, at, next);
        }
    }

  private:
    __device__ __forceinline__ void find() {
        for (; taken < blocks; taken = take_block(params, blocks)) {
            // A cluster has the parts of the same rows.
            const BlockPart part = CLUSTER > 1 ? BlockPart{taken / CLUSTER, taken % CLUSTER}
                                   : SPLIT_KV  ? block_part(taken, blocks / params.splits)
                                               : BlockPart{taken, 0};
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
