// tile_coord.cuh - which block of queries of which head a thread block of the ladder works on.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Which (batch, query head) and which block of queries a thread block works on.
struct TileCoord {
    int m_block, head, batch;
};

// Consecutive blocks share a head, so that its K and V stay in L2 while they are read again. Under
// a causal mask the last queries see the most keys: they come first, so that no long block runs
// alone at the end.
template <bool LAST_FIRST>
__device__ __forceinline__ TileCoord tile_coord(const AttentionParams& p, int block_m) {
    const int m_blocks = div_up(p.seqlen_q, block_m);
    const int head_index = block_index() / m_blocks;
    const int m_block = block_index() - head_index * m_blocks;
    return {LAST_FIRST ? m_blocks - 1 - m_block : m_block, head_index % p.heads_q,
            head_index / p.heads_q};
}

// The (b, h) pair of a query head, as one index into (B, Hq) arrays.
__device__ __forceinline__ int64 head_index(const AttentionParams& p, const TileCoord& tile) {
    return int64(tile.batch) * p.heads_q + tile.head;
}

// Row `query` of the output.
template <typename T>
__device__ __forceinline__ T* output_pointer(const AttentionParams& p, const TileCoord& tile,
                                             int query) {
    return static_cast<T*>(p.o) + tile.batch * p.o_strides.batch + tile.head * p.o_strides.head +
           query * p.o_strides.row;
}

}  // namespace flashcore
