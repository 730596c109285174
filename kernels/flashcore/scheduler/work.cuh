// work.cuh - what a CTA works on: which sequence, head and rows of queries, and which split of the
// keys.
//
// Consecutive blocks share a head, or a section of heads, so that K and V stay in L2 while they are
// read again. Under a causal mask the last queries see the most keys: their blocks come first, so
// that no long block runs alone at the end.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/rules/listed_tiles.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/scheduler/packed_batch.cuh>

namespace flashcore {

struct Work {
    int batch;
    int head;  // of q; PACK_GQA: of k and v
    int head_kv;
    int first_row;            // a row is a query; PACK_GQA: query * group + head of the group
    int split;                // which split of the keys
    int seqlen_q, seqlen_kv;  // of the sequence
    int start_q, start_kv;    // where the sequence starts in a packed batch, else 0
    int diagonal;             // the key at query 0's own position
    int group;                // rows per query: PACK_GQA: the heads of a group; else 1
};

// The query and the head of q that a row of the tile is; `valid`: whether they exist.
struct QueryRow {
    int query, head;
    bool valid;
};

// The query that row `row` of the tile belongs to, whether or not it exists.
template <bool PACK_GQA>
__device__ __forceinline__ int query_of(const Work& w, int row) {
    return PACK_GQA ? (w.first_row + row) / w.group : w.first_row + row;
}

// The last query that exists among the rows before `end`; one less than the first query if none
// exists.
template <bool PACK_GQA>
__device__ __forceinline__ int last_query_of(const Work& w, int end) {
    return min(query_of<PACK_GQA>(w, end - 1), w.seqlen_q - 1);
}

template <bool PACK_GQA>
__device__ __forceinline__ QueryRow query_row(const Work& w, int row) {
    const int i = w.first_row + row;
    if constexpr (!PACK_GQA) return {i, w.head, i < w.seqlen_q};
    const int query = i / w.group;
    return {query, w.head * w.group + (i - query * w.group), query < w.seqlen_q};
}

// Puts the blocks of some heads into another order: first the longest blocks of all heads of a
// section, then their second longest ones, and so on, so that the blocks at the end are short. A
// section is not all heads at once, so that its K and V stay in L2; select/sm90.py chooses it.
// `blocks`: of each head.
__device__ __forceinline__ void interleave_section(int section, int blocks, int heads, int index,
                                                   int& head_index, int& nth_block) {
    const int first = index / (section * blocks) * section;
    const int count = min(section, heads - first);
    index -= first * blocks;
    nth_block = index / count;
    head_index = first + index - nth_block * count;
}

struct TileRange {
    int begin, end;
};

// Returns the tiles of BLOCK_N keys that some row of [first_row, end_row) of the block sees; of
// several splits, those in this one; {0, 0} if there are none.
template <int BLOCK_N, bool PACK_GQA, typename Mask>
__device__ __forceinline__ TileRange visible_tiles(const Work& w, const Mask& mask, int first_row,
                                                   int end_row, int splits) {
    const int first_query = query_of<PACK_GQA>(w, first_row);
    const int last_query = last_query_of<PACK_GQA>(w, end_row);
    TileRange tiles = {mask.row_begin(first_query) / BLOCK_N,
                       div_up(max(mask.row_end(last_query), 0), BLOCK_N)};
    if (splits > 1) {
        const int share = div_up(max(tiles.end - tiles.begin, 0), splits);
        tiles.begin += w.split * share;
        tiles.end = min(tiles.end, tiles.begin + share);
    }
    return tiles.begin < tiles.end ? tiles : TileRange{0, 0};
}

// Returns the tiles of which every row of [first_row, end_row) that exists sees every key: no
// positions need to be compared in them.
template <int BLOCK_N, bool PACK_GQA, typename Mask>
__device__ __forceinline__ TileRange unmasked_tiles(const Work& w, const Mask& mask, int first_row,
                                                    int end_row) {
    return {div_up(mask.row_begin(last_query_of<PACK_GQA>(w, end_row)), BLOCK_N),
            max(mask.row_end(query_of<PACK_GQA>(w, first_row)), 0) / BLOCK_N};
}

// Block masks: the number of the list that a block of rows walks over.
__device__ __forceinline__ int list_of(const AttentionParams& p, const Work& w) {
    return TileLists(p).number(w.batch, w.head, w.first_row / p.tile_rows);
}

// A block of rows, and a split of its keys.
struct BlockSplit {
    int block, split;
};

// Returns number `index` of the splits of `blocks` blocks of rows: all first splits come before all
// second ones. The last split of a block may be short, and in this order no multiprocessor gets
// only long ones.
__device__ __forceinline__ BlockSplit block_split(int index, int blocks) {
    const int split = index / blocks;
    return {index - split * blocks, split};
}

// Of a packed batch, the queries as pieces of block_m rows, and their keys.
__device__ __forceinline__ PackedBatch packed_queries(const AttentionParams& p, int group,
                                                      int block_m) {
    return {p.cu_seqlens_q, p.batch, p.seqlen_q, group, block_m};
}
__device__ __forceinline__ PackedBatch packed_keys(const AttentionParams& p) {
    return {p.cu_seqlens_kv, p.batch, p.seqlen_kv, 1, 1};
}

// How many heads of a packed sequence are interleaved: p.section is how many keys of a head there
// may be in L2. Of long sequences a few blocks of every head run at a time, and share what they
// read.
__device__ __forceinline__ int packed_section(const AttentionParams& p, int heads, int blocks,
                                              int seqlen_kv) {
    int section = p.section / max(seqlen_kv, 1);
    if (p.section > 1 && blocks >= 40) section = max(section, div_up(8 * int(grid_size()), blocks));
    return min(max(section, 1), heads);
}

// Finds the work at a place of a packed batch, whose sequences follow each other with all of their
// heads. Returns false, with w as it was, if there is no such block.
template <bool LAST_FIRST, bool PACK_GQA>
__device__ __forceinline__ bool find_packed_work(const AttentionParams& p, int block_m, Work& w,
                                                 int split, const PackedPlace& place) {
    const int group = PACK_GQA ? p.group : 1, heads = PACK_GQA ? p.heads_kv : p.heads_q;
    const PackedBatch q = packed_queries(p, group, block_m), kv = packed_keys(p);
    const int blocks = q.blocks(place.piece);
    if (place.index < 0 || place.index >= blocks * heads) return false;
    w.split = split;
    w.group = group;
    const bool is_sequence = q.is_sequence(place.piece);
    w.batch = is_sequence ? place.piece - 1 : NO_SEQUENCE;
    w.start_q = q.start(place.piece);
    w.seqlen_q = q.length(place.piece);
    w.start_kv = is_sequence ? kv.start(place.piece) : 0;
    w.seqlen_kv = is_sequence ? kv.length(place.piece) : 0;
    w.diagonal = p.top_left ? 0 : w.seqlen_kv - w.seqlen_q;
    int nth_block;
    if (LAST_FIRST) {
        const int section = packed_section(p, heads, blocks, w.seqlen_kv);
        interleave_section(section, blocks, heads, place.index, w.head, nth_block);
        nth_block = blocks - 1 - nth_block;
    } else {
        w.head = place.index / blocks;
        nth_block = place.index - w.head * blocks;
    }
    w.head_kv = PACK_GQA || p.group == 1 ? w.head : kv_head(p, w.head);
    w.first_row = nth_block * block_m;
    return true;
}

// Finds the work that a split of a block of rows is. LAST_FIRST: a head's last block comes first.
// Returns false if the block has no rows, which only happens in packed batches.
template <bool LAST_FIRST, bool VARLEN, bool PACK_GQA>
__device__ __forceinline__ bool find_work(const AttentionParams& p, int block_m, Work& w,
                                          BlockSplit which) {
    const int heads = PACK_GQA ? p.heads_kv : p.heads_q;
    if constexpr (VARLEN) {
        const PackedBatch q = packed_queries(p, PACK_GQA ? p.group : 1, block_m);
        const int piece = q.find(which.block / heads);
        const PackedPlace place = {piece, which.block - q.first_block(piece) * heads};
        return find_packed_work<LAST_FIRST, PACK_GQA>(p, block_m, w, which.split, place);
    }
    w.split = which.split;
    // Divisions are left out where possible: each takes a tenth of a microsecond, which a short
    // call feels.
    int head_index = p.m_blocks == 1 ? which.block : which.block / p.m_blocks;
    int nth_block = which.block - head_index * p.m_blocks;
    if (LAST_FIRST && p.section > 1)
        interleave_section(p.section, p.m_blocks, p.batch * heads, which.block, head_index,
                           nth_block);
    const int m_block = LAST_FIRST ? p.m_blocks - 1 - nth_block : nth_block;
    w.group = PACK_GQA ? p.group : 1;
    w.batch = p.batch == 1 ? 0 : head_index / heads;
    w.head = head_index - w.batch * heads;
    w.head_kv = PACK_GQA || p.group == 1 ? w.head : kv_head(p, w.head);
    w.start_q = w.start_kv = 0;
    w.seqlen_q = p.seqlen_q;
    w.seqlen_kv = p.seqlen_kv;
    w.diagonal = p.causal_offset;
    w.first_row = m_block * block_m;
    return w.first_row < w.seqlen_q * w.group;
}

}  // namespace flashcore
