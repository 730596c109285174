// ptx/mma.cuh - the matrix instruction whose fragments are documented, and the load that fills them
// (sm_80 and later; PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix").
//
// What lane l holds of
//   the 16 x 8 accumulator: row l/4, columns 2(l%4), +1 in x[0], x[1]; row l/4 + 8 in x[2], x[3]
//   A, 16 x 16, row-major: four 8 x 8 blocks, rows 0-7, 8-15 of columns 0-7, then of columns 8-15
//   B, 16 x 8, column-major: two 8 x 8 blocks, k = 0-7 and k = 8-15
// and, of tf32, one value per register
//   A, 16 x 8: row l/4, column l%4 in a[0]; the same of rows 8-15 in a[1]; of columns 4-7 in a[2],
//   a[3]. B, 8 x 8: k = l%4, column l/4 in b0; k = l%4 + 4 in b1
#pragma once
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Four 8 x 8 blocks of 16-bit elements from shared memory: lanes 8i to 8i + 7 give the addresses of
// the rows of block i, 16 bytes each. Lane l receives columns 2(l%4), +1 of row l/4 of each block.
__device__ __forceinline__ void ldmatrix_x4(uint32 (&r)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// The same, each block transposed on the way: lane l receives rows 2(l%4), +1 of column l/4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32 (&r)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// Stores blocks from the registers into which ldmatrix_x4 loads them (sm_90 and later).
__device__ __forceinline__ void stmatrix_x4(uint32 row_address, const uint32 (&r)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
        "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
        : "memory");
}

// The same, each block transposed: a row in shared memory is a column of the block.
__device__ __forceinline__ void stmatrix_x4_trans(uint32 row_address, const uint32 (&r)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
        "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
        : "memory");
}

// The same blocks as ldmatrix_x4 loads are 8 rows of four fp32: lane l receives column l%4 of row
// l/4 of each, which is where tf32 operands hold it.
__device__ __forceinline__ void ldmatrix_x4(float (&r)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3])
                 : "r"(row_address)
                 : "memory");
}

// One fp32 from shared memory.
__device__ __forceinline__ float load_shared(uint32 address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}

// c += A B, 16 x 8 x 16, fp32 accumulation.
template <typename T>
__device__ void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<half_t>(float (&c)[4], const uint32 (&a)[4], uint32 b0,
                                                     uint32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16_t>(float (&c)[4], const uint32 (&a)[4],
                                                         uint32 b0, uint32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += A B, 16 x 8 x 8, tf32 products (see split_tf32), fp32 accumulation.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32 (&a)[4], uint32 b0,
                                                 uint32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace flashcore
