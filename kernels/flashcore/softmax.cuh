// softmax.cuh - online softmax (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022, alg.
// 1).
//
// Per query row, over tiles of keys: m the running maximum, l the running sum of p = exp(s - m), O
// the running sum of p v. A tile that raises m multiplies what was summed before by
// exp(m_old - m_new) <= 1. Scores arrive already multiplied by log2(e), so exp is exp2.
#pragma once
#include <flashcore/debug.cuh>
#include <flashcore/mask.cuh>
#include <flashcore/ptx_convert.cuh>
#include <flashcore/ptx_warp.cuh>

namespace flashcore {

// m and l start where nothing has been seen. A thread's sum covers only the columns that it
// handled; the threads of a row add theirs up once, after the last tile.
struct RowState {
    float max = NEG_INFINITY;
    float sum = 0.0f;
};

// A row that has seen no key has m = -inf, and -inf - -inf is NaN: subtract 0 instead.
__device__ __forceinline__ float finite_max(float m) { return m == NEG_INFINITY ? 0.0f : m; }

// Raises the maximum to tile_max; returns the factor for what was accumulated so far.
__device__ __forceinline__ float raise_max(RowState& row, float tile_max) {
    const float old_max = row.max;
    row.max = fmaxf(old_max, tile_max);
    const float rescale = exp2_approx(old_max - finite_max(row.max));
    row.sum *= rescale;
    return rescale;
}

// The factors by which two partial results, found with maxima `a` and `b`, are to be added.
struct MergeFactors {
    float max, a, b;

    __device__ __forceinline__ MergeFactors(float a_max, float b_max)
        : max(fmaxf(a_max, b_max)),
          a(exp2_approx(a_max - finite_max(max))),
          b(exp2_approx(b_max - finite_max(max))) {}
};

// A sink is a logit without a value: it joins m and l. Returns the factor for O.
__device__ __forceinline__ float add_sink(RowState& row, float logit) {
    const MergeFactors merge(row.max, logit * LOG2_E);
    row.max = merge.max;
    row.sum = row.sum * merge.a + merge.b;
    return merge.a;
}

// A query that saw no key has l = 0: its output is 0 and its LSE -inf.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

__device__ __forceinline__ float log_sum_exp(float max, float sum) {
    return sum == 0.0f ? NEG_INFINITY : (max + log2f(sum)) * LN_2;
}

// Scaled, masked score in log2 units.
template <bool MASKED, bool CAUSAL, int GATE>
__device__ __forceinline__ float masked_score(float score, float scale_log2, int query, int key,
                                              const Mask<CAUSAL>& mask, const GateRow<GATE>& gate) {
    const bool visible = !MASKED || mask.visible(query, key);
    gate.score(key, score, visible);
    return visible ? gate.raw_score(score) * scale_log2 : NEG_INFINITY;
}

}  // namespace flashcore
