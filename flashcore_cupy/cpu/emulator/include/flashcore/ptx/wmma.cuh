// ptx/wmma.cuh on the CPU - 16 x 16 matrices spread over a warp, eight elements in each lane. Which
// ones is not said, so a kernel must not know: here they are in no order, and in another one with
// another seed.
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

// Where a lane's element i is in the matrix: 16 row + column. 77 is odd, so all places are taken.
inline int fragment_place(int lane, int i) {
    return ((lane * 8 + i) * 77 + emulator::current().elected) % 256;
}

// This lane's element i of a matrix, where it lies row by row, or column by column.
template <bool BY_COLUMN = false, typename E>
__forceinline__ E& fragment_element(E* matrix, int ld, int i) {
    const int place = fragment_place(emulator::lane(), i), row = place / 16, column = place % 16;
    return matrix[BY_COLUMN ? column * ld + row : row * ld + column];
}

// A warp loads and stores when its lanes are all here. Rows begin 16 bytes apart, or a multiple of
// it; the matrix at a multiple of 32.
template <typename E>
__forceinline__ void check_rows(int ld, const char* what) {
    constexpr int STEP = 16 / int(sizeof(E));
    if (ld % STEP)
        emulator::fail("%s: %d elements between rows, no multiple of %d", what, ld, STEP);
}
template <typename E>
__forceinline__ E* wmma_operand(E* p, int ld, const char* what) {
    check_rows<E>(ld, what);
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
        const void* rows[8];
        for (int row = 0; row < 16; ++row) {
            emulator::note_read(emulator::By::WARP, m.p + row * m.ld, 16 * sizeof(E));
            rows[row % 8] = m.p + row * m.ld;
        }
        emulator::note_rows(rows);
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
// (Where p begins is not looked at: NumPy's arrays need not begin at a multiple of 32, a GPU's do.)
__forceinline__ void wmma_store_d_row_global(float* p, const Accumulator& d, int ld) {
    twin::check_rows<float>(ld, "wmma.store.d.global");
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
    float* d[16][16];
    for (int n = 0; n < 32; ++n)
        for (int i = 0; i < 8; ++i) {
            const int row = fragment_place(n, i) / 16, column = fragment_place(n, i) % 16;
            a[row][column] = element<T>(lane(n)->a->x[i / 2], i % 2);
            b[row][column] = element<T>(lane(n)->b->x[i / 2], i % 2);
            d[row][column] = &lane(n)->d->x[i];
        }
    for (int row = 0; row < 16; ++row) {
        double sum[16] = {};
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n) sum[n] += double(a[row][k]) * b[k][n];
        for (int n = 0; n < 16; ++n) *d[row][n] = float(*d[row][n] + sum[n]);
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
