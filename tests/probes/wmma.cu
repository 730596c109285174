// Probes of ptx/wmma.cuh and wmma_tile.cuh: any number of warps, a block each, with a 16 x 16 x 16
// product each, rows LD apart. A is stored row by row; B once row by row (like V) and once column
// by column (like K).
#include <ladder/wmma_tile.cuh>

using namespace flashcore;

constexpr int LD = 24;
constexpr int LD_C = 20;

template <typename T>
__device__ void products(const uint16* a, const uint16* b, const float* c, float* row, float* col,
                         float* global) {
    T* const sA = reinterpret_cast<T*>(dynamic_shared<128>());
    T* const sB = sA + 16 * LD;
    float* const sC = reinterpret_cast<float*>(sB + 16 * LD);
    const int lane = thread_index(), first = block_index() * 256;
    a += first, b += first, c += first, row += first, col += first, global += first;
    for (int i = lane; i < 256; i += 32) {
        sA[i / 16 * LD + i % 16].bits = a[i];
        sB[i / 16 * LD + i % 16].bits = b[i];
        sC[i / 16 * LD_C + i % 16] = c[i];
    }
    warp_sync();
    FragmentAB<T> rA, rB;
    Accumulator rC;
    wmma_load_a_row(rA, sA, LD);
    wmma_load_b_row(rB, sB, LD);
    wmma_load_c_row(rC, sC, LD_C);
    wmma_mma_row_row(rC, rA, rB);
    warp_sync();
    wmma_store_d_row(sC, rC, LD_C);
    warp_sync();
    for (int i = lane; i < 256; i += 32) row[i] = sC[i / 16 * LD_C + i % 16];
    fill(rC, 0.5f);
    wmma_load_b_col(rB, sB, LD);
    wmma_mma_row_col(rC, rA, rB);
    warp_sync();
    wmma_store_d_row(sC, rC, LD_C);
    wmma_store_d_row_global(global, rC, 16);
    warp_sync();
    for (int i = lane; i < 256; i += 32) col[i] = sC[i / 16 * LD_C + i % 16];
}

extern "C" __global__ void products_half(const uint16* a, const uint16* b, const float* c,
                                         float* row, float* col, float* global) {
    products<half_t>(a, b, c, row, col, global);
}

extern "C" __global__ void products_bfloat16(const uint16* a, const uint16* b, const float* c,
                                             float* row, float* col, float* global) {
#if __CUDA_ARCH__ >= 800
    products<bfloat16_t>(a, b, c, row, col, global);
#endif
}

// Multiplies row r of a matrix by factor[r] in registers, by accumulator_rows.
extern "C" __global__ void scaled_rows(const float* c, const float* factor, float* out) {
    float* const sC = reinterpret_cast<float*>(dynamic_shared<128>());
    float* const sFactor = sC + 16 * LD_C;
    const int lane = thread_index();
    RegisterOutput<1> output;
    accumulator_rows<LD_C>(output.rows, sC);
    for (int i = lane; i < 256; i += 32) sC[i / 16 * LD_C + i % 16] = c[i];
    if (lane < 16) sFactor[lane] = factor[lane];
    warp_sync();
    wmma_load_c_row(output.rO[0], sC, LD_C);
    output.scale_rows(sFactor);
    wmma_store_d_row_global(out, output.rO[0], 16);
}
