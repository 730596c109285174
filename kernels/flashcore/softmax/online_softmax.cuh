// online_softmax.cuh - online softmax (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022,
// alg. 1).
//
// Each query row has three numbers over the tiles of keys so far: m the running maximum, l the
// running sum of p = exp(s - m), O the running sum of p v. A tile that raises m multiplies what was
// summed before by exp(m_old - m_new) <= 1.
//
// Scores may have any size. The largest score's p must be 1: l and O are off by whatever it is
// instead.
//   - The ladder's kernels subtract m from the score first and multiply by log2(e) then
//     (ladder/natural_softmax.cuh).
//   - The fast kernels leave m in the scores' own unit and have one multiply-add per score,
//     p = exp2(s scale - shift). Its product is exact, but shift = m scale is rounded, so that the
//     largest p is 2^d, where d is up to 2^-24 of shift. That cancels in O and LSE as long as it is
//     small. Rows where it is not small are done again: see exact_row.cuh.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/warp.cuh>

namespace flashcore {

// m and l of a row that has seen no key yet. A thread's sum covers only the keys that the thread
// has; the threads of a row add up their sums once, after the last tile.
struct RowState {
    float max = NEG_INFINITY;
    float sum = 0.0f;
};

// What is subtracted from scores: m; but 0 if a row has seen no key, for -inf - -inf is NaN.
__device__ __forceinline__ float finite_max(float m) { return m == NEG_INFINITY ? 0.0f : m; }

// ---- scores in a unit of which `scale` is log2 units -------------------------------------------

// From here on 2^-24 of a shift is too much for p.
constexpr float LARGE_SHIFT = 4194304.0f;  // 2^22

// What the exponents subtract, in log2 units. The bound below keeps exponents from overflowing
// where all that a row has seen so far lies further down: p is 0 then, also if it has seen no key.
__device__ __forceinline__ float shift_of(float max, float scale) {
    return fmaxf(mul_rn(max, scale), -LARGE_SHIFT);
}

// Raises the maximum. Returns the factor for what was accumulated so far, which is exactly 1 if the
// maximum stays.
__device__ __forceinline__ float raise_max(RowState& row, float new_max, float shift, float scale) {
    const float rescale = exp2_approx(mul_rn(row.max, scale) - shift);
    row.max = new_max;
    row.sum *= rescale;
    return rescale;
}

// Whether a row with this maximum cannot be trusted: it has seen keys, and its largest score is too
// far from 0, up or down. A maximum only rises: if it was far on the way and is not in the end, it
// was far down then, and those scores added nothing.
__device__ __forceinline__ bool is_far(float max, float scale) {
    return !(fabsf(mul_rn(max, scale)) < LARGE_SHIFT) && max != NEG_INFINITY;
}

// The factor for partials whose maximum is `from`, which is not above `max`.
__device__ __forceinline__ float rescale_to(float from, float max, float scale) {
    if (from == NEG_INFINITY) return 0.0f;  // they have seen no key
    return exp2_approx(is_far(max, scale) ? (from - max) * scale
                                          : mul_rn(from, scale) - mul_rn(max, scale));
}

// The factors by which two partials are multiplied before they are added; a_max, b_max: their
// maxima.
struct MergeFactors {
    float max, a, b;

    __device__ __forceinline__ MergeFactors(float a_max, float b_max, float scale)
        : max(fmaxf(a_max, b_max)) {
        a = rescale_to(a_max, max, scale);
        b = rescale_to(b_max, max, scale);
    }
};

// ---- the end of a row, its maximum in natural units --------------------------------------------

// A sink is a logit without a value: it joins m and l. Returns the factor for O.
__device__ __forceinline__ float add_sink(RowState& row, float logit) {
    const MergeFactors merge(row.max, logit, LOG2_E);
    row.max = merge.max;
    row.sum = row.sum * merge.a + merge.b;
    return merge.a;
}

// A query that saw no key has l = 0: its output is 0 and its LSE -inf.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

__device__ __forceinline__ float log_sum_exp(float max, float sum) {
    return sum == 0.0f ? NEG_INFINITY : max + log2f(sum) * LN_2;
}

}  // namespace flashcore
