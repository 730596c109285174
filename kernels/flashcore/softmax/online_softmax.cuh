// online_softmax.cuh - online softmax (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022,
// alg. 1).
//
// Each query row has, over the tiles of keys so far, m the running maximum, l the running sum of
// p = exp(s - m), and O the running sum of p v. A tile that raises m multiplies l and O by
// exp(m_old - m_new) <= 1.
//
// The fast kernels leave m where it is if it would rise by a factor of 2^4 or less (held_max): O
// and l are then up to 16 times what they were, which cancels in the end, and O is seldom
// multiplied at all (FlashAttention-4 does so at 2^8). A row decides for itself, so its bits do not
// depend on others.
//
// Scores may have any size. The largest score's p should be 1; whatever it is instead is a factor
// of l and O.
//   - The ladder's kernels first subtract m from the score, then multiply by log2(e)
//     (ladder/natural_softmax.cuh).
//   - The fast kernels leave m in the scores' own unit and have one multiply-add per score,
//     p = exp2(s scale - shift). Its product is exact, but shift = m scale is rounded, so the
//     largest p is 2^d, where d is up to 2^-24 of shift. That cancels in O and LSE as long as it is
//     small. Rows where it is not small ("far": far from 0) are computed again: exact_row.cuh.
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

// What is subtracted from scores: m, or 0 if the row has seen no key, because -inf - -inf is NaN.
__device__ __forceinline__ float finite_max(float m) { return m == NEG_INFINITY ? 0.0f : m; }

// ---- scores in any unit; `scale` is the factor to log2 units -----------------------------------

// From here on, an error of 2^-24 of a shift is too large for an exponent.
constexpr float LARGE_SHIFT = 4194304.0f;  // 2^22

// What the exponents subtract, in log2 units. It is bounded below, so that no exponent overflows in
// a row whose scores so far lie further down: their p is 0 then, as it is if the row has seen no
// key.
__device__ __forceinline__ float shift_of(float max, float scale) {
    return fmaxf(mul_rn(max, scale), -LARGE_SHIFT);
}

// How far scores may lie above m, in log2 units. The more, the sooner O overflows.
constexpr float MAX_ABOVE = 4.0f;

// The m to go on with, where new_max is the largest score so far.
__device__ __forceinline__ float held_max(float m, float new_max, float scale) {
    return mul_rn(new_max, scale) - mul_rn(m, scale) <= MAX_ABOVE ? m : new_max;
}

// Raises the maximum and rescales l. Returns the factor for O, which is exactly 1 if the maximum
// stays.
__device__ __forceinline__ float raise_max(RowState& row, float new_max, float shift, float scale) {
    const float rescale = exp2_approx(mul_rn(row.max, scale) - shift);
    row.max = new_max;
    row.sum *= rescale;
    return rescale;
}

// Whether a row with this maximum has to be computed again: it has seen keys, and its largest score
// is too far from 0, up or down. To ask once, at the end, is enough. A maximum only rises: if it
// was far on the way and is not in the end, it was far down, and those scores added nothing.
__device__ __forceinline__ bool is_far(float max, float scale) {
    return !(fabsf(mul_rn(max, scale)) < LARGE_SHIFT) && max != NEG_INFINITY;
}

// The factor for partials whose maximum is `from`, when they are combined at a maximum `max` >=
// from.
__device__ __forceinline__ float rescale_to(float from, float max, float scale) {
    if (from == NEG_INFINITY) return 0.0f;  // they have seen no key
    return exp2_approx(is_far(max, scale) ? (from - max) * scale
                                          : mul_rn(from, scale) - mul_rn(max, scale));
}

// The factors of two partials that are combined; a_max, b_max: their maxima.
struct CombineFactors {
    float max, a, b;

    __device__ __forceinline__ CombineFactors(float a_max, float b_max, float scale)
        : max(fmaxf(a_max, b_max)) {
        a = rescale_to(a_max, max, scale);
        b = rescale_to(b_max, max, scale);
    }
};

// ---- the end of a row, its maximum in natural units --------------------------------------------

// A sink is a logit without a value: it joins m and l. Returns the factor for O.
__device__ __forceinline__ float add_sink(RowState& row, float logit) {
    const CombineFactors by(row.max, logit, LOG2_E);
    row.max = by.max;
    row.sum = row.sum * by.a + by.b;
    return by.a;
}

// A query that saw no key has l = 0: its output is 0 and its LSE -inf.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

__device__ __forceinline__ float log_sum_exp(float max, float sum) {
    return sum == 0.0f ? NEG_INFINITY : max + log2f(sum) * LN_2;
}

}  // namespace flashcore
