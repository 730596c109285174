// store_rows.cuh - the ladder's O, from fp32 in shared memory, normalised and converted.
#pragma once
#include <flashcore/output/epilogue.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

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

}  // namespace flashcore
