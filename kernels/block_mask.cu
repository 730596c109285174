// block_mask.cu - finds out which blocks of scores a mask leaves empty, full, or mixed, and lists
// the mixed and the full ones, in order: a block mask, as attention kernels take it by way of
// tile_lists.cu.
//
// A CTA has a row of blocks: those of some queries of one list of heads. It takes BLOCKS blocks of
// keys at a time:
//
//   look    each warp asks the mask and mask_mod for every score of a block
//   pack    the first warp lists the blocks that are not empty; a lane has every 32nd block
//
// Queries and keys behind the last ones do not count: a last block may be full.
#include <config.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/listed_tiles.cuh>
#include <flashcore/rules/score.cuh>

namespace flashcore {

struct BlockMaskParams : AttentionParams {
    int* counts[2];   // of mixed blocks and of full ones: (list_batches, list_heads, q_blocks)
    int* indices[2];  // and behind that kv_blocks
    int q_blocks, kv_blocks;
};
static_assert(sizeof(BlockMaskParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

constexpr int BLOCKS = 1024;
struct SharedStorage {
    uint8 state[BLOCKS];
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");

// A row of blocks.
struct BlockRow {
    const BlockMaskParams& p;
    SharedStorage& smem;
    int batch, head;
    int first_query, end_query;

    __device__ __forceinline__ BlockRow(const BlockMaskParams& p, SharedStorage& smem)
        : p(p), smem(smem) {
        const int list = block_index() / p.q_blocks, row = block_index() % p.q_blocks;
        batch = list / p.list_heads;
        head = list % p.list_heads;
        first_query = row << p.list_shift_q;
        end_query = min(first_query + (1 << p.list_shift_q), p.seqlen_q);
    }

    // Returns the state of a block of keys. All lanes of a warp call it, and get the same.
    __device__ __forceinline__ int look(int block) const {
        const int first_key = block << p.list_shift_kv;
        const int end_key = min(first_key + (1 << p.list_shift_kv), p.seqlen_kv);
        bool some = false, all = true;
        for (int query = first_query; query < end_query; ++query) {
            const RowRules<T, RULES> rules(p, batch, head, query, p.seqlen_q, p.seqlen_kv, 0);
            for (int key = first_key + thread_index() % WARP_SIZE; key < end_key;
                 key += WARP_SIZE) {
                const bool seen = rules.sees(key);
                some |= seen;
                all &= seen;
            }
        }
        return !warp_any(some) ? 0 : warp_any(!all) ? BLOCK_MIXED : BLOCK_FULL;
    }

    // Appends the blocks of a state, among those from `begin` to before `end`, to their list. One
    // warp does this.
    __device__ __forceinline__ void pack(int state, int begin, int end, int& count) const {
        int* const indices = p.indices[state == BLOCK_FULL] + int64(block_index()) * p.kv_blocks;
        for (int first = begin; first < end; first += WARP_SIZE) {
            const int block = first + thread_index() % WARP_SIZE;
            const bool listed = block < end && smem.state[block - begin] == state;
            const int rank = warp_rank(listed);
            if (listed) indices[count + rank - 1] = block;
            count += warp_count(listed);
        }
    }

    __device__ __forceinline__ void list() const {
        int mixed = 0, full = 0;
#pragma unroll 1
        for (int begin = 0; begin < p.kv_blocks; begin += BLOCKS) {
            const int end = min(begin + BLOCKS, p.kv_blocks);
            for (int block = begin + thread_index() / WARP_SIZE; block < end; block += NUM_WARPS) {
                const int state = look(block);
                if (thread_index() % WARP_SIZE == 0) smem.state[block - begin] = state;
            }
            block_sync();  // all states are there
            if (thread_index() < WARP_SIZE) {
                pack(BLOCK_MIXED, begin, end, mixed);
                pack(BLOCK_FULL, begin, end, full);
            }
            block_sync();  // the first warp has read them before they are overwritten
        }
        if (thread_index() != 0) return;
        p.counts[0][block_index()] = mixed;
        p.counts[1][block_index()] = full;
    }
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    block_mask(const __grid_constant__ BlockMaskParams params) {
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<16>());
    BlockRow(params, smem).list();
}

}  // namespace flashcore
