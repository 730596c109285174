// params_backward.cuh - what the launcher hands to backward kernels. select/params.py describes it,
// too.
#pragma once
#include <flashcore/params.cuh>

namespace flashcore {

// `o` and `lse` are what the forward pass returned, and are only read here; lse is never null.
// Gradients have the shapes of what they belong to. A null one is not asked for.
struct BackwardParams : AttentionParams {
    const void* dout;      // (B, Hq, Sq, Dv)
    const float* dlse;     // (B, Hq, Sq), or null
    void* dq;              // (B, Hq, Sq, D)
    void* dk;              // (B, Hkv, Skv, D)
    void* dv;              // (B, Hkv, Skv, Dv)
    void* dbias;           // the bias's own shape
    float* dsink;          // (Hq)
    float* dalibi_slopes;  // (Hq) or (B, Hq)
    float* delta;          // scratch, (B, Hq, Sq): rowsum(dO * O) - dLSE
    float* shift;          // scratch, (B, Hq, Sq): the LSE in log2 units, +inf where no key is seen
    float* dq_sum;     // scratch, dQ without its scale, in fp32, as accumulators have it; or null
    int* turns;        // scratch: blocks of keys that have been drawn, then of each tile of dq_sum
                       // how many have added to it; or null where they add in any order
    float* distances;  // scratch, (n, B, Hq, Sq): a row's part of the slopes' gradient; behind it,
                       // for each element of mod_args, the parts of a warp's rows in its first one
    Strides dout_strides, dq_strides, dk_strides, dv_strides;
    BroadcastStrides dbias_strides;                   // 0 along an axis that it lacks
    HeadStrides dlse_strides, dalibi_slopes_strides;  // slopes (Hq): 0 along batches
    int64 dq_sum_size, turns_size;                    // how many words
    int n_blocks;  // blocks of keys per head, all sequences together
    int bias_batches, bias_heads, bias_rows, bias_columns;  // the bias's shape
};

// The index of a head's first row in delta and in shift. Of a packed batch: the head's first
// sequence.
__device__ __forceinline__ int64 statistics_row(const BackwardParams& p, int batch, int head) {
    return (int64(batch) * p.heads_q + head) * p.seqlen_q;
}

}  // namespace flashcore
