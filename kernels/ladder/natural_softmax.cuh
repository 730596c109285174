// natural_softmax.cuh - the ladder's online softmax, on scores in natural units: see
// flashcore/softmax/online_softmax.cuh.
#pragma once
#include <flashcore/debug.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/softmax/online_softmax.cuh>

namespace flashcore {

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * LOG2_E); }

// Raises the maximum to tile_max; returns the factor for what was accumulated so far.
__device__ __forceinline__ float raise_max(RowState& row, float tile_max) {
    const float old_max = row.max;
    row.max = fmaxf(old_max, tile_max);
    const float rescale = exp_approx(old_max - finite_max(row.max));
    row.sum *= rescale;
    return rescale;
}

// Scaled, masked score. The product is rounded before the maximum is subtracted from it: in a
// multiply-add it would not be, and the largest score would not give exp(0).
template <bool MASKED, bool RIGHT, int GATE>
__device__ __forceinline__ float masked_score(float score, float scale, int query, int key,
                                              const PositionMask<RIGHT>& mask,
                                              const GateRow<GATE>& gate) {
    const bool visible = !MASKED || mask.visible(query, key);
    gate.score(key, score, visible);
    return visible ? mul_rn(gate.raw_score(score), scale) : NEG_INFINITY;
}

}  // namespace flashcore
