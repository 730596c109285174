// Probes of the tf32 instruction in ptx/mma.cuh and of mma_tf32_tile.cuh, one warp.
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/tile/mma_tf32_tile.cuh>

using namespace flashcore;

constexpr int QUAD = 4;
constexpr int FRAGMENTS_M = 2, TILES_N = 4;  // 32 rows; 32 keys at a time
constexpr int ROWS = FRAGMENTS_M * 16, KEYS = TILES_N * 8;

// Any number of warps, a block each, with one product each: d = a b + c, of 16 x 8, 8 x 8 and
// 16 x 8, row-major.
extern "C" __global__ void product_tf32(const float* a, const float* b, const float* c, float* d) {
    float* const sA = reinterpret_cast<float*>(dynamic_shared<128>());
    float* const sB = sA + 16 * 8;
    const int block = block_index();
    a += block * 128, b += block * 64, c += block * 128, d += block * 128;
    const int lane = thread_index(), row = lane / QUAD, col = lane % QUAD;
    for (int i = lane; i < 16 * 8; i += WARP_SIZE) sA[i] = a[i];
    for (int i = lane; i < 8 * 8; i += WARP_SIZE) sB[i] = b[i];
    warp_sync();
    float rA[4], rB[2], rC[4];
    ldmatrix_x4(rA, shared_address(sA) + lane_offset_q_f32<8>());
    for (int i = 0; i < 2; ++i) rB[i] = load_shared(shared_address(sB + (col + i * 4) * 8 + row));
    for (int e = 0; e < 4; ++e) rC[e] = c[(row + e / 2 * 8) * 8 + col * 2 + e % 2];
    uint32 a_bits[4];
    for (int i = 0; i < 4; ++i) a_bits[i] = __builtin_bit_cast(uint32, rA[i]);
    mma_m16n8k8_tf32(rC, a_bits, __builtin_bit_cast(uint32, rB[0]),
                     __builtin_bit_cast(uint32, rB[1]));
    for (int e = 0; e < 4; ++e) d[(row + e / 2 * 8) * 8 + col * 2 + e % 2] = rC[e];
}

template <int ROWS_TILE, int DEPTH>
__device__ void load(float* sTile, const float* gTile) {
    for (int i = thread_index(); i < ROWS_TILE * DEPTH; i += WARP_SIZE)
        sTile[SharedLayout<float, 16, DEPTH>::element(i / DEPTH, i % DEPTH)] = gTile[i];
}

// f(value in the fragments, its row, its column) over what this lane holds.
template <int TILES, typename F>
__device__ void for_each(AccumulatorTile<FRAGMENTS_M, TILES>& tile, F f) {
    for (int m = 0; m < FRAGMENTS_M; ++m)
        for (int n = 0; n < TILES; ++n)
            for (int e = 0; e < 4; ++e)
                f(tile.x[m][n][e], m * 16 + e / 2 * 8 + thread_index() / QUAD,
                  n * 8 + thread_index() % QUAD * 2 + e % 2);
}

// s = q k^T and o = p v over `keys` keys, a multiple of KEYS, as attention walks over them. q, o:
// ROWS x DEPTH; k, v: keys x DEPTH; s, p: ROWS x keys.
template <int DEPTH>
__device__ void products(const float* q, const float* k, const float* p, const float* v, int keys,
                         float* s, float* o) {
    constexpr int LD = SharedLayout<float, 16, DEPTH>::LD;
    static_assert(ROWS * LD % 32 == 0 && KEYS * LD % 32 == 0);
    float* const sQ = reinterpret_cast<float*>(dynamic_shared<128>());
    float* const sK = sQ + ROWS * LD;
    float* const sV = sK + KEYS * LD;
    load<ROWS, DEPTH>(sQ, q);
    AccumulatorTile<FRAGMENTS_M, DEPTH / 8> rO;
    rO.clear();
    for (int first = 0; first < keys; first += KEYS) {
        warp_sync();
        load<KEYS, DEPTH>(sK, k + first * DEPTH);
        load<KEYS, DEPTH>(sV, v + first * DEPTH);
        warp_sync();
        AccumulatorTile<FRAGMENTS_M, TILES_N> rS, rP;
        multiply_qk_f32<FRAGMENTS_M, TILES_N, DEPTH, LD>(
            rS, shared_address(sQ) + lane_offset_q_f32<LD>(),
            shared_address(sK) + lane_offset_k_f32<LD>());
        for_each(rS, [&](float x, int row, int key) { s[row * keys + first + key] = x; });
        for_each(rP, [&](float& x, int row, int key) { x = p[row * keys + first + key]; });
        multiply_pv_f32<LD>(rO, rP, shared_address(sV) + lane_offset_v_f32<LD>(),
                            KeyBits<false, TILES_N>{});
    }
    for_each(rO, [&](float x, int row, int col) { o[row * DEPTH + col] = x; });
}

extern "C" __global__ void products_48(const float* q, const float* k, const float* p,
                                       const float* v, const int* keys, float* s, float* o) {
    products<48>(q, k, p, v, *keys, s, o);
}

extern "C" __global__ void products_64(const float* q, const float* k, const float* p,
                                       const float* v, const int* keys, float* s, float* o) {
    products<64>(q, k, p, v, *keys, s, o);
}

// Where each lane reads, for the arithmetic of the banks.
extern "C" __global__ void offsets_64(uint32* q, uint32* k, uint32* v) {
    constexpr int LD = SharedLayout<float, 16, 64>::LD;
    q[thread_index()] = lane_offset_q_f32<LD>();
    k[thread_index()] = lane_offset_k_f32<LD>();
    v[thread_index()] = lane_offset_v_f32<LD>();
}
