// fp8_quantize.cu - q, k, v to e4m3, one scale per (batch, head), ahead of wmma_fused.cu's FP8
// form.
//
//   scale = max |x| / 448 over the finite values of the head's visible rows,  x8 = e4m3(x / scale)
//
// so the largest value uses e4m3's whole range (448). A head whose maximum is below 1e-30 keeps the
// scale 1. NaN and infinities become e4m3's NaN: they still reach the outputs that attend to them.
// One CTA per head of q, k and v reads the head twice, once for the maximum and once to convert.
// Rows of x8 are HEAD_DIM bytes; columns beyond D are zeros, and so are rows that no query sees.
#include <config.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>

namespace flashcore {

constexpr float E4M3_MAX = 448.0f;
constexpr float SMALLEST_MAX = 1e-30f;  // below it the factor to e4m3's range might overflow

struct QuantizeTensor {
    const void* x;  // (B, H, S, dim) of T
    void* x8;       // (B, H, S, HEAD_DIM) of e4m3
    float* scale;   // (B, H)
    Strides strides;
    int blocks;  // B * H: its share of the grid
    int heads, seqlen, dim;
    int visible;  // rows from here on are seen by no query: not read, written as zeros
};

struct QuantizeParams {
    QuantizeTensor tensor[3];  // q, k, v
};

struct SharedStorage {
    float sMax[NUM_WARPS];  // one maximum per warp
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");
static_assert(sizeof(QuantizeParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

// As many neighbouring values as one load takes; and their e4m3.
constexpr int VEC = ALIGN_BYTES / int(sizeof(T));
constexpr int PIECES_PER_ROW = HEAD_DIM / VEC;
union Piece {
    T element[VEC];
    Vector<ALIGN_BYTES> vector;
};
union Piece8 {
    e4m3_t element[VEC];
    Vector<VEC> vector;
};

__device__ __forceinline__ Piece load_piece(const T* gX, const QuantizeTensor& tensor, int64 i) {
    const int64 row = i / PIECES_PER_ROW;
    const int col = int(i - row * PIECES_PER_ROW) * VEC;
    Piece x = {};
    if (col < tensor.dim && row < tensor.visible)
        x.vector =
            *reinterpret_cast<const Vector<ALIGN_BYTES>*>(gX + row * tensor.strides.row + col);
    return x;
}

__device__ __forceinline__ float finite_magnitude(float x) {
    const float magnitude = fabsf(x);
    return magnitude < -NEG_INFINITY ? magnitude : 0.0f;  // false for NaN, too
}

// Block-wide maximum; a maximum does not depend on the order, so the scale is the same every time.
__device__ __forceinline__ float block_max(float* sMax, float value) {
    value = group_max<WARP_SIZE>(value);
    if (thread_index() % WARP_SIZE == 0) sMax[thread_index() / WARP_SIZE] = value;
    block_sync();  // all warps' maxima are there
    float result = sMax[0];
    for (int warp = 1; warp < NUM_WARPS; ++warp) result = fmaxf(result, sMax[warp]);
    return result;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    fp8_quantize(const __grid_constant__ QuantizeParams params) {
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<128>());
    // The grid is q's heads, then k's, then v's.
    int which = 0, block = block_index();
    while (block >= params.tensor[which].blocks) block -= params.tensor[which++].blocks;
    const QuantizeTensor& tensor = params.tensor[which];
    const T* gX =
        head_pointer<T>(tensor.x, tensor.strides, block / tensor.heads, block % tensor.heads);
    const int64 pieces = int64(tensor.seqlen) * PIECES_PER_ROW;
    Vector<VEC>* gX8 = static_cast<Vector<VEC>*>(tensor.x8) + block * pieces;

    float magnitude = 0.0f;
    for (int64 i = thread_index(); i < pieces; i += NUM_THREADS) {
        const Piece x = load_piece(gX, tensor, i);
#pragma unroll
        for (int e = 0; e < VEC; ++e)
            magnitude = fmaxf(magnitude, finite_magnitude(to_float(x.element[e])));
    }
    const float max = block_max(smem.sMax, magnitude);
    // A head of zeros, or of values whose factor would overflow, is left as it is.
    const bool scaled = max > SMALLEST_MAX;
    const float to_e4m3_range = scaled ? E4M3_MAX / max : 1.0f;
    for (int64 i = thread_index(); i < pieces; i += NUM_THREADS) {
        const Piece x = load_piece(gX, tensor, i);
        Piece8 x8;
#pragma unroll
        for (int e = 0; e < VEC; ++e)
            x8.element[e] = to_e4m3(to_float(x.element[e]) * to_e4m3_range);
        gX8[i] = x8.vector;
    }
    if (thread_index() == 0) tensor.scale[block] = scaled ? max / E4M3_MAX : 1.0f;
}

}  // namespace flashcore
