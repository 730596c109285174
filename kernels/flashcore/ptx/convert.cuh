// ptx/convert.cuh - conversions between the storage types and fp32. Each is one instruction where
// every architecture has it, else the few that replace it.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// bf16 is the upper half of an fp32.
__device__ __forceinline__ float to_float(bfloat16_t x) {
    return __uint_as_float(uint32(x.bits) << 16);
}

// e4m3: sign, 4 exponent bits (bias 7), 3 fraction bits; no infinity, 0x7f and 0xff are NaN. Its
// bits, shifted to where fp16 keeps them (bias 15), are the value times 2^-8, subnormals included.
__device__ __forceinline__ float to_float(e4m3_t x) {
    const uint32 magnitude = x.bits & 0x7fu;
    const uint32 sign = uint32(x.bits & 0x80u) << 8;
    const half_t shifted = {uint16(sign | magnitude << 7)};
    return magnitude == 0x7fu ? __uint_as_float(0x7fffffffu) : to_float(shifted) * 256.0f;
}

// Two e4m3 in 16 bits to two fp16 in 32 bits, exactly. One instruction from sm_89 on. Before, the
// shift of to_float on both halves at once, after which only NaN has to be corrected.
__device__ __forceinline__ uint32 e4m3x2_to_f16x2_shift(uint16 packed) {
    const uint32 spread = (packed & 0xffu) | (packed & 0xff00u) << 8;
    const uint32 shifted = (spread & 0x00800080u) << 8 | (spread & 0x007f007fu) << 7;
    uint32 y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(shifted), "r"(0x5c005c00u));  // 256, 256
    if ((spread & 0x7fu) == 0x7fu) y |= 0x00007fffu;
    if ((spread & 0x7f0000u) == 0x7f0000u) y |= 0x7fff0000u;
    return y;
}

__device__ __forceinline__ uint32 e4m3x2_to_f16x2(uint16 packed) {
#if __CUDA_ARCH__ >= 890
    uint32 y;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(packed));
    return y;
#else
    return e4m3x2_to_f16x2_shift(packed);
#endif
}

// Round to nearest even, saturate at 448; NaN and infinities become NaN. In integer arithmetic, so
// that every architecture gives the same bits (the conversion instruction needs sm_89).
__device__ __forceinline__ e4m3_t to_e4m3(float x) {
    const uint32 bits = __float_as_uint(x);
    const uint32 magnitude = bits & 0x7fffffffu;
    const uint32 sign = bits >> 24 & 0x80u;
    uint32 result;
    if (magnitude >= 0x7f800000u) {
        result = 0x7fu;
    } else if (magnitude < 0x3c800000u) {  // below 2^-6: subnormal, steps of 2^-9
        // Adding 2^23 rounds to an integer, which then stands in the lowest bits.
        result = __float_as_uint(__uint_as_float(magnitude) * 512.0f + 8388608.0f) & 0xffu;
    } else {
        const uint32 rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
        result = min((rounded >> 20) - (120u << 3), 0x7eu);  // bias 127 to 7; 0x7e is 448
    }
    return {uint8(sign | result)};
}

template <typename T>
__device__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
    half_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float x) {
    bfloat16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));  // sm_80 and later
    return y;
}

// Two values in one 32-bit register, `lo` at the lower address.
template <typename T>
__device__ uint32 pack2(float lo, float hi);

template <>
__device__ __forceinline__ uint32 pack2<half_t>(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
    uint32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));  // first source: upper half
    return y;
#else
    return uint32(from_float<half_t>(lo).bits) | uint32(from_float<half_t>(hi).bits) << 16;
#endif
}

template <>
__device__ __forceinline__ uint32 pack2<bfloat16_t>(float lo, float hi) {
    uint32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));  // first source: upper half
    return y;
}

// Two e4m3 to two of T, exactly: three fraction bits fit both, and so does the exponent.
template <typename T>
__device__ uint32 widen_e4m3x2(uint16 packed);

template <>
__device__ __forceinline__ uint32 widen_e4m3x2<half_t>(uint16 packed) {
    return e4m3x2_to_f16x2(packed);
}

template <>
__device__ __forceinline__ uint32 widen_e4m3x2<bfloat16_t>(uint16 packed) {
    const uint32 two = e4m3x2_to_f16x2(packed);
    return pack2<bfloat16_t>(to_float(half_t{uint16(two)}), to_float(half_t{uint16(two >> 16)}));
}

// Splits x = hi + lo for tensor cores that multiply tf32, which is fp32 with 10 fraction bits. hi
// is x rounded to nearest, so lo is at most 2^-11 of x, and of either sign. The tensor cores ignore
// the bits of lo below 2^-22 of x. (cvt.rna rounds in four instructions. Adding half a unit, 2^-11
// of x's power of two, and cutting takes three, and keeps NaN and infinities.) The hi of a tf32 is
// itself, the lo of NaN and infinities is NaN, and the hi of numbers within 2^-11 of the largest
// one is infinite.
__device__ __forceinline__ void split_tf32(float x, uint32& hi, uint32& lo) {
    const float power = __uint_as_float(__float_as_uint(x) & 0xff800000u);  // with x's sign
    hi = __float_as_uint(fmaf(power, 1.0f / 2048, x)) & 0xffffe000u;
    lo = __float_as_uint(x - __uint_as_float(hi));
}

// 1 / x, 1 ulp; 0 at infinity.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float to_float(uint8 x) { return float(x); }

// Interleaves the two lower bytes of `a` and `b`, the lowest of `a` first.
__device__ __forceinline__ uint32 interleave_bytes(uint32 a, uint32 b) {
    return __byte_perm(a, b, 0x5140);
}

// x y, rounded: never a part of a multiply-add, whatever it is added to.
__device__ __forceinline__ float mul_rn(float x, float y) { return __fmul_rn(x, y); }

// exp2 on the special-function unit: 2 ulp, exact at 0, and 0 at -inf.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace flashcore
