// finish_row.cuh - the end of a row whose m and l are complete: its sink, its LSE, and the factor
// of its O.
#pragma once
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/rules/dropout.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/softmax/online_softmax.cuh>

namespace flashcore {

// Scores and m are raw products q . k, or with score rules natural units. These are the factors to
// log2 units, which exponents take, and to natural units.
template <int RULES>
__device__ __forceinline__ float exponent_scale(const AttentionParams& p) {
    return RULES & SCORE_RULES ? LOG2_E : p.scale_log2;
}
template <int RULES>
__device__ __forceinline__ float natural_scale(const AttentionParams& p) {
    return RULES & SCORE_RULES ? 1.0f : p.softmax_scale;
}

// Makes m and l final: m in natural units, the sink in both. Returns the factor for O, which still
// has to be divided by l.
template <int RULES, int GATE>
__device__ __forceinline__ float finish_state(const AttentionParams& p, const Work& w,
                                              const QueryRow& q, RowState& row) {
    float factor = keep_scale<RULES>(p);
    row.max *= natural_scale<RULES>(p);
    if constexpr (RULES & RULE_SINK && GATE != GATE_PV)
        if (q.valid && w.batch != NO_SEQUENCE) factor *= add_sink(row, p.sink[q.head]);
    return factor;
}

// One of the threads that have the row does this, of final m and l.
template <int GATE>
__device__ __forceinline__ void write_lse(const AttentionParams& p, const Work& w,
                                          const QueryRow& q, const GateRow<GATE>& gate,
                                          const RowState& row) {
    gate.finish(row.max, row.sum);
    if (p.lse != nullptr && q.valid)
        p.lse[w.batch * p.lse_strides.batch + q.head * p.lse_strides.head + w.start_q + q.query] =
            log_sum_exp(row.max, row.sum);
}

// All of it. Returns the factor for O. writes_lse: whether this thread writes the row's LSE.
template <int RULES, int GATE>
__device__ __forceinline__ float finish_row(const AttentionParams& p, const Work& w,
                                            const QueryRow& q, const GateRow<GATE>& gate,
                                            RowState& row, bool writes_lse) {
    const float factor = finish_state<RULES, GATE>(p, w, q, row);
    if (writes_lse) write_lse(p, w, q, gate, row);
    return factor * inverse_sum(row.sum);
}

}  // namespace flashcore
