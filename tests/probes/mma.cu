// Probes of ptx_mma.cuh: one warp, one 16 x 8 x 16 product with A, and B stored both ways, LD apart.
#include <flashcore/mma_sync_tile.cuh>
#include <flashcore/ptx_warp.cuh>

using namespace flashcore;

constexpr int LD = 24;

// a: 16 x 16. b: 16 x 16, of which row-major (like V, transposed on load) and column-major (like K)
// readings give two products each: columns 0-7 and 8-15.
template <typename T>
__device__ void products(const uint16* a, const uint16* b, const float* c, float* row, float* col) {
    __shared__ __align__(128) T sA[16 * LD];
    __shared__ __align__(128) T sB[16 * LD];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        sA[i / 16 * LD + i % 16].bits = a[i];
        sB[i / 16 * LD + i % 16].bits = b[i];
    }
    warp_sync();
    uint32 rA[4], rB[4];
    ldmatrix_x4(rA, shared_address(sA) + lane_offset_rows_first<LD>());
    for (int way = 0; way < 2; ++way) {
        float* out = way == 0 ? row : col;
        if (way == 0) {
            ldmatrix_x4_trans(rB, shared_address(sB) + lane_offset_rows_first<LD>());
        } else {
            ldmatrix_x4(rB, shared_address(sB) + lane_offset_columns_first<LD>());
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

extern "C" __global__ void products_half(const uint16* a, const uint16* b, const float* c,
                                         float* row, float* col) {
    products<half_t>(a, b, c, row, col);
}

extern "C" __global__ void products_bfloat16(const uint16* a, const uint16* b, const float* c,
                                             float* row, float* col) {
    products<bfloat16_t>(a, b, c, row, col);
}
