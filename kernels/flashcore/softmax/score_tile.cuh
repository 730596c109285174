// score_tile.cuh - what a tile of scores goes through after Q K^T, a row at a time: rules and
// masks, the row's maximum, exponentials with a given shift.
//
// It is the same for mma.sync and wgmma, because both spread a row over four neighbouring lanes: of
// every 8 keys, lane l has keys 2 (l % 4) and 2 (l % 4) + 1. The caller passes an accessor, row:
// row(n, e) refers to the score of key 8 n + e, counted from the lane's first key.
#pragma once
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/dropout.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

constexpr int QUAD = 4;  // lanes that share a row

template <typename T, int RULES>
__device__ __forceinline__ RowRules<T, RULES> rules_of(const AttentionParams& params, const Work& w,
                                                       const QueryRow& q) {
    return {params, w.batch, q.head, q.query, w.seqlen_q, w.seqlen_kv, w.diagonal};
}

template <int RULES, int GATE>
__device__ __forceinline__ GateRow<GATE> gate_of(const AttentionParams& params, const Work& w,
                                                 const QueryRow& q) {
    const int64 row = (int64(w.batch) * params.heads_q + q.head) * w.seqlen_q + q.query;
    return {params, row, q.valid, RULES & SCORE_RULES ? 1.0f : params.softmax_scale};
}

// Looks up which probabilities of a lane's two rows dropout keeps, of PAIRS pairs of keys from
// first_key on. low: the first of the rows; the other is 8 further, and of the same head.
template <int RULES, int PAIRS>
__device__ __forceinline__ void look_up_kept(const AttentionParams& params, const Work& w,
                                             const QueryRow& low, int first_key,
                                             KeptBits<RULES, PAIRS> (&kept)[2]) {
    if constexpr (DROPS<RULES>) {
        kept[0] = kept[1] = KeptBits<RULES, PAIRS>();
        Dropout(params, w.batch, low.head).keep_rows(kept, low.query, first_key);
    }
}

// Applies the rules to the lane's PAIRS pairs of keys, and sets the scores of hidden keys to -inf:
// keys that are not in `visible`; where nothing was LOOKED_UP, and MASKED, keys that the query does
// not see by its position. Calls each(e, score) for every score. The query may lie behind the
// sequence's last.
template <bool MASKED, int PAIRS, bool LOOKED_UP, typename T, int RULES, int GATE, bool RIGHT,
          bool LEFT, typename Row, typename Each>
__device__ __forceinline__ void apply_rules(Row row, const RowRules<T, RULES>& rules,
                                            const GateRow<GATE>& gate,
                                            const PositionMask<RIGHT, LEFT>& mask, int query,
                                            const KeyBits<LOOKED_UP, PAIRS>& visible, int first_key,
                                            Each each) {
    using ThisRow = RowRules<T, RULES>;
    // Relative to this lane's first key, so that each comparison is with a constant.
    const int begin = mask.row_begin(query) - first_key;
    const int end = mask.row_end(query) - first_key;
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
        float s[2] = {row(n, 0), row(n, 1)};
        if constexpr (ThisRow::CHANGES_SCORES) rules.template change<MASKED>(s, first_key + n * 8);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int key = n * 8 + e;
            bool seen = visible.has(n, e);
            if (MASKED && !LOOKED_UP) seen = key < end && (!LEFT || key >= begin);
            gate.score(first_key + key, s[e], seen);
            row(n, e) = seen ? gate.raw_score(s[e]) : NEG_INFINITY;
            each(e, row(n, e));
        }
    }
}

// The same. Returns the largest of `max` and of the row's scores, of all four lanes.
template <bool MASKED, int PAIRS, bool LOOKED_UP, typename T, int RULES, int GATE, bool RIGHT,
          bool LEFT, typename Row>
__device__ __forceinline__ float apply_rules_and_find_max(Row row, const RowRules<T, RULES>& rules,
                                                          const GateRow<GATE>& gate,
                                                          const PositionMask<RIGHT, LEFT>& mask,
                                                          int query,
                                                          const KeyBits<LOOKED_UP, PAIRS>& visible,
                                                          int first_key, float max) {
    float chain[2] = {max, NEG_INFINITY};  // of even and odd keys: two independent chains
    const auto raise = [&](int e, float s) { chain[e] = fmaxf(chain[e], s); };
    apply_rules<MASKED, PAIRS>(row, rules, gate, mask, query, visible, first_key, raise);
    return group_max<QUAD>(fmaxf(chain[0], chain[1]));
}

// Computes p = exp2(score scale - shift) of pair n and calls each(e, p). T: what p is rounded to
// before it enters P V. first_key(): the lane's first key; only a gate calls it.
template <typename T, int GATE, typename Row, typename FirstKey, typename Each>
__device__ __forceinline__ void exponentiate_pair(Row row, int n, float scale, float shift,
                                                  const GateRow<GATE>& gate, FirstKey first_key,
                                                  Each each) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const float p = exp2_approx(row(n, e) * scale - shift);
        each(e, p);
        gate.probability(first_key() + n * 8 + e, to_float(from_float<T>(p)));
    }
}

}  // namespace flashcore
