// keywords.h - what a CUDA compiler knows without any header. Included before everything else.
#pragma once
#include <cstddef>
// Of libstdc++'s math.h, C++17's special functions are most of the work; no kernel calls them.
#undef _GLIBCXX_USE_STD_SPEC_FUNCS
#include <math.h>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

void __nanosleep(unsigned nanoseconds);

struct uint2 {
    unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct float2 {
    float x, y;
} __attribute__((aligned(8)));
struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));

template <typename T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
constexpr unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
constexpr unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
