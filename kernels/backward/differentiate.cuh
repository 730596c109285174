// differentiate.cuh - from a tile's scores S and dP = dO V^T to P and dS, on the accumulators.
//
//   P  = exp2(t - shift)              t: the score after its rules; shift: the query's LSE
//   dS = P (dP - delta) dt/ds         s: the score before its rules, softmax_scale q . k
//
// With dropout, P as it enters dV = P^T dO is 0 where it was dropped, and so is dP in dS; both are
// to be multiplied by keep_scale, dV at the end.
//
// Where P = 0, as of hidden scores, dS = 0 whatever dP is: what lies behind a mask must not matter.
#pragma once
#include <backward/context.cuh>
#include <backward/listed_walk.cuh>
#include <config.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/softmax/finish_row.cuh>

namespace flashcore {

// Looks up which of its keys each query of the tile sees, by mask and mask_mod, which are not asked
// in full blocks; MASKED: by their positions, too. A lane has FRAGMENTS times two rows.
template <bool MASKED, bool LOOKED_UP, int FRAGMENTS>
__device__ __forceinline__ void look_up_keys(const WarpContext& c, const WalkedTile& at,
                                             KeyBits<LOOKED_UP, TILES_N> (&visible)[FRAGMENTS][2]) {
    if constexpr (LOOKED_UP) {
        const bool is_full = LISTED && state_met(c, at) == BLOCK_FULL;
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < TILES_N; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const Meeting x = c.meeting(at.tile, m, half, n, e);
                        bool seen = is_full || c.rules_for(at.head, x.query).sees_in_mixed(x.key);
                        if (MASKED)
                            seen = seen && x.query < c.work.seqlen_q &&
                                   c.mask().visible(x.query, x.key);
                        visible[m][half].set(n, e, seen);
                    }
    }
}

// Which of the tile's rows some own row of the warp meets. The others count as zeros: 0 * NaN would
// not be 0.
template <bool LOOKED_UP, int FRAGMENTS>
__device__ __forceinline__ KeyBits<LOOKED_UP, TILES_N> rows_seen(
    const KeyBits<LOOKED_UP, TILES_N> (&visible)[FRAGMENTS][2]) {
    KeyBits<LOOKED_UP, TILES_N> seen;
    if constexpr (LOOKED_UP) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) seen.add(visible[m][half]);
        seen.add_rows();
    }
    return seen;
}

// Looks up which probabilities of the tile dropout has kept.
template <int FRAGMENTS>
__device__ __forceinline__ void look_up_kept(const WarpContext& c, const WalkedTile& at,
                                             Kept (&kept)[FRAGMENTS][2]) {
    if constexpr (DROPS<RULES>) {
        const Dropout dropout(c.params, c.work.batch, at.head);
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m) {
            const Meeting first = c.meeting(at.tile, m, 0, 0, 0);
            if constexpr (OWNS_KEYS) {
                dropout.keep_columns(kept[m], first.key, first.query);
            } else {
                dropout.keep_rows(kept[m], first.query, first.key);
            }
        }
    }
}

// 0 stays 0, whatever a rule's derivative is at a score that does not count.
__device__ __forceinline__ float times_slope(float dt, float slope) {
    return dt == 0.0f ? 0.0f : dt * slope;
}

// Whether element e of 8-column group n of a lane's row counts. LOOKED_UP: `visible` says it.
template <bool MASKED, bool LOOKED_UP>
__device__ __forceinline__ bool counts(const WarpContext& c, const WalkedTile& at, int m, int half,
                                       int n, int e, const KeyBits<LOOKED_UP, TILES_N>& visible) {
    if (!MASKED || LOOKED_UP) return visible.has(n, e);
    // Relative to this lane's first column, so that each comparison is with a constant.
    const Columns met = c.columns_met(at.tile, m, half);
    return n * 8 + e < met.end && n * 8 + e >= met.begin;
}

// Its P: t is its score after its rules.
template <bool MASKED, bool LOOKED_UP>
__device__ __forceinline__ float probability(const WarpContext& c, const WalkedTile& at, int m,
                                             int half, int n, int e,
                                             const KeyBits<LOOKED_UP, TILES_N>& visible, float t,
                                             float shift) {
    const bool seen = counts<MASKED>(c, at, m, half, n, e, visible);
    return seen ? exp2_approx(t * exponent_scale<RULES>(c.params) - shift) : 0.0f;
}

// The gradient of a score after its rules.
template <bool MASKED, bool LOOKED_UP = HIDES_KEYS>
__device__ __forceinline__ float score_gradient(float p, float dp, float delta) {
    const float dt = p * (dp - delta);
    return (MASKED || LOOKED_UP) && p == 0.0f ? 0.0f : dt;
}

// P, without what was dropped, and dS of two neighbouring columns of a row.
struct PairOfGradients {
    float p[2], ds[2];
    PerElement elements;  // what they add to the gradients of elements of mod_args
};

// Computes them for 8-column group n of a lane's row: s, dp: its elements of S and dP; of[e]: the
// statistics of the query of element e. Calls added(x, dt) with the gradient of what ALiBi and the
// bias add to the score of meeting x.
template <bool MASKED, bool LOOKED_UP, typename Added>
__device__ __forceinline__ PairOfGradients differentiate(const WarpContext& c, const WalkedTile& at,
                                                         int m, int half, int n,
                                                         const KeyBits<LOOKED_UP, TILES_N>& visible,
                                                         const Kept& kept, const float (&s)[2],
                                                         const float (&dp)[2],
                                                         const Statistics (&of)[2], Added added) {
    PairOfGradients pair;
#pragma unroll
    for (int number = 0; number < MOD_ELEMENTS; ++number) pair.elements.x[number] = 0.0f;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const Meeting x = c.meeting(at.tile, m, half, n, e);
        float t = s[e];
        ScoreSlopes slopes = {1.0f, 1.0f};
        if constexpr (RowRules<T, RULES>::CHANGES_SCORES)
            slopes = c.rules_for(at.head, x.query).template change_with_slopes<MASKED>(t, x.key);
        const float p = probability<MASKED>(c, at, m, half, n, e, visible, t, of[e].shift);
        const float dp_kept = kept.select(n, e, dp[e] * keep_scale<RULES>(c.params));
        const float dt = score_gradient<MASKED, LOOKED_UP>(p, dp_kept, of[e].delta);
        pair.p[e] = kept.select(n, e, p);
        pair.ds[e] = RowRules<T, RULES>::CHANGES_SCORES ? times_slope(dt, slopes.score) : dt;
        added(x, RowRules<T, RULES>::CHANGES_SCORES ? times_slope(dt, slopes.added) : dt);
#pragma unroll
        for (int number = 0; number < MOD_ELEMENTS; ++number)
            pair.elements.x[number] += times_slope(dt, slopes.elements.x[number]);
        if (GATE != GATE_NONE && counts<MASKED>(c, at, m, half, n, e, visible)) {
            const int64 row = statistics_row(c.params, c.work.batch, at.head) + x.query;
            gate_gradient<GATE>(c.params, row, x.key, dp[e], pair.ds[e]);
        }
    }
    return pair;
}

}  // namespace flashcore
