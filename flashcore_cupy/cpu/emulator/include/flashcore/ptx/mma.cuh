// ptx/mma.cuh on the CPU - fragments as the PTX ISA documents them, multiplied by the last lane of
// the warp to come. Products are exact and summed in double precision; the GPU truncates instead.
//
// A fragment is a matrix that lies in the registers of 32 lanes. Where four neighbouring lanes have
// a row (or a column), lane l has row l / 4, and two neighbouring elements of each eight, or one of
// each four: 2 (l % 4) and the next one, or l % 4.
#pragma once
#include <emulator/numbers.hpp>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

namespace twin {

// One of the two elements that a register has.
template <typename T>
__forceinline__ float element(uint32 pair, int which) {
    const uint16 bits = uint16(which ? pair >> 16 : pair);
    return IS_BFLOAT16<T> ? emulator::bfloat16_to_float(bits) : emulator::half_to_float(bits);
}

// ---- ldmatrix, stmatrix ------------------------------------------------------------------------

// Four blocks of 8 rows of 16 bytes. Row r of block i is at the address that lane 8 i + r gives.
// Register i of lane l has 4 bytes of block i: of row l / 4, bytes 4 (l % 4) and up; or transposed,
// as 16-bit elements: of column l / 4, rows 2 (l % 4) and the next one.
struct Rows {
    uint32* r;
    char* row;
};

inline void note_blocks(void** all, int blocks) {
    for (int i = 0; i < blocks; ++i) {
        const void* rows[8];
        for (int n = 0; n < 8; ++n) rows[n] = static_cast<Rows*>(all[8 * i + n])->row;
        emulator::note_rows(rows);
    }
}

template <bool TRANSPOSED>
__attribute__((noinline)) void load_blocks(void** all) {
    note_blocks(all, 4);
    for (int lane = 0; lane < 32; ++lane)
        emulator::note_read(emulator::By::WARP, static_cast<Rows*>(all[lane])->row, 16);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const auto row = [&](int n) { return static_cast<Rows*>(all[8 * i + n])->row; };
            char* const to = reinterpret_cast<char*>(&static_cast<Rows*>(all[lane])->r[i]);
            if constexpr (TRANSPOSED) {
                std::memcpy(to, row(lane % 4 * 2) + lane / 4 * 2, 2);
                std::memcpy(to + 2, row(lane % 4 * 2 + 1) + lane / 4 * 2, 2);
            } else {
                std::memcpy(to, row(lane / 4) + lane % 4 * 4, 4);
            }
        }
}
template <bool TRANSPOSED>
__attribute__((noinline)) void store_blocks(void** all) {
    note_blocks(all, 4);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const auto row = [&](int n) { return static_cast<Rows*>(all[8 * i + n])->row; };
            const char* const from = reinterpret_cast<char*>(&static_cast<Rows*>(all[lane])->r[i]);
            if constexpr (TRANSPOSED) {
                std::memcpy(row(lane % 4 * 2) + lane / 4 * 2, from, 2);
                std::memcpy(row(lane % 4 * 2 + 1) + lane / 4 * 2, from + 2, 2);
            } else {
                std::memcpy(row(lane / 4) + lane % 4 * 4, from, 4);
            }
        }
}
COMPILED_ONCE void load_blocks<false>(void**);
COMPILED_ONCE void load_blocks<true>(void**);
COMPILED_ONCE void store_blocks<false>(void**);
COMPILED_ONCE void store_blocks<true>(void**);

// What the blocks hold when the last lane comes.
template <bool TRANSPOSED>
__forceinline__ void load_matrices(void* r, uint32 row_address) {
    Rows mine = {static_cast<uint32*>(r),
                 emulator::shared_pointer(row_address, 16, 16, "ldmatrix")};
    emulator::collective("ldmatrix", &mine, load_blocks<TRANSPOSED>);
}

template <bool TRANSPOSED>
__forceinline__ void store_matrices(const uint32 (&r)[4], uint32 row_address) {
    Rows mine = {const_cast<uint32*>(r), emulator::shared_pointer(row_address, 16, 16, "stmatrix")};
    emulator::note_write(emulator::By::THREAD, mine.row, 16);
    emulator::collective("stmatrix", &mine, store_blocks<TRANSPOSED>);
}

}  // namespace twin

