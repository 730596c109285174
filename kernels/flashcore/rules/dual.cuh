// dual.cuh - numbers that carry their derivative. A score_mod is evaluated on one, and so gives its
// own derivative by the score (forward-mode differentiation: Wengert 1964; Griewank and Walther
// 2008, chapter 3).
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

// In a namespace of its own, with all functions as friends: so they are found for duals alone, and
// tanhf(float) stays what it is.
namespace dual_numbers {

struct Dual {
    float value;
    float slope;  // the derivative of the value by the score

    // A constant. Not the other way round: a number made of a dual would lose the slope unnoticed.
    __device__ __forceinline__ Dual(float value) : value(value), slope(0.0f) {}
    __device__ __forceinline__ Dual(double value) : Dual(float(value)) {}
    __device__ __forceinline__ Dual(int value) : Dual(float(value)) {}
    __device__ __forceinline__ Dual(uint32 value) : Dual(float(value)) {}
    __device__ __forceinline__ Dual(int64 value) : Dual(float(value)) {}
    __device__ __forceinline__ Dual(float value, float slope) : value(value), slope(slope) {}

    // f(x) with derivative f'(x) at this x.
    __device__ __forceinline__ Dual then(float f, float derivative) const {
        // A constant stays one, where the derivative is infinite, too.
        return {f, slope == 0.0f ? 0.0f : derivative * slope};
    }

    friend __device__ __forceinline__ Dual operator+(Dual a) { return a; }
    friend __device__ __forceinline__ Dual operator-(Dual a) { return {-a.value, -a.slope}; }
    friend __device__ __forceinline__ Dual operator+(Dual a, Dual b) {
        return {a.value + b.value, a.slope + b.slope};
    }
    friend __device__ __forceinline__ Dual operator-(Dual a, Dual b) {
        return {a.value - b.value, a.slope - b.slope};
    }
    friend __device__ __forceinline__ Dual operator*(Dual a, Dual b) {
        return {a.value * b.value, a.then(0, b.value).slope + b.then(0, a.value).slope};
    }
    friend __device__ __forceinline__ Dual operator/(Dual a, Dual b) {
        const float ratio = a.value / b.value;
        return {ratio, a.then(0, 1.0f / b.value).slope + b.then(0, -ratio / b.value).slope};
    }

#define FLASHCORE_COMPARISON(op)                                         \
    friend __device__ __forceinline__ bool operator op(Dual a, Dual b) { \
        return a.value op b.value;                                       \
    }
    FLASHCORE_COMPARISON(<)
    FLASHCORE_COMPARISON(<=)
    FLASHCORE_COMPARISON(>)
    FLASHCORE_COMPARISON(>=)
    FLASHCORE_COMPARISON(==)
    FLASHCORE_COMPARISON(!=)
#undef FLASHCORE_COMPARISON

// A function of C, with its names in single and in double precision; x: its argument, y: its
// value.
#define FLASHCORE_FUNCTION(name, derivative)                 \
    friend __device__ __forceinline__ Dual name##f(Dual a) { \
        const float x = a.value, y = ::name##f(x);           \
        return a.then(y, derivative);                        \
    }                                                        \
    friend __device__ __forceinline__ Dual name(Dual a) { return name##f(a); }
    FLASHCORE_FUNCTION(exp, y)
    FLASHCORE_FUNCTION(exp2, y* LN_2)
    FLASHCORE_FUNCTION(expm1, y + 1.0f)
    FLASHCORE_FUNCTION(log, 1.0f / x)
    FLASHCORE_FUNCTION(log2, LOG2_E / x)
    FLASHCORE_FUNCTION(log1p, 1.0f / (1.0f + x))
    FLASHCORE_FUNCTION(sqrt, 0.5f / y)
    FLASHCORE_FUNCTION(tanh, 1.0f - y * y)
    FLASHCORE_FUNCTION(sinh, ::coshf(x))
    FLASHCORE_FUNCTION(cosh, ::sinhf(x))
    FLASHCORE_FUNCTION(sin, ::cosf(x))
    FLASHCORE_FUNCTION(cos, -::sinf(x))
    FLASHCORE_FUNCTION(atan, 1.0f / (1.0f + x * x))
    FLASHCORE_FUNCTION(erf, 1.1283791670955126f * ::expf(-x * x))  // 2 / sqrt(pi)
    FLASHCORE_FUNCTION(fabs, y == x ? 1.0f : -1.0f)
    FLASHCORE_FUNCTION(floor, 0.0f)
    FLASHCORE_FUNCTION(ceil, 0.0f)
    FLASHCORE_FUNCTION(trunc, 0.0f)
    FLASHCORE_FUNCTION(round, 0.0f)
#undef FLASHCORE_FUNCTION
    friend __device__ __forceinline__ Dual abs(Dual a) { return fabsf(a); }
    friend __device__ __forceinline__ Dual fmaxf(Dual a, Dual b) {
        return a.value >= b.value || b.value != b.value ? a : b;
    }
    friend __device__ __forceinline__ Dual fminf(Dual a, Dual b) {
        return a.value <= b.value || b.value != b.value ? a : b;
    }
    friend __device__ __forceinline__ Dual fmax(Dual a, Dual b) { return fmaxf(a, b); }
    friend __device__ __forceinline__ Dual fmin(Dual a, Dual b) { return fminf(a, b); }
    friend __device__ __forceinline__ Dual max(Dual a, Dual b) { return fmaxf(a, b); }
    friend __device__ __forceinline__ Dual min(Dual a, Dual b) { return fminf(a, b); }
    friend __device__ __forceinline__ Dual fmaf(Dual a, Dual b, Dual c) { return a * b + c; }
    friend __device__ __forceinline__ Dual powf(Dual a, Dual b) {
        const float y = ::powf(a.value, b.value);
        return {y, a.then(0, b.value * ::powf(a.value, b.value - 1.0f)).slope +
                       b.then(0, y * ::logf(a.value)).slope};
    }
    friend __device__ __forceinline__ Dual pow(Dual a, Dual b) { return powf(a, b); }
};

}  // namespace dual_numbers

using dual_numbers::Dual;

}  // namespace flashcore
