// ptx/wmma.cuh on the CPU - 16 x 16 matrices spread over a warp. Which lane holds what is not said,
// so a kernel must not know; here lane l has row l / 2, columns 8 (l % 2) to 8 (l % 2) + 7.
#pragma once
#include <emulator/numbers.hpp>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

template <typename T>
struct FragmentAB {
    static constexpr int REGISTERS = IS_BFLOAT16<T> ? 4 : 8;
    uint32 x[REGISTERS];  // eight elements, two in a register; fp16's other four hold none
};

struct Accumulator {
    float x[8];
};

__forceinline__ void fill(Accumulator& acc, float value) {
    for (float& x : acc.x) x = value;
}

__forceinline__ int fragment_row() { return emulator::lane() / 2; }
__forceinline__ int fragment_column() { return emulator::lane() % 2 * 8; }

template <typename E>
__forceinline__ const E* wmma_operand(const E* p, int ld, const char* what) {
    constexpr int STEP = sizeof(E) == 2 ? 8 : 4;
    if (ld % STEP)
        emulator::fail("%s: %d elements between rows, no multiple of %d", what, ld, STEP);
    const uint32 address = shared_address(p);
    const int bytes = (15 * ld + 16) * int(sizeof(E));
    return reinterpret_cast<const E*>(emulator::shared_pointer(address, bytes, 32, what));
}

template <typename T, bool BY_COLUMN>
__forceinline__ void load_fragment(FragmentAB<T>& f, const T* p, int ld, const char* what) {
    const T* const matrix = wmma_operand(p, ld, what);
    emulator::collective(what, nullptr, [](void**) {});
    const emulator::Inside inside;
    for (int i = 0; i < 8; ++i) {
        const int row = fragment_row(), column = fragment_column() + i;
        const T& element = matrix[BY_COLUMN ? column * ld + row : row * ld + column];
        emulator::note(*emulator::current, &element, sizeof element, false);
        const uint32 bits = element.bits;
        if (i % 2 == 0) {
            f.x[i / 2] = bits;
        } else {
            f.x[i / 2] |= bits << 16;
        }
    }
}

template <typename T>
__forceinline__ void wmma_load_a_row(FragmentAB<T>& f, const T* p, int ld) {
    load_fragment<T, false>(f, p, ld, "wmma.load.a");
}
template <typename T>
__forceinline__ void wmma_load_b_row(FragmentAB<T>& f, const T* p, int ld) {
    load_fragment<T, false>(f, p, ld, "wmma.load.b");
}
template <typename T>
__forceinline__ void wmma_load_b_col(FragmentAB<T>& f, const T* p, int ld) {
    load_fragment<T, true>(f, p, ld, "wmma.load.b");
}

template <typename T>
__forceinline__ void multiply_accumulate(Accumulator& d, const FragmentAB<T>& a,
                                         const FragmentAB<T>& b) {
    struct Operand {
        Accumulator* d;
        const FragmentAB<T>*a, *b;
    } mine = {&d, &a, &b};
    emulator::collective("wmma.mma", &mine, [](void** all) {
        float x[16][16], y[16][16];
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 16; ++column) {
                const auto* of = static_cast<Operand*>(all[row * 2 + column / 8]);
                x[row][column] = element<T>(of->a->x[column % 8 / 2], column % 2);
                y[row][column] = element<T>(of->b->x[column % 8 / 2], column % 2);
            }
        for (int row = 0; row < 16; ++row) {
            double sum[16] = {};
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 16; ++n) sum[n] += double(x[row][k]) * y[k][n];
            for (int n = 0; n < 16; ++n) {
                float& c = static_cast<Operand*>(all[row * 2 + n / 8])->d->x[n % 8];
                c = float(c + sum[n]);
            }
        }
    });
}

template <typename T>
__forceinline__ void wmma_mma_row_row(Accumulator& d, const FragmentAB<T>& a,
                                      const FragmentAB<T>& b) {
    multiply_accumulate(d, a, b);
}
template <typename T>
__forceinline__ void wmma_mma_row_col(Accumulator& d, const FragmentAB<T>& a,
                                      const FragmentAB<T>& b) {
    multiply_accumulate(d, a, b);
}

__forceinline__ void wmma_load_c_row(Accumulator& c, const float* p, int ld) {
    const float* const matrix = wmma_operand(p, ld, "wmma.load.c");
    emulator::collective("wmma.load.c", nullptr, [](void**) {});
    for (int i = 0; i < 8; ++i) c.x[i] = matrix[fragment_row() * ld + fragment_column() + i];
}

__forceinline__ void store_accumulator(float* matrix, const Accumulator& d, int ld) {
    emulator::collective("wmma.store.d", nullptr, [](void**) {});
    for (int i = 0; i < 8; ++i) matrix[fragment_row() * ld + fragment_column() + i] = d.x[i];
}
__forceinline__ void wmma_store_d_row(float* p, const Accumulator& d, int ld) {
    store_accumulator(const_cast<float*>(wmma_operand(p, ld, "wmma.store.d")), d, ld);
}
__forceinline__ void wmma_store_d_row_global(float* p, const Accumulator& d, int ld) {
    store_accumulator(p, d, ld);
}

}  // namespace flashcore
