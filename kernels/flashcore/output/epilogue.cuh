// epilogue.cuh - how O, normalised and converted, is stored: in wide pieces from registers or from
// shared memory; or into shared memory, from where TMA stores it.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/tile/shared_layout.cuh>
#include <flashcore/tile/tile_copy.cuh>

namespace flashcore {

// A query that sees no key has factor 0. Its output is 0 even if O is NaN, which a NaN among the
// values that other rows of its tile see can make it: 0 * NaN is NaN.
__device__ __forceinline__ float scaled_output(float o, float factor) {
    return factor == 0.0f ? 0.0f : o * factor;
}

// Two neighbouring values, converted to T, in one store.
template <typename T>
__device__ __forceinline__ void store_pair(T* address, float lo, float hi) {
    if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(address) = float2{lo, hi};
    } else {
        *reinterpret_cast<uint32*>(address) = pack2<T>(lo, hi);
    }
}

// One warp stores the ROWS x COLS values of a shared tile that begin at (first_row, first_col).
// row_of(row, valid) returns a row's address in global memory and sets whether the row exists.
// Columns from valid_cols on are left out.
template <typename Layout, int ROWS, int COLS, int BYTES, typename T, typename RowOf>
__device__ __forceinline__ void scatter_rows(const T* sO, int first_row, int first_col,
                                             RowOf row_of, int valid_cols, int lane) {
    constexpr int VEC = BYTES / int(sizeof(T));
    constexpr int PIECES_PER_ROW = COLS / VEC;
#pragma unroll(COLS > 64 ? 4 : 1)
    for (int i = lane; i < ROWS * PIECES_PER_ROW; i += WARP_SIZE) {
        const int row = i / PIECES_PER_ROW;
        const int col = (i % PIECES_PER_ROW) * VEC;
        bool valid;
        T* gO = row_of(row, valid);
        if (valid && col < valid_cols)
            *reinterpret_cast<Vector<BYTES>*>(gO + col) = *reinterpret_cast<const Vector<BYTES>*>(
                sO + Layout::element(first_row + row, first_col + col));
    }
}

// Stores four neighbouring values as T, each multiplied by factor. Leaves out those from valid_cols
// on.
template <int BYTES, typename T>
__device__ __forceinline__ void store_four(T* address, int valid_cols, const float4& o,
                                           float factor) {
    constexpr int SIZE = BYTES < 4 * int(sizeof(T)) ? BYTES : 4 * int(sizeof(T));
    constexpr int VEC = SIZE / int(sizeof(T));
    union {
        T element[4];
        Vector<SIZE> vector[4 / VEC];
    } piece = {
        {from_float<T>(scaled_output(o.x, factor)), from_float<T>(scaled_output(o.y, factor)),
         from_float<T>(scaled_output(o.z, factor)), from_float<T>(scaled_output(o.w, factor))}};
#pragma unroll
    for (int i = 0; i < 4 / VEC; ++i)
        if (i * VEC < valid_cols) reinterpret_cast<Vector<SIZE>*>(address)[i] = piece.vector[i];
}

// A warp puts 16 rows of O, converted, into a tile of shared memory. Lane l has columns
// 8 n + 2 (l % 4), +1 of row l / 4 as pair(n, 0), of row l / 4 + 8 as pair(n, 1).
template <typename Layout, typename Pair>
__device__ __forceinline__ void put_rows(uint32 tile, Pair pair) {
    static_assert(Layout::ROWS == 16 && Layout::COLS % 16 == 0, "two by two blocks at a time");
    const int lane = thread_index() % WARP_SIZE;
    const uint32 row_address =
        tile + Layout::element(lane % 16, lane / 16 * 8) * int(sizeof(typename Layout::Element));
#pragma unroll
    for (int n = 0; n < Layout::COLS / 8; n += 2)
        stmatrix_x4(Layout::step_bytes(row_address, 0, n * 8),
                    {pair(n, 0), pair(n, 1), pair(n + 1, 0), pair(n + 1, 1)});
}

// Stores a row of COLS values of T that four neighbouring lanes share, as wgmma and mma.sync leave
// it: pair(n) is this lane's two of columns 8 n to 8 n + 7. The lanes exchange pairs until each has
// 8 neighbouring columns. Leaves out columns from valid_cols on. All lanes of the warp take part.
template <int COLS, int BYTES, typename T, typename Pair>
__device__ __forceinline__ void store_quad_row(T* gO, bool valid, int valid_cols, Pair pair) {
    static_assert(COLS % 32 == 0 && sizeof(T) == 2, "16 bytes for each of the four lanes");
    constexpr int VEC = BYTES / int(sizeof(T));
    const int first_col = thread_index() % 4 * 8;
#pragma unroll
    for (int group = 0; group < COLS; group += 32) {
        union {
            uint32 words[4];
            Vector<BYTES> vectors[16 / BYTES];
        } piece;
#pragma unroll
        for (int i = 0; i < 4; ++i) piece.words[i] = pair(group / 8 + i);
        quad_transpose(piece.words);
#pragma unroll
        for (int i = 0; i < 16 / BYTES; ++i) {
            const int col = group + first_col + i * VEC;
            if (valid && col < valid_cols)
                *reinterpret_cast<Vector<BYTES>*>(gO + col) = piece.vectors[i];
        }
    }
}

// The same without the exchange: two columns at a time.
template <int COLS, int BYTES, typename T, typename Pair>
__device__ __forceinline__ void store_quad_pairs(T* gO, bool valid, int valid_cols, Pair pair) {
    static_assert(COLS % 8 == 0 && sizeof(T) == 2, "two columns for each of the four lanes");
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n) {
        const int col = n * 8 + thread_index() % 4 * 2;
        const uint32 both = pair(n);
        if (!valid || col >= valid_cols) continue;
        if constexpr (BYTES >= 4) {
            *reinterpret_cast<uint32*>(gO + col) = both;
        } else {
            reinterpret_cast<uint16*>(gO)[col] = uint16(both);
            reinterpret_cast<uint16*>(gO)[col + 1] = uint16(both >> 16);
        }
    }
}

}  // namespace flashcore
