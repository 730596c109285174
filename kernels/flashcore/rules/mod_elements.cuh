// mod_elements.cuh - the derivatives of the user's score_mod by elements of mod_args, for those
// elements that the generated mods.cuh names.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/rules/mods.cuh>

namespace flashcore {

// A number for each of them.
struct PerElement {
    float x[MOD_ELEMENTS > 0 ? MOD_ELEMENTS : 1];
};

// Finds the derivatives by elements NUMBER, NUMBER + 1, ... The compiler shares what the formula
// computes alike for each.
template <int NUMBER = 0>
__device__ __forceinline__ void slopes_by_elements(PerElement& slopes, const ModArgs& args,
                                                   float score, int b, int h, int q_idx,
                                                   int kv_idx) {
    if constexpr (NUMBER < MOD_ELEMENTS) {
        slopes.x[NUMBER] = score_mod_by(Element<NUMBER>{}, args, score, b, h, q_idx, kv_idx).slope;
        slopes_by_elements<NUMBER + 1>(slopes, args, score, b, h, q_idx, kv_idx);
    }
}

// Returns the number of the first of them that is an array's element `index` in a head of a batch,
// or MOD_ELEMENTS. If there are several, the derivative by each is the whole.
template <int NUMBER = 0>
__device__ __forceinline__ int element_at(int64 index, int b, int h) {
    if constexpr (NUMBER < MOD_ELEMENTS) {
        if (mod_element(Element<NUMBER>{}, b, h) == index) return NUMBER;
        return element_at<NUMBER + 1>(index, b, h);
    } else {
        return MOD_ELEMENTS;
    }
}

}  // namespace flashcore
