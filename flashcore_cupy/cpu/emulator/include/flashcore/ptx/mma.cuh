// ptx/mma.cuh on the CPU - fragments as the PTX ISA documents them, multiplied by the warp's last
// lane to arrive. Products are exact and summed in double precision; the GPU truncates instead.
#pragma once
#include <emulator/numbers.hpp>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

template <typename T>
inline float element(uint32 pair, int which) {
    const uint16 bits = uint16(which ? pair >> 16 : pair);
    return IS_BFLOAT16<T> ? emulator::bfloat16_to_float(bits) : emulator::half_to_float(bits);
}

// Row r of block i is at the address of lane 8 i + r; lane l gets the 4 bytes l % 4 of row l / 4.
template <typename Word, bool TRANSPOSED>
__forceinline__ void load_matrices(Word (&r)[4], uint32 row_address) {
    struct Operand {
        Word* r;
        const char* row;
    } mine = {r, emulator::shared_pointer(row_address, 16, 16, "ldmatrix")};
    emulator::note(*emulator::current, mine.row, 16, false);
    emulator::collective("ldmatrix", &mine, [](void** all) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const auto row = [&](int n) { return static_cast<Operand*>(all[8 * i + n])->row; };
                char* const to = reinterpret_cast<char*>(&static_cast<Operand*>(all[lane])->r[i]);
                if constexpr (TRANSPOSED) {
                    std::memcpy(to, row(lane % 4 * 2) + lane / 4 * 2, 2);
                    std::memcpy(to + 2, row(lane % 4 * 2 + 1) + lane / 4 * 2, 2);
                } else {
                    std::memcpy(to, row(lane / 4) + lane % 4 * 4, 4);
                }
            }
    });
}

__forceinline__ void ldmatrix_x4(uint32 (&r)[4], uint32 row_address) {
    load_matrices<uint32, false>(r, row_address);
}
__forceinline__ void ldmatrix_x4_trans(uint32 (&r)[4], uint32 row_address) {
    load_matrices<uint32, true>(r, row_address);
}
__forceinline__ void ldmatrix_x4(float (&r)[4], uint32 row_address) {
    load_matrices<float, false>(r, row_address);
}

__forceinline__ void stmatrix_x4(uint32 row_address, const uint32 (&r)[4]) {
    struct Operand {
        const uint32* r;
        char* row;
    } mine = {r, emulator::shared_pointer(row_address, 16, 16, "stmatrix")};
    emulator::note(*emulator::current, mine.row, 16, true);
    emulator::collective("stmatrix", &mine, [](void** all) {
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i)
                std::memcpy(static_cast<Operand*>(all[8 * i + lane / 4])->row + lane % 4 * 4,
                            &static_cast<Operand*>(all[lane])->r[i], 4);
    });
}

__forceinline__ float load_shared(uint32 address) {
    const char* const from = emulator::shared_pointer(address, 4, 4, "ld.shared");
    emulator::note(*emulator::current, from, 4, false);
    const emulator::Inside inside;
    float x;
    std::memcpy(&x, from, 4);
    return x;
}

struct MmaOperand {
    float* c;
    const uint32* a;
    uint32 b0, b1;
};

// c += A B for 16 x 8 outputs; a_of(row, k) and b_of(k, column) read the fragments.
template <int K, typename A, typename B>
inline void multiply_fragments(void** all, A a_of, B b_of) {
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

template <typename T>
__forceinline__ void mma_m16n8k16(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    MmaOperand mine = {c, a, b0, b1};
    emulator::collective("mma.m16n8k16", &mine, [](void** all) {
        const auto lane = [&](int n) { return static_cast<const MmaOperand*>(all[n]); };
        multiply_fragments<16>(
            all,
            [&](int row, int k) {
                const uint32 pair = lane(row % 8 * 4 + k % 8 / 2)->a[row / 8 + k / 8 * 2];
                return element<T>(pair, k % 2);
            },
            [&](int k, int n) {
                const MmaOperand* of = lane(n * 4 + k % 8 / 2);
                return element<T>(k < 8 ? of->b0 : of->b1, k % 2);
            });
    });
}

// The tensor cores ignore the 13 lowest fraction bits.
inline float tf32(uint32 bits) { return emulator::float_of(bits & 0xffffe000u); }

__forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    MmaOperand mine = {c, a, b0, b1};
    emulator::collective("mma.m16n8k8.tf32", &mine, [](void** all) {
        const auto lane = [&](int n) { return static_cast<const MmaOperand*>(all[n]); };
        multiply_fragments<8>(
            all,
            [&](int row, int k) { return tf32(lane(row % 8 * 4 + k % 4)->a[row / 8 + k / 4 * 2]); },
            [&](int k, int n) {
                const MmaOperand* of = lane(n * 4 + k % 4);
                return tf32(k < 4 ? of->b0 : of->b1);
            });
    });
}

}  // namespace flashcore
