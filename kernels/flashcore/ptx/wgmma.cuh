// ptx/wgmma.cuh - the matrix instruction of four warps together, whose B and, if wanted, A are read
// from shared memory (sm_90a). The 128 threads of a warpgroup, warps 4i to 4i + 3, all execute it:
//   wgmma_fence(); wgmma(...) for each k-step; wgmma_commit(); ... wgmma_wait<0>();
// It finishes later: from the first wgmma to the wait, its accumulators and A registers must not be
// touched, which fence_registers, before and after, keeps the compiler from. A loop whose length is
// not known has fence and commit inside; else the compiler serializes its wgmmas.
//
// What thread t holds, warp w = t/32 of the warpgroup, lane l = t%32, of
//   the 64 x N accumulator: element 4j + 2i + p is of row 16w + l/4 + 8i, column 8j + 2(l%4) + p
//   A, 64 x 16: pairs of columns 2(l%4), +1 of row 16w + l/4 in a[0], of row + 8 in a[1]; the same
//   of columns + 8 in a[2], a[3]. So two neighbouring j of an accumulator pack into one A.
//
// Tiles in shared memory are panels of SWIZZLE = 128, 64 or 32 bytes times any rows, a row right
// after the other; each begins at a multiple of 8 * SWIZZLE bytes. Within a row, pieces of 16 bytes
// are permuted: see swizzled().
//                       a row of the panel is        the next 16 of k are   the next panel has
//   A, and B K-major    a row of A, a column of B    32 bytes further       more of k, a new call
//   B transposed        one k of SWIZZLE/2 columns   16 rows further        columns: leading_bytes
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

constexpr int WARPGROUP_WARPS = 4;
constexpr int WARPGROUP_THREADS = WARPGROUP_WARPS * WARP_SIZE;

// Where byte `offset` of a panel (row * SWIZZLE + byte of the row) is: bits 4 and up are xored with
// bits 7 and up, so that a column of 16-byte pieces is spread over the banks. TMA does the same.
template <int SWIZZLE>
__host__ __device__ constexpr uint32 swizzled(uint32 offset) {
    static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32);
    return offset ^ (offset >> 3 & (SWIZZLE - 16));
}

// The part of a matrix descriptor that does not depend on the address. leading_bytes: from panel to
// panel of a transposed B, else ignored. stride_bytes: from eight rows to the next eight. A
// descriptor counts addresses and bytes in units of 16, so they are shifted by 4.
template <int SWIZZLE>
__host__ __device__ constexpr uint64 matrix_layout(uint32 leading_bytes = 16,
                                                   uint32 stride_bytes = 8 * SWIZZLE) {
    static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32);
    constexpr uint64 CODE = SWIZZLE == 128 ? 1 : SWIZZLE == 64 ? 2 : 3;
    return uint64(leading_bytes >> 4) << 16 | uint64(stride_bytes >> 4) << 32 | CODE << 62;
}

// The descriptor of the tile at a shared address.
__host__ __device__ constexpr uint64 matrix_descriptor(uint64 layout, uint32 address) {
    return layout | (address & 0x3ffffu) >> 4;
}

// The same, `bytes` further: on the lower half alone, where the address is.
__host__ __device__ constexpr uint64 advance_descriptor(uint64 descriptor, uint32 bytes) {
    return descriptor & 0xffffffff00000000 | uint32(descriptor) + (bytes >> 4);
}

