// work.cuh - what a CTA of a backward kernel owns, and which tiles of the other side it walks
// over.
#pragma once
#include <backward/context.cuh>
#include <backward/listed_walk.cuh>
#include <config.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/scheduler/work.cuh>

namespace flashcore {

// Finds the block of keys that a CTA owns; its first key is work.first_row. Under a causal mask a
// head's first keys are seen by the most queries: their blocks come first. ORDERED: the last keys'
// blocks come first, see sm90_backward/turns.cuh. Returns false if the block has no keys, which
// only happens in packed batches.
__device__ __forceinline__ bool find_keys(const BackwardParams& p, int index, Work& w) {
    // Blocks of a few heads are interleaved, so that CTAs that begin together are of different
    // heads.
    const int heads = (VARLEN ? 1 : p.batch) * p.heads_kv;
    const int section = index / (p.section * p.n_blocks), first_head = section * p.section;
    const int in_section = index - first_head * p.n_blocks;
    const int interleaved = min(p.section, heads - first_head);
    const int head_index = first_head + in_section % interleaved;
    int block = in_section / interleaved;
    if constexpr (ORDERED) block = p.n_blocks - 1 - block;
    w.split = 0;
    w.group = 1;
    w.batch = VARLEN ? 0 : head_index / p.heads_kv;
    w.head_kv = head_index - w.batch * p.heads_kv;
    w.head = w.head_kv * p.group;
    w.start_q = w.start_kv = 0;
    w.seqlen_q = p.seqlen_q;
    w.seqlen_kv = p.seqlen_kv;
    w.diagonal = p.causal_offset;
    if constexpr (VARLEN) {
        const PackedBatch kv = {p.cu_seqlens_kv, p.batch, p.seqlen_kv, 1, BLOCK_M};
        const PackedBatch q = {p.cu_seqlens_q, p.batch, p.seqlen_q, 1, 1};
        const int piece = kv.find(block);
        block -= kv.first_block(piece);
        w.batch = kv.is_sequence(piece) ? piece - 1 : NO_SEQUENCE;
        w.start_kv = kv.start(piece);
        w.seqlen_kv = kv.length(piece);
        w.start_q = kv.is_sequence(piece) ? q.start(piece) : 0;
        w.seqlen_q = kv.is_sequence(piece) ? q.length(piece) : 0;
        w.diagonal = p.top_left ? 0 : w.seqlen_kv - w.seqlen_q;
    }
    w.first_row = block * BLOCK_M;
    return block >= 0 && w.first_row < w.seqlen_kv;
}

__device__ __forceinline__ bool find_own_rows(const BackwardParams& p, int index, Work& w) {
    if constexpr (OWNS_KEYS) return find_keys(p, index, w);
    return find_work<BOUNDED_RIGHT, VARLEN, false>(p, BLOCK_M, w, {index, 0});
}

// The tiles that the CTA walks over, once for each of `heads` query heads: those that its rows meet
// by positions.
struct RangeWalk {
    TileRange tiles;
    int first_head, heads;
    RowRange met;  // by all rows that exist, not the CTA's alone; others count as zeros

    __device__ __forceinline__ explicit RangeWalk(const WarpContext& c)
        : first_head(c.work.head), heads(OWNS_KEYS ? c.params.group : 1) {
        const Work& w = c.work;
        const int length = OWNS_KEYS ? w.seqlen_kv : w.seqlen_q;
        const int last = min(w.first_row + BLOCK_M, length) - 1;
        const RowRange rows = rows_met(w, c.mask(), w.first_row, last);
        tiles = {rows.begin / BLOCK_N, div_up(max(rows.end, 0), BLOCK_N)};
        if (rows.begin >= rows.end) tiles = {0, 0};
        met = rows_met_by_all(c);
    }

    __device__ __forceinline__ int per_head() const { return tiles.end - tiles.begin; }
    __device__ __forceinline__ int count() const { return per_head() * heads; }
    __device__ __forceinline__ WalkedTile operator[](int nth) const {
        const int head = heads == 1 ? 0 : nth / per_head();
        return {first_head + head, tiles.begin + nth - head * per_head(), 0, false};
    }

    // As a walk over a list has it, which knows no tile by its number.
    __device__ __forceinline__ bool is_empty() const { return count() <= 0; }
    __device__ __forceinline__ bool has(int nth) const { return nth < count(); }
    __device__ __forceinline__ bool has_next(int nth) const { return nth + 1 < count(); }
    __device__ __forceinline__ WalkedTile at(int nth) const { return (*this)[nth]; }
    __device__ __forceinline__ WalkedTile to_copy(int nth) const { return (*this)[nth]; }
    __device__ __forceinline__ void advance() const {}
};

template <bool LISTED_>
struct WalkOver {
    using type = RangeWalk;
};
template <>
struct WalkOver<true> {
    using type = ListedWalk;
};
using Walk = WalkOver<LISTED>::type;

// Whether some query of the tile, or of the CTA, does not see some key of the CTA, or of the tile,
// or one of them does not exist.
__device__ __forceinline__ bool needs_mask(const WarpContext& c, int tile) {
    const Work& w = c.work;
    const int first_query = OWNS_KEYS ? tile * BLOCK_N : w.first_row;
    const int first_key = OWNS_KEYS ? w.first_row : tile * BLOCK_N;
    const int end_query = first_query + (OWNS_KEYS ? BLOCK_N : BLOCK_M);
    const int end_key = first_key + (OWNS_KEYS ? BLOCK_M : BLOCK_N);
    return end_query > w.seqlen_q ||
           c.mask().needs_mask(first_query, end_query - 1, first_key, end_key);
}

}  // namespace flashcore
