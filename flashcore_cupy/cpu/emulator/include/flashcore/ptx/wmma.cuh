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

// ---- to and from memory ------------------------------------------------------------------------

namespace twin {

// This lane's element i of a matrix, where it lies row by row, or column by column.
template <bool BY_COLUMN = false, typename E>
__forceinline__ E& fragment_element(E* matrix, int ld, int i) {
    const int row = emulator::lane() / 2, column = emulator::lane() % 2 * 8 + i;
    return matrix[BY_COLUMN ? column * ld + row : row * ld + column];
}

// A warp loads and stores when its lanes are all here. Rows begin 16 bytes apart, or a multiple of
// it; the matrix at a multiple of 32.
template <typename E>
__forceinline__ E* wmma_operand(E* p, int ld, const char* what) {
    constexpr int STEP = 16 / int(sizeof(E));
    if (ld % STEP)
        emulator::fail("%s: %d elements between rows, no multiple of %d", what, ld, STEP);
    const int bytes = (15 * ld + 16) * int(sizeof(E));
    return reinterpret_cast<E*>(emulator::shared_pointer(shared_address(p), bytes, 32, what));
}
template <typename E>
__forceinline__ const E* wmma_source(const E* p, int ld, const char* what) {
    struct Matrix {
        const E* p;
        int ld;
    } matrix = {wmma_operand(p, ld, what), ld};
    emulator::collective(what, &matrix, [](void** all) {
        const Matrix& m = *static_cast<const Matrix*>(all[0]);
        for (int row = 0; row < 16; ++row)
            emulator::note_read(emulator::By::WARP, m.p + row * m.ld, 16 * sizeof(E));
    });
    return matrix.p;
}

template <bool BY_COLUMN, typename T>
__forceinline__ void load_fragment(FragmentAB<T>& f, const T* p, int ld, const char* what) {
    const T* const matrix = wmma_source(p, ld, what);
    const emulator::Inside inside;
    for (int i = 0; i < 8; i += 2) {
        const uint32 low = fragment_element<BY_COLUMN>(matrix, ld, i).bits;
        f.x[i / 2] = low | uint32(fragment_element<BY_COLUMN>(matrix, ld, i + 1).bits) << 16;
    }
}

}  // namespace twin

template <typename T>
__forceinline__ void wmma_load_a_row(FragmentAB<T>& f, const T* p, int ld) {
    twin::load_fragment<false>(f, p, ld, "wmma.load.a");
}
template <typename T>
__forceinline__ void wmma_load_b_row(FragmentAB<T>& f, const T* p, int ld) {
    twin::load_fragment<false>(f, p, ld, "wmma.load.b");
}
// Where B lies column by column, ld is from one column to the next.
template <typename T>
__forceinline__ void wmma_load_b_col(FragmentAB<T>& f, const T* p, int ld) {
    twin::load_fragment<true>(f, p, ld, "wmma.load.b");
}

__forceinline__ void wmma_load_c_row(Accumulator& c, const float* p, int ld) {
    const float* const matrix = twin::wmma_source(p, ld, "wmma.load.c");
    const emulator::Inside inside;
    for (int i = 0; i < 8; ++i) c.x[i] = twin::fragment_element(matrix, ld, i);
}
__forceinline__ void wmma_store_d_row(float* p, const Accumulator& d, int ld) {
    float* const matrix = twin::wmma_operand(p, ld, "wmma.store.d");
    emulator::collective("wmma.store.d", nullptr, [](void**) {});
    for (int i = 0; i < 8; ++i) twin::fragment_element(matrix, ld, i) = d.x[i];
}
__forceinline__ void wmma_store_d_row_global(float* p, const Accumulator& d, int ld) {
    emulator::collective("wmma.store.d.global", nullptr, [](void**) {});
    for (int i = 0; i < 8; ++i) twin::fragment_element(p, ld, i) = d.x[i];
}

// ---- the product -------------------------------------------------------------------------------

namespace twin {

template <typename T>
struct WmmaOperand {
    Accumulator* d;
    const FragmentAB<T>*a, *b;
};

// d += A B, however A and B lay in memory.
template <typename T>
__attribute__((noinline)) void multiply_m16n16k16(void** all) {
    const auto lane = [&](int n) { return static_cast<const WmmaOperand<T>*>(all[n]); };
    float a[16][16], b[16][16];
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 16; ++column) {
            const auto* of = lane(row * 2 + column / 8);
            a[row][column] = element<T>(of->a->x[column % 8 / 2], column % 2);
            b[row][column] = element<T>(of->b->x[column % 8 / 2], column % 2);
        }
    for (int row = 0; row < 16; ++row) {
        double sum[16] = {};
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n) sum[n] += double(a[row][k]) * b[k][n];
        for (int n = 0; n < 16; ++n) {
            float& d = lane(row * 2 + n / 8)->d->x[n % 8];
            d = float(d + sum[n]);
        }
    }
}
COMPILED_ONCE void multiply_m16n16k16<half_t>(void**);
COMPILED_ONCE void multiply_m16n16k16<bfloat16_t>(void**);

}  // namespace twin

template <typename T>
__forceinline__ void wmma_mma_row_row(Accumulator& d, const FragmentAB<T>& a,
                                      const FragmentAB<T>& b) {
    twin::WmmaOperand<T> mine = {&d, &a, &b};
    emulator::collective("wmma.mma", &mine, twin::multiply_m16n16k16<T>);
}
template <typename T>
__forceinline__ void wmma_mma_row_col(Accumulator& d, const FragmentAB<T>& a,
                                      const FragmentAB<T>& b) {
    wmma_mma_row_row(d, a, b);
}

}  // namespace flashcore