// Orders what was done to registers before the wgmmas that use them. Call it before the first
// wgmma, and again after registers of one were touched.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes a group of the wgmmas so far.
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING of the most recent groups are still in flight.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// No instruction: nothing that reads or writes these registers moves across it.
template <int COUNT>
__device__ __forceinline__ void fence_registers(float (&r)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void fence_registers(uint32 (&r)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// No instruction: what these registers hold no longer matters. Accumulators that the first product
// overwrites need it before a loop: a zero that is never read keeps them alive from the kernel's
// beginning, where a thread has fewer registers, and the compiler spills them.
template <int COUNT>
__device__ __forceinline__ void forget_registers(float (&r)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "=f"(r[i]));
}

// Gives up registers of this warpgroup's threads, or waits for and takes more, until each thread
// has COUNT. All warpgroups start with what __launch_bounds__ leaves each thread; together they
// never have more than that.
template <int COUNT>
__device__ __forceinline__ void registers_dec() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_inc() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The instruction has N/2 accumulators, which its text must name one by one. N is a multiple of 16,
// so they are groups of eight operands; the eight numbers after the last group are for the inputs.
//   WGMMA_EIGHT_k   the numbers 8k to 8k + 7
//   WGMMA_LIST_k    FIRST(the first eight) NEXT(the second) ... of k eights, where the pair is
//     WGMMA_NAMES      "%0, %1, ...", of the text
//     WGMMA_OPERANDS   "+f"(d[0]), "+f"(d[1]), ..., of the asm statement
//   WGMMA_SS, _RS   the statement with A from shared memory, from registers, if N is SIZE
//   WGMMA_SHAPES    one of the two for every N, with its list and the numbers for the inputs
#define WGMMA_EIGHT_0 0, 1, 2, 3, 4, 5, 6, 7
#define WGMMA_EIGHT_1 8, 9, 10, 11, 12, 13, 14, 15
#define WGMMA_EIGHT_2 16, 17, 18, 19, 20, 21, 22, 23
#define WGMMA_EIGHT_3 24, 25, 26, 27, 28, 29, 30, 31
#define WGMMA_EIGHT_4 32, 33, 34, 35, 36, 37, 38, 39
#define WGMMA_EIGHT_5 40, 41, 42, 43, 44, 45, 46, 47
#define WGMMA_EIGHT_6 48, 49, 50, 51, 52, 53, 54, 55
#define WGMMA_EIGHT_7 56, 57, 58, 59, 60, 61, 62, 63
#define WGMMA_EIGHT_8 64, 65, 66, 67, 68, 69, 70, 71
#define WGMMA_EIGHT_9 72, 73, 74, 75, 76, 77, 78, 79
#define WGMMA_EIGHT_10 80, 81, 82, 83, 84, 85, 86, 87
#define WGMMA_EIGHT_11 88, 89, 90, 91, 92, 93, 94, 95
#define WGMMA_EIGHT_12 96, 97, 98, 99, 100, 101, 102, 103
#define WGMMA_EIGHT_13 104, 105, 106, 107, 108, 109, 110, 111
#define WGMMA_EIGHT_14 112, 113, 114, 115, 116, 117, 118, 119
#define WGMMA_EIGHT_15 120, 121, 122, 123, 124, 125, 126, 127
#define WGMMA_EIGHT_16 128, 129, 130, 131, 132, 133, 134, 135

#define WGMMA_WITH(F, ...) F(__VA_ARGS__)
#define WGMMA_LIST_1(FIRST, NEXT) WGMMA_WITH(FIRST, WGMMA_EIGHT_0)
#define WGMMA_LIST_2(FIRST, NEXT) WGMMA_LIST_1(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_1)
#define WGMMA_LIST_3(FIRST, NEXT) WGMMA_LIST_2(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_2)
#define WGMMA_LIST_4(FIRST, NEXT) WGMMA_LIST_3(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_3)
#define WGMMA_LIST_5(FIRST, NEXT) WGMMA_LIST_4(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_4)
#define WGMMA_LIST_6(FIRST, NEXT) WGMMA_LIST_5(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_5)
#define WGMMA_LIST_7(FIRST, NEXT) WGMMA_LIST_6(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_6)
#define WGMMA_LIST_8(FIRST, NEXT) WGMMA_LIST_7(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_7)
#define WGMMA_LIST_9(FIRST, NEXT) WGMMA_LIST_8(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_8)
#define WGMMA_LIST_10(FIRST, NEXT) WGMMA_LIST_9(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_9)
#define WGMMA_LIST_11(FIRST, NEXT) WGMMA_LIST_10(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_10)
#define WGMMA_LIST_12(FIRST, NEXT) WGMMA_LIST_11(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_11)
#define WGMMA_LIST_13(FIRST, NEXT) WGMMA_LIST_12(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_12)
#define WGMMA_LIST_14(FIRST, NEXT) WGMMA_LIST_13(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_13)
#define WGMMA_LIST_15(FIRST, NEXT) WGMMA_LIST_14(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_14)
#define WGMMA_LIST_16(FIRST, NEXT) WGMMA_LIST_15(FIRST, NEXT) WGMMA_WITH(NEXT, WGMMA_EIGHT_15)

#define WGMMA_NAMES(i0, i1, i2, i3, i4, i5, i6, i7) \
    "%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 ", %" #i4 ", %" #i5 ", %" #i6 ", %" #i7
#define WGMMA_NAMES_NEXT(...) ", " WGMMA_NAMES(__VA_ARGS__)
#define WGMMA_OPERANDS(i0, i1, i2, i3, i4, i5, i6, i7)                                         \
    "+f"(d[i0]), "+f"(d[i1]), "+f"(d[i2]), "+f"(d[i3]), "+f"(d[i4]), "+f"(d[i5]), "+f"(d[i6]), \
        "+f"(d[i7])
#define WGMMA_OPERANDS_NEXT(...) , WGMMA_OPERANDS(__VA_ARGS__)

#define WGMMA_NAME(SIZE, TYPE) "wgmma.mma_async.sync.aligned.m64n" #SIZE "k16.f32." TYPE "." TYPE
#define WGMMA_PREDICATE(scale_d) "{ .reg .pred p; setp.ne.b32 p, " scale_d ", 0; "
#define WGMMA_TEXT(SIZE, TYPE, LIST, inputs, scale_d, flags) \
    WGMMA_PREDICATE(scale_d)                                 \
    WGMMA_NAME(SIZE, TYPE)                                   \
    " {" LIST(WGMMA_NAMES, WGMMA_NAMES_NEXT) "}, " inputs ", p, 1, 1, " flags "; }"
#define WGMMA_SS(TYPE, SIZE, LIST, i0, i1, i2, i3, ...)                                   \
    if constexpr (N == SIZE)                                                              \
        asm volatile(WGMMA_TEXT(SIZE, TYPE, LIST, "%" #i0 ", %" #i1, "%" #i2, "0, %" #i3) \
                     : LIST(WGMMA_OPERANDS, WGMMA_OPERANDS_NEXT)                          \
                     : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TRANSPOSE_B)));
