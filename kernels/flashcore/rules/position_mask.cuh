// position_mask.cuh - which keys a query sees by its position: query i sees the existing keys j
// with i + left <= j <= i + right. Causal and windowed attention differ in these two numbers alone.
// Which tiles of keys a block of queries visits follows from them: visible_tiles in
// scheduler/work.cuh.
#pragma once
#include <flashcore/params.cuh>

namespace flashcore {

// RIGHT, LEFT: whether there is a bound on that side. Without one all keys there are seen.
template <bool RIGHT, bool LEFT = false>
struct PositionMask {
    int seqlen_kv;
    int right, left;

    __device__ __forceinline__ explicit PositionMask(const AttentionParams& p)
        : PositionMask(p, p.seqlen_kv, p.causal_offset) {}

    // For one sequence of a packed batch; `diagonal` is the key at query 0's own position.
    __device__ __forceinline__ PositionMask(const AttentionParams& p, int seqlen_kv, int diagonal)
        : seqlen_kv(seqlen_kv), right(diagonal + p.window_right), left(diagonal - p.window_left) {}

    __device__ __forceinline__ int row_begin(int query) const {
        return LEFT ? max(0, query + left) : 0;
    }

    // One past the last key that the query sees; not above row_begin if it sees no key.
    __device__ __forceinline__ int row_end(int query) const {
        return RIGHT ? min(seqlen_kv, query + right + 1) : seqlen_kv;
    }

    // The first query that sees a key, and one past the last; not above the first if none does.
    __device__ __forceinline__ int first_query(int key) const {
        return RIGHT ? max(0, key - right) : 0;
    }
    __device__ __forceinline__ int end_query(int key, int seqlen_q) const {
        return LEFT ? min(seqlen_q, key - left + 1) : seqlen_q;
    }

    __device__ __forceinline__ bool visible(int query, int key) const {
        return key < row_end(query) && (!LEFT || key >= row_begin(query));
    }

    // Whether some query of [first_query, last_query] does not see some key of the tile
    // [first_key, end_key). Only such tiles pay for the comparisons in visible().
    __device__ __forceinline__ bool needs_mask(int first_query, int last_query, int first_key,
                                               int end_key) const {
        return end_key > row_end(first_query) || (LEFT && first_key < row_begin(last_query));
    }
};

}  // namespace flashcore
