// tile_load.cuh - the ladder's tiles, from global to shared memory: padded rows, zeros where there
// are no rows or columns, loads as wide as the alignment allows.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/tile_copy.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Row length of WMMA's tiles in shared memory, in elements. WMMA wants a multiple of 8; the eight
// rows of 16 bytes that one phase of its load touches fall into different banks when the row is an
// odd multiple of 16 bytes. COLS is a multiple of 16, so COLS + 8 is both.
__host__ __device__ constexpr int padded_row(int cols) { return cols + 8; }

// Loads a ROWS x COLS tile with all threads of the block. Rows from valid_rows on and columns from
// VALID_COLS on become zeros: a masked probability is 0, but 0 * NaN is not, so what lies beyond
// the sequence must never reach shared memory. BYTES per copy; cp.async has no 2-byte form, so such
// rows are copied through registers even where asynchronous copies were asked for.
template <int ROWS, int COLS, int VALID_COLS, int BYTES, int THREADS, bool ASYNC, typename T>
__device__ __forceinline__ void load_tile(T* sTile, const T* gTile, int64 row_stride,
                                          int valid_rows) {
    constexpr int VEC = BYTES / int(sizeof(T));  // elements per copy
    constexpr int COPIES_PER_ROW = COLS / VEC;
    constexpr int COPIES = ROWS * COPIES_PER_ROW;
    static_assert(VALID_COLS % VEC == 0, "a copy is all inside or all outside");
#pragma unroll 4
    for (int i = thread_index(); i < COPIES; i += THREADS) {
        const int row = i / COPIES_PER_ROW;
        const int col = (i % COPIES_PER_ROW) * VEC;
        const bool valid = row < valid_rows && (VALID_COLS == COLS || col < VALID_COLS);
        // An address outside the array is not formed, even for a copy of zero bytes.
        const T* source = valid ? gTile + row * row_stride + col : gTile;
        T* target = sTile + row * padded_row(COLS) + col;
        if constexpr (ASYNC && BYTES >= 4) {
            copy_async<BYTES>(shared_address(target), source, valid);
        } else {
            copy_sync<BYTES>(target, source, valid);
        }
    }
}

// Loads a tile of contiguous e4m3 rows of COLS bytes and widens them to T on the way: e4m3 values
// are exact in fp16 and bf16, and the head's scale is applied to the scores and to O, so nothing is
// rounded.
template <int ROWS, int COLS, int THREADS, typename T>
__device__ __forceinline__ void load_tile_e4m3(T* sTile, const e4m3_t* gTile, int valid_rows) {
    constexpr int PIECES_PER_ROW = COLS / 8;
#pragma unroll 4
    for (int i = thread_index(); i < ROWS * PIECES_PER_ROW; i += THREADS) {
        const int row = i / PIECES_PER_ROW;
        const int col = (i % PIECES_PER_ROW) * 8;
        uint2 packed{};
        if (row < valid_rows)
            packed = *reinterpret_cast<const uint2*>(gTile + int64(row) * COLS + col);
        *reinterpret_cast<uint4*>(sTile + row * padded_row(COLS) + col) =
            uint4{widen_e4m3x2<T>(packed.x), widen_e4m3x2<T>(packed.x >> 16),
                  widen_e4m3x2<T>(packed.y), widen_e4m3x2<T>(packed.y >> 16)};
    }
}

}  // namespace flashcore