#define WGMMA_RS(TYPE, SIZE, LIST, i0, i1, i2, i3, i4, i5, i6, ...)                         \
    if constexpr (N == SIZE)                                                                \
        asm volatile(                                                                       \
            WGMMA_TEXT(SIZE, TYPE, LIST, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4, \
                       "%" #i5, "%" #i6)                                                    \
            : LIST(WGMMA_OPERANDS, WGMMA_OPERANDS_NEXT)                                     \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)),     \
              "n"(int(TRANSPOSE_B)));
#define WGMMA_SHAPE(FORM, ...) FORM(__VA_ARGS__)
#define WGMMA_SHAPES(FORM, TYPE)                                \
    WGMMA_SHAPE(FORM, TYPE, 16, WGMMA_LIST_1, WGMMA_EIGHT_1)    \
    WGMMA_SHAPE(FORM, TYPE, 32, WGMMA_LIST_2, WGMMA_EIGHT_2)    \
    WGMMA_SHAPE(FORM, TYPE, 48, WGMMA_LIST_3, WGMMA_EIGHT_3)    \
    WGMMA_SHAPE(FORM, TYPE, 64, WGMMA_LIST_4, WGMMA_EIGHT_4)    \
    WGMMA_SHAPE(FORM, TYPE, 80, WGMMA_LIST_5, WGMMA_EIGHT_5)    \
    WGMMA_SHAPE(FORM, TYPE, 96, WGMMA_LIST_6, WGMMA_EIGHT_6)    \
    WGMMA_SHAPE(FORM, TYPE, 112, WGMMA_LIST_7, WGMMA_EIGHT_7)   \
    WGMMA_SHAPE(FORM, TYPE, 128, WGMMA_LIST_8, WGMMA_EIGHT_8)   \
    WGMMA_SHAPE(FORM, TYPE, 144, WGMMA_LIST_9, WGMMA_EIGHT_9)   \
    WGMMA_SHAPE(FORM, TYPE, 160, WGMMA_LIST_10, WGMMA_EIGHT_10) \
    WGMMA_SHAPE(FORM, TYPE, 176, WGMMA_LIST_11, WGMMA_EIGHT_11) \
    WGMMA_SHAPE(FORM, TYPE, 192, WGMMA_LIST_12, WGMMA_EIGHT_12) \
    WGMMA_SHAPE(FORM, TYPE, 208, WGMMA_LIST_13, WGMMA_EIGHT_13) \
    WGMMA_SHAPE(FORM, TYPE, 224, WGMMA_LIST_14, WGMMA_EIGHT_14) \
    WGMMA_SHAPE(FORM, TYPE, 240, WGMMA_LIST_15, WGMMA_EIGHT_15) \
    WGMMA_SHAPE(FORM, TYPE, 256, WGMMA_LIST_16, WGMMA_EIGHT_16)

template <int N>
constexpr bool IS_WGMMA_WIDTH = N % 16 == 0 && N >= 16 && N <= 256;

// d = A B, or d += A B where `accumulate`: 64 x N x 16, T is half_t or bfloat16_t, fp32
// accumulation. a and b are descriptors; B is K-major, which is to say as K is in Q K^T, or
// transposed, as V is in P V.
template <typename T, int N, bool TRANSPOSE_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64 a, uint64 b, bool accumulate) {
    static_assert(IS_WGMMA_WIDTH<N>);
    if constexpr (IS_BFLOAT16<T>) {
        WGMMA_SHAPES(WGMMA_SS, "bf16")
    } else {
        WGMMA_SHAPES(WGMMA_SS, "f16")
    }
}

// The same with A from registers.
template <typename T, int N, bool TRANSPOSE_B = false>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32 (&a)[4], uint64 b,
                                      bool accumulate) {
    static_assert(IS_WGMMA_WIDTH<N>);
    if constexpr (IS_BFLOAT16<T>) {
        WGMMA_SHAPES(WGMMA_RS, "bf16")
    } else {
        WGMMA_SHAPES(WGMMA_RS, "f16")
    }
}

}  // namespace flashcore
