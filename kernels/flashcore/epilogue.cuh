// epilogue.cuh - O leaves: fp32 in shared memory, normalised, converted, stored in wide pieces.
#pragma once
#include <flashcore/ptx_convert.cuh>
#include <flashcore/smem_tile.cuh>

namespace flashcore {

// A query that saw no key has factor 0. Its output is 0, even where NaN in a value that others of
// its tile saw has made NaN of the sum.
__device__ __forceinline__ float scaled_output(float o, float factor) {
    return factor == 0.0f ? 0.0f : o * factor;
}

// Stores ROWS x DIM fp32 values from shared memory (row length LD), each row multiplied by
// sFactor[row], as T. THREADS threads take part, this one being number `thread`. Rows from
// valid_rows on are not written.
template <int ROWS, int DIM, int LD, int BYTES, int THREADS, typename T>
__device__ __forceinline__ void store_rows(T* gO, int64 row_stride, const float* sO,
                                           const float* sFactor, int valid_rows, int thread) {
    constexpr int VEC = BYTES / int(sizeof(T));
    constexpr int PIECES_PER_ROW = DIM / VEC;
    static_assert(DIM % VEC == 0, "a piece is all inside");
    for (int i = thread; i < ROWS * PIECES_PER_ROW; i += THREADS) {
        const int row = i / PIECES_PER_ROW;
        const int col = (i % PIECES_PER_ROW) * VEC;
        if (row >= valid_rows) break;  // rows only grow from here
        union {
            T element[VEC];
            Vector<BYTES> vector;
        } piece;
#pragma unroll
        for (int e = 0; e < VEC; ++e)
            piece.element[e] = from_float<T>(scaled_output(sO[row * LD + col + e], sFactor[row]));
        *reinterpret_cast<Vector<BYTES>*>(gO + row * row_stride + col) = piece.vector;
    }
}

// Stores ROWS x DIM values of T that are already final, from shared rows LD apart.
template <int ROWS, int DIM, int LD, int BYTES, int THREADS, typename T>
__device__ __forceinline__ void copy_rows_out(T* gO, int64 row_stride, const T* sO, int valid_rows,
                                              int thread) {
    constexpr int VEC = BYTES / int(sizeof(T));
    constexpr int PIECES_PER_ROW = DIM / VEC;
    for (int i = thread; i < ROWS * PIECES_PER_ROW; i += THREADS) {
        const int row = i / PIECES_PER_ROW;
        const int col = (i % PIECES_PER_ROW) * VEC;
        if (row >= valid_rows) break;  // rows only grow from here
        *reinterpret_cast<Vector<BYTES>*>(gO + row * row_stride + col) =
            *reinterpret_cast<const Vector<BYTES>*>(sO + row * LD + col);
    }
}

}  // namespace flashcore
