// numbers.hpp - half, bfloat16 and e4m3 to float and back, rounded to nearest even as the GPU does.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Whatever NaN goes into an instruction that computes or converts, this one comes out.
constexpr uint32_t NAN_BITS = 0x7fffffffu;
inline float canonical(float x) { return std::isnan(x) ? float_of(NAN_BITS) : x; }

// Both have their exponent before their fraction, so a shift moves both; 112 lies between what
// their exponents count from.
inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = uint32_t(h & 0x7fffu) << 13;
    if (magnitude > 0x7c00u << 13) return float_of(NAN_BITS);
    if (magnitude == 0x7c00u << 13) return float_of(sign | 0x7f800000u);
    return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}
inline float bfloat16_to_float(uint16_t b) { return float_of(uint32_t(b) << 16); }

// x rounded to a multiple of 2^exponent, ties to even.
inline uint16_t float_to_half(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u;
    if (std::isnan(x)) return 0x7fff;  // the GPU's NaN
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00u);
    if (magnitude < 0x1p-14f)  // subnormal: steps of 2^-24
        return uint16_t(sign | uint32_t(std::nearbyint(magnitude * 0x1p24f)));
    const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + (bits >> 13 & 1u);
    return uint16_t(sign | (rounded >> 13) - (112u << 10));
}
inline uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Subnormals become 0, as .ftz has it.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

}  // namespace emulator
