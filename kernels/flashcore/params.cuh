// params.cuh - what the launcher hands to every kernel: one struct, by value. select/params.py
// describes it as a NumPy structured dtype; PARAMS_BYTES in config.cuh lets each kernel assert that
// both have the same size.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

constexpr int MAX_MOD_ARGS = 8;
using ModArgs = const void* [MAX_MOD_ARGS];  // the user's arrays, see rules/mod_array.cuh

// Element strides of a (batch, head, row, column) view; columns are contiguous. 64-bit: a batch of
// long sequences passes 2^31 elements.
struct Strides {
    int64 batch, head, row;
};

// Strides of an array that is broadcast to (B, Hq, Sq, Skv): 0 along an axis that it lacks.
struct BroadcastStrides {
    int64 batch, head, row, column;
};

struct HeadStrides {
    int64 batch, head;
};

struct AttentionParams {
    const void* q;             // (B, Hq, Sq, D)
    const void* k;             // (B, Hkv, Skv, D)
    const void* v;             // (B, Hkv, Skv, Dv)
    void* o;                   // (B, Hq, Sq, Dv)
    float* lse;                // (B, Hq, Sq), natural log, or null
    float* gate;               // (B, Hq, Sq, gate_row) fp32: the stage a debug gate writes, or null
    float* gate_tile_max;      // (B, Hq, Sq, gate_tiles): running maximum at each tile
    float* gate_row_max;       // (B, Hq, Sq): final maximum
    float* gate_row_sum;       // (B, Hq, Sq): final sum
    void* scratch_scores;      // wmma_unfused: S, fp32, (B, Hq, rows_padded, cols_padded)
    void* scratch_probs;       // wmma_unfused: P, T, the same shape
    float* scratch_sum;        // wmma_unfused: row sums, (B, Hq, rows_padded)
    const float* q_scale;      // fp8: dequantisation factors, (B, Hq)
    const float* k_scale;      // fp8: (B, Hkv)
    const float* v_scale;      // fp8: (B, Hkv)
    const float* alibi;        // slopes, (B, Hq)
    const void* bias;          // (B, Hq, Sq, Skv), T or fp32
    const uint8* mask;         // (B, Hq, Sq, Skv), 0 = hidden
    const float* sink;         // (Hq), logits
    ModArgs mod_args;          // the user's arrays
    const int* cu_seqlens_q;   // (B + 1), where each packed sequence starts, or null
    const int* cu_seqlens_kv;  // (B + 1)
    float* split_partials;     // split keys: partials of each split of each block of rows
    // 0 between launches. fwd_sm80: for each block of rows, how many of its splits have arrived.
    // fwd_sm90: WorkCounters.
    int* counters;
    // Block masks: what tile_lists.cu has made of them (rules/listed_tiles.cuh).
    const void* tile_entries;  // ListedTile, (list_batches, list_heads, m_blocks, tile_capacity)
    const int* tile_counts;    // (list_batches, list_heads, m_blocks)
    const uint64* rng;         // dropout: seed and offset, or null; then
    uint64 rng_key;            // is made of them already (rules/dropout.cuh)
    Strides q_strides, k_strides, v_strides, o_strides;
    HeadStrides lse_strides, alibi_strides;
    BroadcastStrides bias_strides, mask_strides;
    int batch;
    int heads_q;
    int heads_kv;
    int group;          // heads of q that share a head of k and v
    int seqlen_q;       // packed batches: all queries
    int seqlen_kv;      // keys that at least one query may see; packed batches: all keys
    int causal_offset;  // the key at query 0's own position: query i's is i + causal_offset
    int window_left;    // BOUNDED_LEFT: query i sees keys j >= i + causal_offset - window_left
    int window_right;   // BOUNDED_RIGHT: ... j <= i + causal_offset + window_right; causal: 0
    int top_left;       // packed batches: query 0's own position is key 0 of its sequence
    int m_blocks;       // blocks of rows per head, all sequences together
    int splits;         // ranges of the keys of a block of rows, one CTA's work each
    int section;        // heads whose blocks are interleaved, the longest first; see work.cuh
    int gate_row;       // the gate array's row length: the true Skv
    int gate_tiles;     // tiles per row in gate_tile_max
    int rows_padded;    // scratch rows: Sq rounded up to the tile
    int cols_padded;    // scratch columns: seqlen_kv rounded up to the tile
    int list_batches;   // block masks: 1, or B
    int list_heads;     // a divisor of Hq: so many neighbouring heads of q share a list
    int list_shift_q;   // a block of the mask has 2^list_shift_q queries
    int list_shift_kv;  // and 2^list_shift_kv keys
    int tile_rows;      // queries and keys of the tiles in the lists
    int tile_keys;
    int tile_capacity;  // entries that a list has room for
    float softmax_scale;
    float scale_log2;  // softmax_scale * log2(e): exp(x) = exp2(x * log2(e))
    float softcap, inverse_softcap;
    float dropout_p;   // a multiple of 2^-16
    float keep_scale;  // 1 / (1 - dropout_p)
};

__device__ __forceinline__ int kv_head(const AttentionParams& p, int head) {
    return head / p.group;
}

// The counters of fwd_sm90.
struct WorkCounters {
    int claimed;      // blocks claimed so far, without the first one of each CTA
    int arrivals[1];  // for each block of rows, so not only one: its splits that have arrived
};
__device__ __forceinline__ WorkCounters& counters_of(const AttentionParams& p) {
    return *reinterpret_cast<WorkCounters*>(p.counters);
}

// First element of a head.
template <typename T>
__device__ __forceinline__ const T* head_pointer(const void* base, const Strides& s, int batch,
                                                 int head) {
    return static_cast<const T*>(base) + batch * s.batch + head * s.head;
}

// First element of row `row` of a head.
template <typename T>
__device__ __forceinline__ const T* head_row(const void* base, const Strides& s, int batch,
                                             int head, int64 row) {
    return head_pointer<T>(base, s, batch, head) + row * s.row;
}

}  // namespace flashcore
