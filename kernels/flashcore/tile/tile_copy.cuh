// tile_copy.cuh - tiles from global to shared memory by all threads of a CTA: loads as wide as the
// alignment allows, zeros where there are no rows or columns.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/shared_layout.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

template <int BYTES>
__device__ __forceinline__ void copy_async(uint32 shared, const void* global, bool valid) {
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16) cp_async_16(shared, global, bytes);
    if constexpr (BYTES == 8) cp_async_8(shared, global, bytes);
    if constexpr (BYTES == 4) cp_async_4(shared, global, bytes);
}

template <int BYTES>
__device__ __forceinline__ void copy_sync(void* shared, const void* global, bool valid) {
    Vector<BYTES> value{};
    if (valid) value = *static_cast<const Vector<BYTES>*>(global);
    *static_cast<Vector<BYTES>*>(shared) = value;
}

__host__ __device__ constexpr int common_power_of_two(int a, int b) {
    int n = 1;
    while (a % (2 * n) == 0 && b % (2 * n) == 0) n *= 2;
    return n;
}

// How the threads of a CTA share out the pieces of a tile, for the loads of a main loop. A thread
// has the same columns in every ROWS_PER_PASS-th row, so one address and constant steps reach all
// its pieces, and a tile whose rows all exist needs no comparison at all.
template <typename Layout, int VALID_COLS, int BYTES, int THREADS>
struct TileCopy {
    using T = typename Layout::Element;
    static constexpr int ROWS = Layout::ROWS, COLS = Layout::COLS;
    static constexpr int VEC = BYTES / int(sizeof(T));  // elements per copy
    static constexpr int THREADS_PER_ROW = common_power_of_two(Layout::PANEL / VEC, THREADS);
    static constexpr int COLS_PER_PASS = THREADS_PER_ROW * VEC;
    static constexpr int ROWS_PER_PASS = THREADS / THREADS_PER_ROW;
    static constexpr int PASSES = div_up(ROWS, ROWS_PER_PASS);
    // Whether a thread's shared addresses are constant steps apart. If not (narrow pieces, few
    // threads), each one is computed by itself.
    static constexpr bool STEPS = ROWS_PER_PASS % Layout::PERIOD == 0 &&
                                  (!Layout::SWIZZLED || COLS_PER_PASS % Layout::PANEL == 0);
    static_assert(VALID_COLS % VEC == 0, "a copy is all inside or all outside");
    static constexpr bool ASYNC = BYTES >= 4;  // otherwise through registers

    // Starts copying rows [first_valid, end_valid) from gTile. Other rows and columns are filled
    // with zeros: a masked probability is 0, but 0 * NaN is not, so what lies outside must not
    // reach shared memory.
    __device__ static __forceinline__ void load(T* sTile, const T* gTile, int64 row_stride,
                                                int first_valid, int end_valid) {
        if (first_valid <= 0 && end_valid >= ROWS) {
            passes<true>(sTile, gTile, row_stride, first_valid, end_valid);
        } else {
            passes<false>(sTile, gTile, row_stride, first_valid, end_valid);
        }
    }

    // Whether a thread reaches all its pieces from the first one: see load_all.
    static constexpr bool BY_PIECES = STEPS && ROWS % ROWS_PER_PASS == 0 && BYTES >= 8;

    // This thread's first piece of the tile that begins at row first_row of gRows, and the shared
    // address where it goes.
    __device__ static __forceinline__ const T* first_piece(const T* gRows, int64 row_stride,
                                                           int first_row) {
        const int thread = thread_index_volatile();
        return gRows + (first_row + thread / THREADS_PER_ROW) * row_stride +
               thread % THREADS_PER_ROW * VEC;
    }
    __device__ static __forceinline__ uint32 first_target(const T* sTile) {
        const int thread = thread_index_volatile();
        return shared_address(
            sTile + Layout::element(thread / THREADS_PER_ROW, thread % THREADS_PER_ROW * VEC));
    }
    // Starts copying a tile all of whose rows are valid. Its first piece lies at `source` and goes
    // to `target`.
    __device__ static __forceinline__ void load_all(uint32 target, const T* source,
                                                    int64 row_stride) {
        const int first_col = thread_index_volatile() % THREADS_PER_ROW * VEC;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
#pragma unroll
            for (int col = 0; col < COLS; col += COLS_PER_PASS) {
                const bool valid = VALID_COLS == COLS || first_col + col < VALID_COLS;
                copy_async<BYTES>(Layout::step_bytes(target, pass * ROWS_PER_PASS, col),
                                  valid ? source + col : source, valid);
            }
            source += ROWS_PER_PASS * row_stride;
        }
    }

  private:
    template <bool FULL>
    __device__ static __forceinline__ void passes(T* sTile, const T* gTile, int64 row_stride,
                                                  int first_valid, int end_valid) {
        const int thread = thread_index_volatile();
        const int first_row = thread / THREADS_PER_ROW;
        const int first_col = thread % THREADS_PER_ROW * VEC;
        const T* source = gTile + first_row * row_stride + first_col;
        T* const target = sTile + Layout::element(first_row, first_col);
#pragma unroll(BYTES >= 8 ? PASSES : 1)
        for (int pass = 0; pass < PASSES; ++pass) {
            const int row = pass * ROWS_PER_PASS + first_row;
            if (ROWS % ROWS_PER_PASS != 0 && row >= ROWS) break;
            const bool row_valid = FULL || (row >= first_valid && row < end_valid);
#pragma unroll
            for (int col = 0; col < COLS; col += COLS_PER_PASS) {
                const bool valid =
                    row_valid && (VALID_COLS == COLS || first_col + col < VALID_COLS);
                // An address outside the array is not read, even for a copy of zero bytes.
                const T* from = valid ? source + col : gTile;
                T* to = STEPS ? target + Layout::step(0, pass * ROWS_PER_PASS, col)
                              : sTile + Layout::element(row, first_col + col);
                if constexpr (ASYNC) {
                    copy_async<BYTES>(shared_address(to), from, valid);
                } else {
                    copy_sync<BYTES>(to, from, valid);
                }
            }
            source += ROWS_PER_PASS * row_stride;
        }
    }
};

// Starts copying rows that lie anywhere: row_of(row, valid) returns the address of a row's first
// element and sets whether the row exists. Other rows and columns are filled with zeros.
template <typename Layout, int VALID_COLS, int BYTES, int THREADS, typename T, typename RowOf>
__device__ __forceinline__ void gather_rows(T* sTile, RowOf row_of) {
    constexpr int VEC = BYTES / int(sizeof(T));
    constexpr int COPIES_PER_ROW = Layout::COLS / VEC;
#pragma unroll 1
    for (int i = thread_index(); i < Layout::ROWS * COPIES_PER_ROW; i += THREADS) {
        const int row = i / COPIES_PER_ROW;
        const int col = (i % COPIES_PER_ROW) * VEC;
        bool valid;
        const T* source = row_of(row, valid);
        valid = valid && col < VALID_COLS;
        if (valid) source += col;
        T* target = sTile + Layout::element(row, col);
        if constexpr (BYTES >= 4) {
            copy_async<BYTES>(shared_address(target), source, valid);
        } else {
            copy_sync<BYTES>(target, source, valid);
        }
    }
}

}  // namespace flashcore
