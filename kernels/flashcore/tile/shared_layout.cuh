// shared_layout.cuh - where the elements of a tile lie in shared memory, so that neither copies nor
// ldmatrix meet bank conflicts.
//
// Swizzled (16-bit types, columns a multiple of 32): panels of 64 columns (32 where 64 does not
// divide), each ROWS rows of 128 (64) bytes without gaps. Within a row 16-byte chunks swap places:
// chunk c of row r lies at c ^ (r % 8), or c ^ (r / 2 % 4) in rows of 64 bytes. So the eight rows
// that ldmatrix reads at once, the same chunk of each, fall into different banks. And every 32-byte
// sector from global memory lands on a 32-byte boundary. In padded rows it does not, and a copy
// takes 2.6 times as many accesses. Panels of 64 columns are TMA's and wgmma's 128-byte swizzle,
// too.
//
// Padded (all others): rows of COLS elements and 16 bytes more.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

template <typename T, int ROWS_, int COLS_>
struct SharedLayout {
    using Element = T;
    static constexpr int ROWS = ROWS_, COLS = COLS_;
    static constexpr int CHUNK = 16 / int(sizeof(T));  // elements
    static constexpr bool SWIZZLED = sizeof(T) == 2 && COLS % 32 == 0;
    static constexpr int PANEL = !SWIZZLED ? COLS : COLS % 64 == 0 ? 64 : 32;  // columns
    static constexpr int LD = SWIZZLED ? PANEL : COLS + CHUNK;                 // from row to row
    static constexpr int SIZE = COLS / PANEL * ROWS * LD;
    static constexpr int BYTES = SIZE * int(sizeof(T));
    // Rows that are PERIOD rows apart have their chunks in the same order.
    static constexpr int PERIOD = SWIZZLED ? 8 : 1;

    // The index of element (row, col). Unsigned: / and % are shifts and masks.
    __device__ static __forceinline__ uint32 element(uint32 row, uint32 col) {
        if constexpr (SWIZZLED) {
            const uint32 chunk = col % PANEL / CHUNK ^ row / (64 / PANEL) % (PANEL / CHUNK);
            return (col / PANEL * ROWS + row) * LD + chunk * CHUNK + col % CHUNK;
        } else {
            return row * LD + col;
        }
    }

    // The index of element (r + rows, c + cols), given the index of (r, c). `rows` is a multiple of
    // PERIOD and `cols` of CHUNK, and c has no bit in common with cols within a panel. With
    // constant rows and cols that is one xor at most, and the rest is the instruction's offset.
    __device__ static __forceinline__ int step(int element, int rows, int cols) {
        if (!SWIZZLED) return element + rows * LD + cols;
        return (element ^ cols % PANEL) + (cols / PANEL * ROWS + rows) * LD;
    }
    // The same for a byte address in shared memory, of a tile that starts at a multiple of 128.
    __device__ static __forceinline__ uint32 step_bytes(uint32 address, int rows, int cols) {
        constexpr int SIZE_OF = int(sizeof(T));
        if (!SWIZZLED) return address + (rows * LD + cols) * SIZE_OF;
        return (address ^ cols % PANEL * SIZE_OF) + (cols / PANEL * ROWS + rows) * LD * SIZE_OF;
    }

    // The first column of the i-th step of 16 columns. Steps with the same xor follow each other,
    // so that fewer addresses are in registers at a time.
    __device__ static __forceinline__ constexpr int nth_step(int i) {
        constexpr int PANELS = COLS / PANEL;
        return i % PANELS * PANEL + i / PANELS * 16;
    }
};

}  // namespace flashcore
