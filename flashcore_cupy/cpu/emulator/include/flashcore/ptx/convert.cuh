// ptx/convert.cuh on the CPU - conversions that round as the GPU's, and its approximate functions.
#pragma once
#include <emulator/numbers.hpp>
#include <flashcore/types.cuh>

namespace flashcore {

inline float to_float(float x) { return x; }
inline float to_float(half_t x) { return emulator::half_to_float(x.bits); }
inline float to_float(bfloat16_t x) { return emulator::bfloat16_to_float(x.bits); }

// A sign, 4 bits of exponent, 3 of fraction: (8 + fraction) 2^(exponent - 10), or, with exponent 0,
// fraction 2^-9. All bits set are NaN; there is no infinity.
inline float to_float(e4m3_t x) {
    const uint32 magnitude = x.bits & 0x7fu;
    if (magnitude == 0x7fu) return emulator::float_of(emulator::NAN_BITS);
    const uint32 exponent = magnitude >> 3, fraction = magnitude & 7u;
    const float y =
        exponent ? ldexpf(float(8 + fraction), int(exponent) - 10) : ldexpf(float(fraction), -9);
    return x.bits & 0x80u ? -y : y;
}

namespace twin {

// By the instruction a NaN loses its sign; by shifting it keeps it.
inline uint32 e4m3_to_f16(uint32 bits, bool keeps_sign_of_nan) {
    const uint32 sign = (bits & 0x80u) << 8, magnitude = bits & 0x7fu;
    if (magnitude == 0x7fu) return keeps_sign_of_nan ? sign | 0x7fffu : 0x7fffu;
    return sign | emulator::float_to_half(to_float(e4m3_t{uint8(magnitude)}));
}
inline uint32 e4m3x2_to_f16x2(uint16 packed, bool keeps_sign_of_nan) {
    const uint32 low = e4m3_to_f16(packed & 0xffu, keeps_sign_of_nan);
    return low | e4m3_to_f16(packed >> 8, keeps_sign_of_nan) << 16;
}

}  // namespace twin

inline uint32 e4m3x2_to_f16x2_shift(uint16 packed) { return twin::e4m3x2_to_f16x2(packed, true); }
inline uint32 e4m3x2_to_f16x2(uint16 packed) {
#if __CUDA_ARCH__ >= 890
    return twin::e4m3x2_to_f16x2(packed, false);
#else
    return e4m3x2_to_f16x2_shift(packed);
#endif
}

// To nearest, ties to even. Beyond 448, the largest, it is 448; an infinity is NaN.
inline e4m3_t to_e4m3(float x) {
    const uint32 bits = emulator::bits_of(x), magnitude = bits & 0x7fffffffu;
    const uint32 sign = bits >> 24 & 0x80u;
    if (magnitude >= 0x7f800000u) return {uint8(sign | 0x7fu)};
    const float y = emulator::float_of(magnitude);
    if (y < 0x1p-6f) return {uint8(sign | uint32(nearbyintf(y * 512.0f)))};
    // 20 bits are dropped; the exponents count from 127 and from 7.
    const uint32 rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    return {uint8(sign | min((rounded >> 20) - (120u << 3), 0x7eu))};
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline half_t from_float<half_t>(float x) {
    return {emulator::float_to_half(x)};
}
template <>
inline bfloat16_t from_float<bfloat16_t>(float x) {
    return {emulator::float_to_bfloat16(x)};
}

template <typename T>
inline uint32 pack2(float lo, float hi) {
    return uint32(from_float<T>(lo).bits) | uint32(from_float<T>(hi).bits) << 16;
}

template <typename T>
uint32 widen_e4m3x2(uint16 packed);
template <>
inline uint32 widen_e4m3x2<half_t>(uint16 packed) {
    return e4m3x2_to_f16x2(packed);
}
template <>
inline uint32 widen_e4m3x2<bfloat16_t>(uint16 packed) {
    const uint32 two = e4m3x2_to_f16x2(packed);
    return pack2<bfloat16_t>(to_float(half_t{uint16(two)}), to_float(half_t{uint16(two >> 16)}));
}

// hi has x's first 10 bits of fraction, rounded by adding half of the last one; lo has the rest.
inline void split_tf32(float x, uint32& hi, uint32& lo) {
    const float power = emulator::float_of(emulator::bits_of(x) & 0xff800000u);
    hi = emulator::bits_of(emulator::canonical(fmaf(power, 1.0f / 2048, x))) & 0xffffe000u;
    lo = emulator::bits_of(emulator::canonical(x - emulator::float_of(hi)));
}

// Subnormals are 0 to it, and its results are 0 where they would be subnormal. So are
// exp2_approx's.
inline float reciprocal_approx(float x) {
    return emulator::canonical(emulator::flushed(1.0f / emulator::flushed(x)));
}

inline float to_float(uint8 x) { return float(x); }

inline uint32 interleave_bytes(uint32 a, uint32 b) {
    return (a & 0xffu) | (b & 0xffu) << 8 | (a & 0xff00u) << 8 | (b & 0xff00u) << 16;
}

// The compiler is told never to join products and sums (-ffp-contract=off).
inline float mul_rn(float x, float y) { return emulator::canonical(x * y); }

inline float exp2_approx(float x) {
    return emulator::canonical(emulator::flushed(exp2f(emulator::flushed(x))));
}

}  // namespace flashcore
