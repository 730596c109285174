// mod_array.cuh - the arrays that a generated mods.cuh indexes.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/rules/dual.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// An array of mod_args, indexed by element in C order. A 16-bit float is read as a float.
template <typename T>
struct ModArray {
    const T* data;
    __device__ __forceinline__ T operator[](int64 i) const { return data[i]; }
};
template <>
struct ModArray<half_t> {
    const half_t* data;
    __device__ __forceinline__ float operator[](int64 i) const { return to_float(data[i]); }
};
template <>
struct ModArray<bfloat16_t> {
    const bfloat16_t* data;
    __device__ __forceinline__ float operator[](int64 i) const { return to_float(data[i]); }
};

// The same, where one element is what a score is differentiated by.
template <typename T>
struct SeededArray {
    ModArray<T> array;
    int64 seed;
    __device__ __forceinline__ Dual operator[](int64 i) const {
        return {float(array[i]), i == seed ? 1.0f : 0.0f};
    }
};

// Names an element by its number among those that gradients are wanted of.
template <int NUMBER>
struct Element {};

}  // namespace flashcore
