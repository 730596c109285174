// listed_tiles.cuh - block masks: which tiles of keys a block of rows visits, as a list; or, for a
// kernel that owns keys (OWNS_KEYS), which tiles of queries a block of keys does.
//
// A block mask says of each block of queries and keys (64 or 128 of either) that it is empty, mixed
// or full. Empty ones are never loaded, and in full ones no rule is asked. A kernel's tiles need
// not be of the mask's size, so tile_lists.cu turns its lists into lists of tiles, each with the
// states of all blocks that the tile touches. A list is ascending, and has no tile twice.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Two bits of a block. A block with both is full.
constexpr int BLOCK_MIXED = 1;
constexpr int BLOCK_FULL = 2;
constexpr int MOST_BLOCKS = 4;  // that a tile touches, along its queries and along its keys

// The states of the blocks that a row meets in a tile: two bits each, the first keys' lowest. Where
// a row meets fewer than MOST_BLOCKS, the others count as full, unless it has no listed block.
struct BlocksOfRow {
    static constexpr uint32 ALL_FULL = 0xaa;
    uint32 states;
    int first_key;  // of the first block
    int shift;      // a block has 2^shift keys

    __device__ __forceinline__ bool are_empty() const { return states == 0; }
    __device__ __forceinline__ bool are_full() const { return (states & ALL_FULL) == ALL_FULL; }

    template <int PAIRS>
    __device__ __forceinline__ void keep_listed(KeyBits<false, PAIRS>&, int) const {}
    // Sets the bits of a lane's keys in full blocks, and clears those in empty blocks; key: the
    // lane's first.
    template <int PAIRS>
    __device__ __forceinline__ void keep_listed(KeyBits<true, PAIRS>& bits, int key) const {
#pragma unroll 1
        for (int c = 0; c < MOST_BLOCKS; ++c) {
            const uint32 state = states >> 2 * c & 3;
            if (state == BLOCK_MIXED) continue;  // as the rules say
            const int begin = first_key + (c << shift) - key, end = begin + (1 << shift);
            if (end <= 0 || begin > 8 * PAIRS - 7) continue;  // the lane has no keys there
            if (state & BLOCK_FULL) bits.add(KeyBits<true, PAIRS>::between(begin, end));
            if (state == 0) bits.clear(begin, end);
        }
    }
};

// An entry of a list.
struct alignas(8) ListedTile {
    static constexpr uint32 HAS_UNSEEN = 1u << 31;
    uint32 word;  // the tile's number, and HAS_UNSEEN: maybe no query sees some of its keys
    // Two bits per block: bit 8 r + 2 c of the r-th block of queries that the tile touches, and the
    // c-th of keys. For owners of keys: of the r-th block of keys, and the c-th of queries.
    uint32 states;

    __device__ __forceinline__ int tile() const { return int(word & ~HAS_UNSEEN); }
    __device__ __forceinline__ bool has_unseen() const { return (word & HAS_UNSEEN) != 0; }
};

// In how many lanes up to this one the condition holds. All lanes of a warp call it.
__device__ __forceinline__ int warp_rank(bool condition) {
    const int lane = thread_index() % WARP_SIZE;
    int sum = condition;
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        const int before = shfl(sum, max(lane - step, 0));
        if (lane >= step) sum += before;
    }
    return sum;
}

struct TileLists {
    const AttentionParams& p;

    __device__ __forceinline__ explicit TileLists(const AttentionParams& p) : p(p) {}

    // The number of the list of a block of rows.
    __device__ __forceinline__ int number(int batch, int head, int m_block) const {
        const int head_list = head / (p.heads_q / p.list_heads);
        return ((p.list_batches == 1 ? 0 : batch) * p.list_heads + head_list) * p.m_blocks +
               m_block;
    }
    __device__ __forceinline__ int count(int number) const { return p.tile_counts[number]; }
    __device__ __forceinline__ const ListedTile* entries(int number) const {
        return static_cast<const ListedTile*>(p.tile_entries) + int64(number) * p.tile_capacity;
    }

    // What a listed tile says of the blocks of a query's row; `first_query`: of the block of rows.
    __device__ __forceinline__ BlocksOfRow blocks_of(const ListedTile& at, int first_query,
                                                     int query) const {
        const int row = (query >> p.list_shift_q) - (first_query >> p.list_shift_q);
        const int first_key = at.tile() * p.tile_keys >> p.list_shift_kv << p.list_shift_kv;
        return {at.states >> 8 * row & 0xff, first_key, p.list_shift_kv};
    }

    // The entry of a tile, by a search through a list; its `states` are 0 if it is not listed.
    __device__ __forceinline__ ListedTile find(int number, int tile) const {
        const ListedTile* const all = entries(number);
        int begin = 0, end = count(number);
        while (end - begin > 1) {
            const int middle = (begin + end) / 2;
            (all[middle].tile() <= tile ? begin : end) = middle;
        }
        if (end == 0 || all[begin].tile() != tile) return {uint32(tile), 0};
        return all[begin];
    }

    // The state of the block of a query and a key, 0 if it is not listed.
    __device__ __forceinline__ int state_of(int batch, int head, int query, int key) const {
        const int m_block = query / p.tile_rows;
        const ListedTile at = find(number(batch, head, m_block), key / p.tile_keys);
        if (at.states == 0) return 0;
        const BlocksOfRow blocks = blocks_of(at, m_block * p.tile_rows, query);
        const int state = blocks.states >> 2 * ((key - blocks.first_key) >> blocks.shift) & 3;
        return state & BLOCK_FULL ? BLOCK_FULL : state;
    }
};

}  // namespace flashcore
