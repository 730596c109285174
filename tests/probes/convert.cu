// Probes of ptx/convert.cuh: element-wise, one thread per input.
#include <flashcore/ptx/convert.cuh>

using namespace flashcore;

// All 65536 fp16 bit patterns, and the same bits as bf16.
extern "C" __global__ void widen(const uint16* bits, float* from_half, float* from_bfloat16) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    from_half[i] = to_float(half_t{bits[i]});
    from_bfloat16[i] = to_float(bfloat16_t{bits[i]});
}

extern "C" __global__ void narrow_half(const float* x, uint16* half, uint32* packed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    half[i] = from_float<half_t>(from_float<float>(to_float(x[i]))).bits;
    packed[i] = pack2<half_t>(x[i], -x[i]);
}

extern "C" __global__ void narrow_bfloat16(const float* x, uint16* bfloat16, uint32* packed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
#if __CUDA_ARCH__ >= 800
    bfloat16[i] = from_float<bfloat16_t>(x[i]).bits;
    packed[i] = pack2<bfloat16_t>(x[i], -x[i]);
#endif
}

extern "C" __global__ void narrow_e4m3(const float* x, uint8* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = to_e4m3(x[i]).bits;
}

// All 65536 pairs of e4m3, by the instruction (where there is one) and by shifting; and one by one.
extern "C" __global__ void widen_e4m3(const uint16* pairs, uint32* native, uint32* shifted,
                                      uint32* half, float* low) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    native[i] = e4m3x2_to_f16x2(pairs[i]);
    shifted[i] = e4m3x2_to_f16x2_shift(pairs[i]);
    half[i] = widen_e4m3x2<half_t>(pairs[i]);
    low[i] = to_float(e4m3_t{uint8(pairs[i])});
}

extern "C" __global__ void widen_e4m3_bfloat16(const uint16* pairs, uint32* bfloat16) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
#if __CUDA_ARCH__ >= 800
    bfloat16[i] = widen_e4m3x2<bfloat16_t>(pairs[i]);
#endif
}

extern "C" __global__ void exponential(const float* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = exp2_approx(x[i]);
}

// What is left of a product when its rounded value is subtracted: 0, unless the two were fused.
extern "C" __global__ void rounded_product(const float* x, const float* y, const float* product,
                                           float* left) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    left[i] = mul_rn(x[i], y[i]) - product[i];
}

extern "C" __global__ void reciprocal(const float* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = reciprocal_approx(x[i]);
}

extern "C" __global__ void widen_bytes(const uint8* bytes, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = to_float(bytes[i]);
}

extern "C" __global__ void interleave(const uint32* a, const uint32* b, uint32* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = interleave_bytes(a[i], b[i]);
}

extern "C" __global__ void split(const float* x, uint32* hi, uint32* lo) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    split_tf32(x[i], hi[i], lo[i]);
}
