// finish_row.cuh - the end of a row whose m and l are complete: its sink, its LSE, what O is
// multiplied by.
#pragma once
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/schedule.cuh>
#include <flashcore/score.cuh>
#include <flashcore/softmax.cuh>

namespace flashcore {

// Returns the factor for O. One of the threads that have the row writes the LSE.
template <int RULES, int GATE>
__device__ __forceinline__ float finish_row(const AttentionParams& p, const Work& w,
                                            const QueryRow& q, const GateRow<GATE>& gate,
                                            RowState& row, bool writes_lse) {
    float factor = 1.0f;
    if constexpr (RULES & RULE_SINK && GATE != GATE_PV)
        if (q.valid) factor = add_sink(row, p.sink[q.head]);
    if (writes_lse) {
        gate.finish(row.max, row.sum);
        if (p.lse != nullptr && q.valid)
            p.lse[w.batch * p.lse_strides.batch + q.head * p.lse_strides.head + w.start_q +
                  q.query] = log_sum_exp(row.max, row.sum);
    }
    return factor * inverse_sum(row.sum);
}

}  // namespace flashcore
