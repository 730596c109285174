// softcap.cuh - the tanh of a soft cap, as exact as the dtype of q needs it.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// tanh by one exponential has an error of 1e-7; tanh.approx has 5e-4. The score's error is 1e-7 of
// the cap, which is too much for fp32 inputs: those take tanhf. WIDE: the cap is so high that 1e-7
// of it is too much for scores near 0, too; there Taylor's series to x^7 has an error of 4e-7 of x.
template <typename T, bool WIDE>
__device__ __forceinline__ float tanh_for(float x) {
    if constexpr (sizeof(T) == 4) return tanhf(x);
    const float far = 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.0f * LOG2_E * x));
    if constexpr (!WIDE) return far;
    const float y = x * x;
    const float near = x + x * y * (-1.0f / 3 + y * (2.0f / 15 + y * (-17.0f / 315)));
    return fabsf(x) < 0.25f ? near : far;
}

}  // namespace flashcore
