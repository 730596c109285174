// Probes of ptx/mma.cuh: one warp, one 16 x 8 x 16 product with A, and B stored both ways,
// in the padded layout and in the last 16 columns of swizzled ones.
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>

using namespace flashcore;

// a: 16 x 16. b: 16 x 16, of which row-major (like V, transposed on load) and column-major (like K)
// readings give two products each: columns 0-7 and 8-15.
template <typename T, int COLS>
__device__ void products(const uint16* a, const uint16* b, const float* c, float* row, float* col) {
    using Layout = SharedLayout<T, 16, COLS>;
    __shared__ __align__(128) T sA[Layout::SIZE];
    __shared__ __align__(128) T sB[Layout::SIZE];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        const int element = Layout::element(i / 16, COLS - 16 + i % 16);
        sA[element].bits = a[i];
        sB[element].bits = b[i];
    }
    warp_sync();
    uint32 rA[4], rB[4];
    // From the tile's first columns, as a kernel gets there.
    const uint32 rows_a = lane_address_rows_first<Layout>(sA, 0, 0);
    const uint32 rows_b = lane_address_rows_first<Layout>(sB, 0, 0);
    const uint32 columns_b = lane_address_columns_first<Layout>(sB, 0, 0);
    ldmatrix_x4(rA, Layout::step_bytes(rows_a, 0, COLS - 16));
    for (int way = 0; way < 2; ++way) {
        float* out = way == 0 ? row : col;
        if (way == 0) {
            ldmatrix_x4_trans(rB, Layout::step_bytes(rows_b, 0, COLS - 16));
        } else {
            ldmatrix_x4(rB, Layout::step_bytes(columns_b, 0, COLS - 16));
        }
        for (int half = 0; half < 2; ++half) {
            float rC[4];
            for (int e = 0; e < 4; ++e)
                rC[e] = c[(lane / 4 + e / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + e % 2];
            mma_m16n8k16<T>(rC, rA, rB[2 * half], rB[2 * half + 1]);
            for (int e = 0; e < 4; ++e)
                out[(lane / 4 + e / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + e % 2] = rC[e];
        }
    }
}

template <typename T>
__device__ void products(int columns, const uint16* a, const uint16* b, const float* c, float* row,
                         float* col) {
    if (columns == 16) products<T, 16>(a, b, c, row, col);
    if (columns == 96) products<T, 96>(a, b, c, row, col);
    if (columns == 128) products<T, 128>(a, b, c, row, col);
}

extern "C" __global__ void products_half(const int* columns, const uint16* a, const uint16* b,
                                         const float* c, float* row, float* col) {
    products<half_t>(*columns, a, b, c, row, col);
}

extern "C" __global__ void products_bfloat16(const int* columns, const uint16* a, const uint16* b,
                                             const float* c, float* row, float* col) {
    products<bfloat16_t>(*columns, a, b, c, row, col);
}
