// mods.cuh - score_mod and mask_mod for calls that have none. For other calls a header of this name
// is generated (problem/mods.py) and takes its place: there these two functions return the user's
// expressions, and every array of mod_args is a variable that is indexed by element. For gradients
// score_mod takes a Dual, too; and for those of mod_args there is, for each element that they are
// wanted of, mod_element(Element<N>, b, h), its index, and score_mod_by(Element<N>, ...), whose
// slope is the derivative by it.
#pragma once
#include <flashcore/rules/dual.cuh>
#include <flashcore/rules/mod_array.cuh>

namespace flashcore {

constexpr int MOD_ELEMENTS = 0;

__device__ __forceinline__ float score_mod(const ModArgs&, float score, int, int, int, int) {
    return score;
}
__device__ __forceinline__ Dual score_mod(const ModArgs&, Dual score, int, int, int, int) {
    return score;
}

__device__ __forceinline__ bool mask_mod(const ModArgs&, int, int, int, int) { return true; }

}  // namespace flashcore
