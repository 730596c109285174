// mask.cuh - which keys a query sees, and which tiles of keys a block of queries has to visit.
#pragma once
#include <flashcore/params.cuh>

namespace flashcore {

template <bool CAUSAL>
struct Mask {
    int seqlen_kv;
    int causal_offset;  // query i sees key j <= i + causal_offset

    __device__ __forceinline__ explicit Mask(const AttentionParams& p)
        : seqlen_kv(p.seqlen_kv), causal_offset(p.causal_offset) {}

    // One past the last key that the query sees; it sees all before.
    __device__ __forceinline__ int row_end(int query) const {
        return CAUSAL ? min(seqlen_kv, query + causal_offset + 1) : seqlen_kv;
    }

    __device__ __forceinline__ bool visible(int query, int key) const {
        return key < row_end(query);
    }

    // One past the last key that any of the queries [.., last_query] sees.
    __device__ __forceinline__ int kv_end(int last_query) const {
        return CAUSAL ? max(0, min(seqlen_kv, last_query + causal_offset + 1)) : seqlen_kv;
    }

    // Whether some query >= first_query misses some key of [first_key, end_key): only such tiles
    // pay for the comparison in visible().
    __device__ __forceinline__ bool cuts(int first_query, int end_key) const {
        return end_key > seqlen_kv || (CAUSAL && end_key - 1 > first_query + causal_offset);
    }
};

}  // namespace flashcore
