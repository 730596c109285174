// ptx/wmma.cuh - the warp-level matrix instructions, m16n16k16 with fp32 accumulation (PTX ISA,
// "Warp Level Matrix Multiply-Accumulate Instructions: wmma"). CUDA's mma.h is not used: it does
// not come with NVRTC's packages.
//
// A fragment is one 16 x 16 matrix spread over the 32 lanes of a warp. Which lane holds which
// element is not specified, so nothing here or above may assume it. All 32 lanes call together.
// Pointers are 32-byte aligned, to shared memory unless a name says global; ld is the distance
// between rows (columns for `col`) in elements, a multiple of 8 for 16-bit types and of 4 for fp32.
#pragma once
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// 16-bit operand: 8 registers for fp16, 4 for bf16.
template <typename T>
struct FragmentAB {
    static constexpr int REGISTERS = IS_BFLOAT16<T> ? 4 : 8;
    uint32 x[REGISTERS];
};

struct Accumulator {
    float x[8];
};

__device__ __forceinline__ void fill(Accumulator& acc, float value) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc.x[i] = value;
}

// A, stored row by row.
__device__ __forceinline__ void wmma_load_a_row(FragmentAB<half_t>& f, const half_t* p, int ld) {
    asm volatile(
        "wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], "
        "%9;"
        : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3]), "=r"(f.x[4]), "=r"(f.x[5]),
          "=r"(f.x[6]), "=r"(f.x[7])
        : "r"(shared_address(p)), "r"(ld)
        : "memory");
}

__device__ __forceinline__ void wmma_load_a_row(FragmentAB<bfloat16_t>& f, const bfloat16_t* p,
                                                int ld) {
    asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3])
                 : "r"(shared_address(p)), "r"(ld)
                 : "memory");
}

// B, stored row by row: element (k, n) at p[k * ld + n]. V, [key][dim], is such a B.
__device__ __forceinline__ void wmma_load_b_row(FragmentAB<half_t>& f, const half_t* p, int ld) {
    asm volatile(
        "wmma.load.b.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], "
        "%9;"
        : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3]), "=r"(f.x[4]), "=r"(f.x[5]),
          "=r"(f.x[6]), "=r"(f.x[7])
        : "r"(shared_address(p)), "r"(ld)
        : "memory");
}

__device__ __forceinline__ void wmma_load_b_row(FragmentAB<bfloat16_t>& f, const bfloat16_t* p,
                                                int ld) {
    asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3])
                 : "r"(shared_address(p)), "r"(ld)
                 : "memory");
}

// B, stored column by column: element (k, n) at p[n * ld + k]. K, [key][dim], read this way *is*
// its own transpose: no transposing copy is ever needed.
__device__ __forceinline__ void wmma_load_b_col(FragmentAB<half_t>& f, const half_t* p, int ld) {
    asm volatile(
        "wmma.load.b.sync.aligned.col.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], "
        "%9;"
        : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3]), "=r"(f.x[4]), "=r"(f.x[5]),
          "=r"(f.x[6]), "=r"(f.x[7])
        : "r"(shared_address(p)), "r"(ld)
        : "memory");
}

__device__ __forceinline__ void wmma_load_b_col(FragmentAB<bfloat16_t>& f, const bfloat16_t* p,
                                                int ld) {
    asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3])
                 : "r"(shared_address(p)), "r"(ld)
                 : "memory");
}

// acc += A B, A loaded by wmma_load_a_row, B by wmma_load_b_row.
__device__ __forceinline__ void wmma_mma_row_row(Accumulator& d, const FragmentAB<half_t>& a,
                                                 const FragmentAB<half_t>& b) {
    asm volatile(
        "wmma.mma.sync.aligned.row.row.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, "
        "%9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, {%0, %1, %2, "
        "%3, %4, %5, %6, %7};"
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3]), "+f"(d.x[4]), "+f"(d.x[5]),
          "+f"(d.x[6]), "+f"(d.x[7])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(a.x[4]), "r"(a.x[5]), "r"(a.x[6]),
          "r"(a.x[7]), "r"(b.x[0]), "r"(b.x[1]), "r"(b.x[2]), "r"(b.x[3]), "r"(b.x[4]), "r"(b.x[5]),
          "r"(b.x[6]), "r"(b.x[7]));
}

