// Probes of ptx/convert.cuh: element-wise, one thread per input, blocks of 256.
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>

using namespace flashcore;

__device__ __forceinline__ int own() { return block_index() * 256 + thread_index(); }

extern "C" __global__ void unchanged(const float* x, float* y) {
    y[own()] = from_float<float>(to_float(x[own()]));
}

// The same 16 bits as fp16 and as bf16.
extern "C" __global__ void widen(const uint16* bits, float* from_half, float* from_bfloat16) {
    from_half[own()] = to_float(half_t{bits[own()]});
    from_bfloat16[own()] = to_float(bfloat16_t{bits[own()]});
}

extern "C" __global__ void narrow_half(const float* x, const float* y, uint16* half,
                                       uint32* packed) {
    half[own()] = from_float<half_t>(x[own()]).bits;
    packed[own()] = pack2<half_t>(x[own()], y[own()]);
}

extern "C" __global__ void narrow_bfloat16(const float* x, const float* y, uint16* bfloat16,
                                           uint32* packed) {
#if __CUDA_ARCH__ >= 800
    bfloat16[own()] = from_float<bfloat16_t>(x[own()]).bits;
    packed[own()] = pack2<bfloat16_t>(x[own()], y[own()]);
#endif
}

extern "C" __global__ void narrow_e4m3(const float* x, uint8* y) {
    y[own()] = to_e4m3(x[own()]).bits;
}

// Pairs of e4m3, by the instruction (where there is one) and by shifting; and one by one.
extern "C" __global__ void widen_e4m3(const uint16* pairs, uint32* native, uint32* shifted,
                                      uint32* half, float* low) {
    native[own()] = e4m3x2_to_f16x2(pairs[own()]);
    shifted[own()] = e4m3x2_to_f16x2_shift(pairs[own()]);
    half[own()] = widen_e4m3x2<half_t>(pairs[own()]);
    low[own()] = to_float(e4m3_t{uint8(pairs[own()])});
}

extern "C" __global__ void widen_e4m3_bfloat16(const uint16* pairs, uint32* bfloat16) {
#if __CUDA_ARCH__ >= 800
    bfloat16[own()] = widen_e4m3x2<bfloat16_t>(pairs[own()]);
#endif
}

extern "C" __global__ void exponential(const float* x, float* y) {
    y[own()] = exp2_approx(x[own()]);
}

// The product, and what is left when `z` is subtracted: of its rounded value nothing, unless the
// two were fused.
extern "C" __global__ void rounded_product(const float* x, const float* y, const float* z,
                                           float* product, float* left) {
    product[own()] = mul_rn(x[own()], y[own()]);
    left[own()] = mul_rn(x[own()], y[own()]) - z[own()];
}

extern "C" __global__ void reciprocal(const float* x, float* y) {
    y[own()] = reciprocal_approx(x[own()]);
}

extern "C" __global__ void widen_bytes(const uint8* bytes, float* y) {
    y[own()] = to_float(bytes[own()]);
}

extern "C" __global__ void interleave(const uint32* a, const uint32* b, uint32* y) {
    y[own()] = interleave_bytes(a[own()], b[own()]);
}

extern "C" __global__ void split(const float* x, uint32* hi, uint32* lo) {
    split_tf32(x[own()], hi[own()], lo[own()]);
}
