// mods.cuh - the user's score_mod and mask_mod. This file stands where a call has none; where it
// has, jit.py puts a generated header of this name in its place, with the user's expressions as
// these two functions' results and every mod_args array as a variable that is indexed by element.
#pragma once
#include <flashcore/rules/mod_array.cuh>

namespace flashcore {

__device__ __forceinline__ float score_mod(const ModArgs&, float score, int, int, int, int) {
    return score;
}

__device__ __forceinline__ bool mask_mod(const ModArgs&, int, int, int, int) { return true; }

}  // namespace flashcore
