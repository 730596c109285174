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

inline float half_to_float_slow(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = h >> 10 & 31u,
                   fraction = h & 1023u;
    if (exponent == 31) return float_of(fraction ? NAN_BITS : sign | 0x7f800000u);
    if (exponent == 0) {
        const float x = float(fraction) * 0x1p-24f;
        return sign ? -x : x;
    }
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

struct HalfTable {
    float of[65536];
    HalfTable() {
        for (uint32_t i = 0; i < 65536; ++i) of[i] = half_to_float_slow(uint16_t(i));
    }
};
inline float half_to_float(uint16_t h) {
    static const HalfTable table;
    return table.of[h];
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
