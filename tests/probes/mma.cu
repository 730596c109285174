// Probes of ptx/mma.cuh.
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>

using namespace flashcore;

// One warp. Where ldmatrix reads: lane l gives the address of row rows[l] of x. x: 128 rows of 16
// bytes; plain, transposed, floats: (32, 4).
extern "C" __global__ void matrices(const uint4* x, const int* rows, uint32* plain,
                                    uint32* transposed, float* floats) {
    uint4* const shared = reinterpret_cast<uint4*>(dynamic_shared<128>());
    const int lane = thread_index();
    for (int i = lane; i < 128; i += WARP_SIZE) shared[i] = x[i];
    warp_sync();
    const uint32 row = shared_address(shared + rows[lane]);
    uint32 r[4];
    float f[4];
    ldmatrix_x4(r, row);
    for (int i = 0; i < 4; ++i) plain[lane * 4 + i] = r[i];
    ldmatrix_x4_trans(r, row);
    for (int i = 0; i < 4; ++i) transposed[lane * 4 + i] = r[i];
    ldmatrix_x4(f, row);
    for (int i = 0; i < 4; ++i) floats[lane * 4 + i] = f[i];
}

// One warp, a 16 x 8 x 16 product with A, and B stored both ways, in the padded layout and in the
// last 16 columns of swizzled ones. a: 16 x 16. b: 16 x 16, of which row-major (like V, transposed on load) and column-major (like K)
// readings give two products each: columns 0-7 and 8-15.
template <typename T, int COLS>
__device__ void products(const uint16* a, const uint16* b, const float* c, float* row, float* col) {
    using Layout = SharedLayout<T, 16, COLS>;
    static_assert(Layout::SIZE * sizeof(T) % 128 == 0);
    T* const sA = reinterpret_cast<T*>(dynamic_shared<128>());
    T* const sB = sA + Layout::SIZE;
    const int lane = thread_index();
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

// Any number of warps, a block each, with one product each: d = a b + c of 16 x 16, 16 x 8 and
// 16 x 8, row-major.
template <typename T>
__device__ void one_product(const uint16* a, const uint16* b, const float* c, float* d) {
    const int lane = thread_index(), block = block_index();
    a += block * 256, b += block * 128, c += block * 128, d += block * 128;
    uint32 rA[4], rB[2];
    for (int i = 0; i < 4; ++i) {
        const uint16* const pair = a + (lane / 4 + i % 2 * 8) * 16 + lane % 4 * 2 + i / 2 * 8;
        rA[i] = pair[0] | uint32(pair[1]) << 16;
    }
    for (int i = 0; i < 2; ++i) {
        const uint16* const pair = b + (lane % 4 * 2 + i * 8) * 8 + lane / 4;
        rB[i] = pair[0] | uint32(pair[8]) << 16;
    }
    float rC[4];
    const auto place = [&](int e) { return (lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2; };
    for (int e = 0; e < 4; ++e) rC[e] = c[place(e)];
    mma_m16n8k16<T>(rC, rA, rB[0], rB[1]);
    for (int e = 0; e < 4; ++e) d[place(e)] = rC[e];
}

extern "C" __global__ void one_half(const uint16* a, const uint16* b, const float* c, float* d) {
    one_product<half_t>(a, b, c, d);
}

extern "C" __global__ void one_bfloat16(const uint16* a, const uint16* b, const float* c,
                                        float* d) {
    one_product<bfloat16_t>(a, b, c, d);
}
