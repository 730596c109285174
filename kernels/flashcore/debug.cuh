// debug.cuh - the debug gates: compiled in, a kernel writes one stage out instead of O, so that a
// wrong result is located in one run. A gate changes what is stored and (for pv) the scores'
// values, never the control flow around a barrier.
//
//   qk       S = softmax_scale * Q K^T, -inf where the mask hides a key
//   softmax  p = exp(s - m_j) as it enters P V, m_j the running row maximum at that tile, and the
//            final m and l: the launcher returns p * exp(m_j - m) / l. Maxima in natural units
//   pv       all scores 0, so O is the mean of the visible rows of V
//   dp, ds   of the backward pass: dP = dO V^T, and dS = P (dP - delta) rules'(S)
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>

namespace flashcore {

constexpr int GATE_NONE = 0;
constexpr int GATE_QK = 1;
constexpr int GATE_SOFTMAX = 2;
constexpr int GATE_PV = 3;
constexpr int GATE_DP = 4;
constexpr int GATE_DS = 5;

// O is written unless the gate asks for an earlier stage.
template <int GATE>
constexpr bool WRITES_OUTPUT = GATE == GATE_NONE || GATE == GATE_PV;

// One query row in the gate's arrays. A method does nothing unless its gate is compiled in.
template <int GATE>
struct GateRow {
    const AttentionParams& params;
    int64 row;    // (batch * Hq + head) * Sq + query
    bool valid;   // the query exists
    float scale;  // raw score to scaled score, natural units

    __device__ __forceinline__ float raw_score(float score) const {
        return GATE == GATE_PV ? 0.0f : score;
    }

    __device__ __forceinline__ void score(int key, float score, bool visible) const {
        if constexpr (GATE == GATE_QK) {
            if (valid && key < params.gate_row)
                params.gate[row * params.gate_row + key] = visible ? score * scale : NEG_INFINITY;
        }
    }

    __device__ __forceinline__ void probability(int key, float p) const {
        if constexpr (GATE == GATE_SOFTMAX) {
            if (valid && key < params.gate_row) params.gate[row * params.gate_row + key] = p;
        }
    }

    __device__ __forceinline__ void tile_max(int tile, float max) const {
        if constexpr (GATE == GATE_SOFTMAX) {
            if (valid) params.gate_tile_max[row * params.gate_tiles + tile] = max;
        }
    }

    // Of a row that four neighbouring lanes share: one of them stores.
    __device__ __forceinline__ void quad_tile_max(int tile, float max) const {
        if (thread_index() % 4 == 0) tile_max(tile, max);
    }

    __device__ __forceinline__ void finish(float max, float sum) const {
        if constexpr (GATE == GATE_SOFTMAX) {
            if (valid) {
                params.gate_row_max[row] = max;
                params.gate_row_sum[row] = sum;
            }
        }
    }
};

// A query and a key that it sees, in the gate's array; what nobody sees stays 0. `row` is as above.
// Does nothing unless one of the gates is compiled in.
template <int GATE>
__device__ __forceinline__ void gate_gradient(const AttentionParams& params, int64 row, int key,
                                              float dp, float ds) {
    if constexpr (GATE == GATE_DP || GATE == GATE_DS)
        params.gate[row * params.gate_row + key] = GATE == GATE_DP ? dp : ds;
}

}  // namespace flashcore