__device__ __forceinline__ void wmma_mma_row_row(Accumulator& d, const FragmentAB<bfloat16_t>& a,
                                                 const FragmentAB<bfloat16_t>& b) {
    asm volatile(
        "wmma.mma.sync.aligned.row.row.m16n16k16.f32.bf16.bf16.f32 {%0, %1, %2, %3, %4, %5, %6, "
        "%7}, {%8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3, %4, %5, %6, %7};"
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3]), "+f"(d.x[4]), "+f"(d.x[5]),
          "+f"(d.x[6]), "+f"(d.x[7])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]), "r"(b.x[2]),
          "r"(b.x[3]));
}

// acc += A B, A loaded by wmma_load_a_row, B by wmma_load_b_col.
__device__ __forceinline__ void wmma_mma_row_col(Accumulator& d, const FragmentAB<half_t>& a,
                                                 const FragmentAB<half_t>& b) {
    asm volatile(
        "wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, "
        "%9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, {%0, %1, %2, "
        "%3, %4, %5, %6, %7};"
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3]), "+f"(d.x[4]), "+f"(d.x[5]),
          "+f"(d.x[6]), "+f"(d.x[7])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(a.x[4]), "r"(a.x[5]), "r"(a.x[6]),
          "r"(a.x[7]), "r"(b.x[0]), "r"(b.x[1]), "r"(b.x[2]), "r"(b.x[3]), "r"(b.x[4]), "r"(b.x[5]),
          "r"(b.x[6]), "r"(b.x[7]));
}

__device__ __forceinline__ void wmma_mma_row_col(Accumulator& d, const FragmentAB<bfloat16_t>& a,
                                                 const FragmentAB<bfloat16_t>& b) {
    asm volatile(
        "wmma.mma.sync.aligned.row.col.m16n16k16.f32.bf16.bf16.f32 {%0, %1, %2, %3, %4, %5, %6, "
        "%7}, {%8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3, %4, %5, %6, %7};"
        : "+f"(d.x[0]), "+f"(d.x[1]), "+f"(d.x[2]), "+f"(d.x[3]), "+f"(d.x[4]), "+f"(d.x[5]),
          "+f"(d.x[6]), "+f"(d.x[7])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]), "r"(b.x[2]),
          "r"(b.x[3]));
}

__device__ __forceinline__ void wmma_load_c_row(Accumulator& c, const float* p, int ld) {
    asm volatile(
        "wmma.load.c.sync.aligned.row.m16n16k16.shared.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], "
        "%9;"
        : "=f"(c.x[0]), "=f"(c.x[1]), "=f"(c.x[2]), "=f"(c.x[3]), "=f"(c.x[4]), "=f"(c.x[5]),
          "=f"(c.x[6]), "=f"(c.x[7])
        : "r"(shared_address(p)), "r"(ld)
        : "memory");
}

__device__ __forceinline__ void wmma_store_d_row(float* p, const Accumulator& d, int ld) {
    asm volatile(
        "wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%2, %3, %4, %5, %6, %7, %8, "
        "%9}, %1;" ::"r"(shared_address(p)),
        "r"(ld), "f"(d.x[0]), "f"(d.x[1]), "f"(d.x[2]), "f"(d.x[3]), "f"(d.x[4]), "f"(d.x[5]),
        "f"(d.x[6]), "f"(d.x[7])
        : "memory");
}

__device__ __forceinline__ void wmma_store_d_row_global(float* p, const Accumulator& d, int ld) {
    asm volatile(
        "wmma.store.d.sync.aligned.row.m16n16k16.global.f32 [%0], {%2, %3, %4, %5, %6, %7, %8, "
        "%9}, %1;" ::"l"(p),
        "r"(ld), "f"(d.x[0]), "f"(d.x[1]), "f"(d.x[2]), "f"(d.x[3]), "f"(d.x[4]), "f"(d.x[5]),
        "f"(d.x[6]), "f"(d.x[7])
        : "memory");
}

}  // namespace flashcore
