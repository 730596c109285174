// types.cuh - the names that everything else is written in. No CUDA header is needed: NVRTC's own
// packages do not bring them, and a kernel that includes nothing compiles in a fraction of a
// second.
#pragma once

namespace flashcore {

using int64 = long long;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

// Storage types. Arithmetic on them happens in fp32 or in the tensor cores, never here, so each is
// only its bits; ptx/convert.cuh turns them into float and back.
struct half_t {
    uint16 bits;
};
struct bfloat16_t {
    uint16 bits;
};
struct e4m3_t {
    uint8 bits;
};

// The instruction takes a type's name, not its size: fp16 and bf16 differ only in this tag.
template <typename T>
constexpr bool IS_BFLOAT16 = false;
template <>
constexpr bool IS_BFLOAT16<bfloat16_t> = true;

constexpr int WARP_SIZE = 32;
constexpr float NEG_INFINITY = __builtin_bit_cast(float, 0xff800000u);
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__host__ __device__ constexpr int div_up(int a, int b) { return (a + b - 1) / b; }

// Vectors of 1 to 16 bytes, for one load or store instruction each.
template <int BYTES>
struct VectorType;
template <>
struct VectorType<1> {
    using type = uint8;
};
template <>
struct VectorType<2> {
    using type = uint16;
};
template <>
struct VectorType<4> {
    using type = uint32;
};
template <>
struct VectorType<8> {
    using type = uint2;
};
template <>
struct VectorType<16> {
    using type = uint4;
};
template <int BYTES>
using Vector = typename VectorType<BYTES>::type;

}  // namespace flashcore
