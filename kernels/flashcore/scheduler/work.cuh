// work.cuh - what a CTA works on: which sequence, head and rows of queries, and which split of the
// keys.
//
// Consecutive blocks share a head, or a section of heads, so that K and V stay in L2 while they are
// read again. Under a causal mask the last queries see the most keys: their blocks come first, so
// that no long block runs alone at the end.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/position_mask.cuh>

namespace flashcore {

// Work::batch of rows of a packed batch that belong to none of its sequences.
constexpr int NO_SEQUENCE = -1;

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

// A packed batch in pieces: the rows before the first boundary, the sequences, and the rows behind
// the last boundary. The first and the last piece, usually empty, belong to no sequence and have no
// keys. Boundaries outside the array are clamped: the host cannot check them without waiting for
// the GPU.
//
// Pieces are cut into blocks of block_m rows. Piece n starts at block floor(its first row /
// block_m) + n. That gives it all the blocks that it needs, wherever it starts, and at most one too
// many; so a block finds its piece from cu_seqlens alone.
struct PackedBatch {
    const int* cu_seqlens;
    int sequences, total, rows_per_query, block_m;

    __device__ __forceinline__ int pieces() const { return sequences + 2; }
    __device__ __forceinline__ bool is_sequence(int piece) const {
        return piece > 0 && piece <= sequences;
    }
    __device__ __forceinline__ int boundary(int n) const {
        return min(max(cu_seqlens[n], 0), total);
    }
    __device__ __forceinline__ int start(int piece) const {
        return piece == 0 ? 0 : boundary(piece - 1);
    }
    __device__ __forceinline__ int length(int piece) const {
        return max((piece > sequences ? total : boundary(piece)) - start(piece), 0);
    }
    __device__ __forceinline__ int first_block(int piece) const {
        return int(int64(start(piece)) * rows_per_query / block_m) + piece;
    }

    // Returns the last piece that starts at `block` or before it. A search by the whole warp: each
    // lane tries one of 32 evenly spaced pieces, and the next round searches between two of them.
    __device__ __forceinline__ int find(int block) const {
        const int lane = thread_index() % WARP_SIZE;
        int first = 0, count = pieces();
        while (count > 1) {
            const int step = div_up(count, WARP_SIZE);
            const bool candidate = lane * step < count && first_block(first + lane * step) <= block;
            const int chosen = max(warp_count(candidate), 1) - 1;
            first += chosen * step;
            count = min(step, count - chosen * step);
        }
        return first;
    }
};

// Puts blocks into another order: first the longest blocks of all heads of a section, then their
// second longest ones, and so on, so that the blocks at the end are short. A section is not all
// heads at once, so that its K and V stay in L2; select/sm90.py chooses it.
template <bool VARLEN>
__device__ __forceinline__ void interleave_section(const AttentionParams& p, int heads, int index,
                                                   int& head_index, int& nth_block) {
    const int section = index / (p.section * p.m_blocks), first = section * p.section;
    const int count = min(p.section, (VARLEN ? 1 : p.batch) * heads - first);
    index -= first * p.m_blocks;
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

// Finds the work that a split of a block of rows is. LAST_FIRST: a head's last block comes first.
// Returns false if the block has no rows, which only happens in packed batches.
template <bool LAST_FIRST, bool VARLEN, bool PACK_GQA>
__device__ __forceinline__ bool find_work(const AttentionParams& p, int block_m, Work& w,
                                          BlockSplit which) {
    w.split = which.split;
    const int heads = PACK_GQA ? p.heads_kv : p.heads_q;
    // Divisions are left out where possible: each takes a tenth of a microsecond, which a short
    // call feels.
    int head_index = p.m_blocks == 1 ? which.block : which.block / p.m_blocks;
    int nth_block = which.block - head_index * p.m_blocks;
    if (LAST_FIRST && p.section > 1)
        interleave_section<VARLEN>(p, heads, which.block, head_index, nth_block);
    int m_block = LAST_FIRST ? p.m_blocks - 1 - nth_block : nth_block;
    w.group = PACK_GQA ? p.group : 1;
    w.batch = VARLEN || p.batch == 1 ? 0 : head_index / heads;
    w.head = head_index - w.batch * heads;
    w.head_kv = PACK_GQA || p.group == 1 ? w.head : kv_head(p, w.head);
    if constexpr (VARLEN) {
        const PackedBatch q = {p.cu_seqlens_q, p.batch, p.seqlen_q, w.group, block_m};
        const PackedBatch kv = {p.cu_seqlens_kv, p.batch, p.seqlen_kv, 1, 1};
        const int piece = q.find(m_block);
        m_block -= q.first_block(piece);
        w.batch = q.is_sequence(piece) ? piece - 1 : NO_SEQUENCE;
        w.start_q = q.start(piece);
        w.seqlen_q = q.length(piece);
        w.start_kv = w.seqlen_kv = 0;
        if (q.is_sequence(piece)) {
            w.start_kv = kv.start(piece);
            w.seqlen_kv = kv.length(piece);
        }
        w.diagonal = p.top_left ? 0 : w.seqlen_kv - w.seqlen_q;
    } else {
        w.start_q = w.start_kv = 0;
        w.seqlen_q = p.seqlen_q;
        w.seqlen_kv = p.seqlen_kv;
        w.diagonal = p.causal_offset;
    }
    w.first_row = m_block * block_m;
    return m_block >= 0 && w.first_row < w.seqlen_q * w.group;
}

}  // namespace flashcore
