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
    float* split_partial;      // the partials of each part of the keys, per block of rows
    // How many parts of the keys have arrived, for each block of rows; in fwd_sm90 WorkCounters.
    // All counters are 0 between launches.
    int* split_arrivals;
    Strides q_strides, k_strides, v_strides, o_strides;
    HeadStrides lse_strides, alibi_strides;
    BroadcastStrides bias_strides, mask_strides;
    int batch;
    int heads_q;
    int heads_kv;
    int group;          // heads of q that share a head of k and v
    int seqlen_q;       // packed batches: all queries
    int seqlen_kv;      // keys that at least one query may see; packed batches: all keys
    int causal_offset;  // the key at query 0's own position: query i stands at i + this
    int window_left;    // query i sees key j >= i + causal_offset - window_left, where windowed
    int window_right;   // query i sees key j <= i + causal_offset + window_right; causal: 0
    int top_left;       // packed batches: query 0's own position is key 0 of its sequence
    int m_blocks;       // blocks of rows per head, all sequences together
    int splits;         // parts of the keys, each the work of one CTA
    int section;        // heads whose blocks of rows are dealt out together; see schedule.cuh
    int gate_row;       // the gate array's row length: the true Skv
    int gate_tiles;     // tiles per row in gate_tile_max
    int rows_padded;    // scratch rows: Sq rounded up to the tile
    int cols_padded;    // scratch columns: seqlen_kv rounded up to the tile
    float softmax_scale;
    float scale_log2;  // softmax_scale * log2(e): exp(x) = exp2(x * log2(e))
    float softcap, inverse_softcap;
};

__device__ __forceinline__ int kv_head(const AttentionParams& p, int head) {
    return head / p.group;
}

// Counters in global memory that all CTAs of fwd_sm90 share.
struct WorkCounters {
    int claimed;      // blocks that were claimed, without those that the launch gives to the CTAs
    int arrivals[1];  // parts of the keys that have arrived, for each block of rows
};
__device__ __forceinline__ WorkCounters& counters_of(const AttentionParams& p) {
    return *reinterpret_cast<WorkCounters*>(p.split_arrivals);
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