__forceinline__ void ldmatrix_x4(uint32 (&r)[4], uint32 row_address) {
    twin::load_matrices<false>(r, row_address);
}
__forceinline__ void ldmatrix_x4_trans(uint32 (&r)[4], uint32 row_address) {
    twin::load_matrices<true>(r, row_address);
}
__forceinline__ void ldmatrix_x4(float (&r)[4], uint32 row_address) {
    twin::load_matrices<false>(r, row_address);
}

__forceinline__ void stmatrix_x4(uint32 row_address, const uint32 (&r)[4]) {
    twin::store_matrices<false>(r, row_address);
}
__forceinline__ void stmatrix_x4_trans(uint32 row_address, const uint32 (&r)[4]) {
    twin::store_matrices<true>(r, row_address);
}

__forceinline__ float load_shared(uint32 address) {
    return *reinterpret_cast<const float*>(emulator::shared_pointer(address, 4, 4, "ld.shared"));
}

// ---- mma ---------------------------------------------------------------------------------------

namespace twin {

struct MmaOperand {
    float* c;
    const uint32* a;
    uint32 b0, b1;
};

// c += A B for 16 x 8 outputs; a_of(row, k) and b_of(k, column) read the fragments. Lane l has of
// the outputs row l / 4 in c[0] and c[1], row l / 4 + 8 in c[2] and c[3].
template <int K, typename A, typename B>
void multiply_fragments(void** all, A a_of, B b_of) {
    float a[16][K], b[K][8];
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k) a[row][k] = a_of(row, k);
    for (int k = 0; k < K; ++k)
        for (int n = 0; n < 8; ++n) b[k][n] = b_of(k, n);
    for (int row = 0; row < 16; ++row) {
        double sum[8] = {};
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n) sum[n] += double(a[row][k]) * b[k][n];
        for (int n = 0; n < 8; ++n) {
            float& c = static_cast<MmaOperand*>(all[row % 8 * 4 + n / 2])->c[row / 8 * 2 + n % 2];
            c = float(c + sum[n]);
        }
    }
}

// 16-bit operands, two in a register. a[0]: row l / 4, k from 0 on; a[1]: row l / 4 + 8; a[2] and
// a[3]: the same, k from 8 on. b0: column l / 4, k from 0 on; b1: k from 8 on.
template <typename T>
__attribute__((noinline)) void multiply_m16n8k16(void** all) {
    const auto lane = [&](int n) { return static_cast<const MmaOperand*>(all[n]); };
    multiply_fragments<16>(
        all,
        [&](int row, int k) {
            return element<T>(lane(row % 8 * 4 + k % 8 / 2)->a[row / 8 + k / 8 * 2], k % 2);
        },
        [&](int k, int n) {
            const MmaOperand* of = lane(n * 4 + k % 8 / 2);
            return element<T>(k < 8 ? of->b0 : of->b1, k % 2);
        });
}
COMPILED_ONCE void multiply_m16n8k16<half_t>(void**);
COMPILED_ONCE void multiply_m16n8k16<bfloat16_t>(void**);

}  // namespace twin

template <typename T>
__forceinline__ void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    twin::MmaOperand mine = {c, a, b0, b1};
    emulator::collective("mma.m16n8k16", &mine, twin::multiply_m16n8k16<T>);
}

namespace twin {

// 32-bit operands, of which the tensor cores ignore the 13 lowest fraction bits. a[0]: row l / 4,
// k = l % 4; a[1]: row l / 4 + 8; a[2] and a[3]: the same, k + 4. b0: column l / 4, k = l % 4; b1:
// k + 4.
template <int K>
__attribute__((noinline)) void multiply_tf32(void** all) {
    const auto lane = [&](int n) { return static_cast<const MmaOperand*>(all[n]); };
    const auto tf32 = [](uint32 bits) { return emulator::float_of(bits & 0xffffe000u); };
    multiply_fragments<K>(
        all,
        [&](int row, int k) { return tf32(lane(row % 8 * 4 + k % 4)->a[row / 8 + k / 4 * 2]); },
        [&](int k, int n) {
            const MmaOperand* of = lane(n * 4 + k % 4);
            return tf32(k < 4 ? of->b0 : of->b1);
        });
}
COMPILED_ONCE void multiply_tf32<8>(void**);

}  // namespace twin

__forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    twin::MmaOperand mine = {c, a, b0, b1};
    emulator::collective("mma.m16n8k8.tf32", &mine, twin::multiply_tf32<8>);
}

}  // namespace flashcore
