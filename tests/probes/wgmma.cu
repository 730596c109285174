// Probes of ptx/wgmma.cuh: one warpgroup. d = a b + (accumulate ? d : 0), where d is 64 x N, given
// and returned as element e of thread t in d[e][t]; a is 64 x depth; b is N x depth, and its
// transpose is meant, or, TRANSPOSED, depth x N. Tiles are written by plain stores.
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>

using namespace flashcore;

#if __CUDA_ARCH__ == 900

constexpr int THREADS = 128, M = 64, K_STEP = 16;

template <int SWIZZLE>
constexpr int PANEL_COLS = SWIZZLE / 2;

// Panels of rows x PANEL_COLS, one after the other; columns from `cols` on are NaN.
template <int SWIZZLE>
__device__ void store_panels(char* shared, const uint16* x, int rows, int cols) {
    const int panels = div_up(cols, PANEL_COLS<SWIZZLE>);
#pragma unroll 1
    for (int i = thread_index(); i < rows * panels * PANEL_COLS<SWIZZLE>; i += THREADS) {
        const int row = i / PANEL_COLS<SWIZZLE> % rows, in_row = i % PANEL_COLS<SWIZZLE>;
        const int panel = i / PANEL_COLS<SWIZZLE> / rows;
        const int col = panel * PANEL_COLS<SWIZZLE> + in_row;
        char* place =
            shared + panel * rows * SWIZZLE + swizzled<SWIZZLE>(row * SWIZZLE + in_row * 2);
        *reinterpret_cast<uint16*>(place) = col < cols ? x[row * cols + col] : 0x7fff;
    }
}

template <typename T, int N, int SWIZZLE, bool TRANSPOSED>
__device__ __forceinline__ void product_ss(const uint16* a, const uint16* b, int depth,
                                           int accumulate, float* d) {
    char* const sA = dynamic_shared<1024>();
    char* const sB = sA + M * div_up(depth, PANEL_COLS<SWIZZLE>) * SWIZZLE;
    store_panels<SWIZZLE>(sA, a, M, depth);
    store_panels<SWIZZLE>(sB, b, TRANSPOSED ? depth : N, TRANSPOSED ? N : depth);
    fence_proxy_async();
    block_sync();
    const uint64 first_a = matrix_descriptor(matrix_layout<SWIZZLE>(), shared_address(sA));
    const uint64 first_b = matrix_descriptor(
        matrix_layout<SWIZZLE>(TRANSPOSED ? depth * SWIZZLE : 16), shared_address(sB));
    float rD[N / 2];
#pragma unroll
    for (int e = 0; e < N / 2; ++e) rD[e] = d[e * THREADS + thread_index()];
    fence_registers(rD);
#pragma unroll 1
    for (int k = 0; k < depth; k += PANEL_COLS<SWIZZLE>) {
        const uint64 panel_a = advance_descriptor(first_a, k / PANEL_COLS<SWIZZLE> * M * SWIZZLE);
        const uint64 panel_b = advance_descriptor(
            first_b, TRANSPOSED ? k * SWIZZLE : k / PANEL_COLS<SWIZZLE> * N * SWIZZLE);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < PANEL_COLS<SWIZZLE> / K_STEP; ++step) {
            const uint64 step_a = advance_descriptor(panel_a, step * K_STEP * 2);
            const uint64 step_b =
                advance_descriptor(panel_b, step * K_STEP * (TRANSPOSED ? SWIZZLE : 2));
            wgmma<T, N, TRANSPOSED>(rD, step_a, step_b, accumulate || k > 0 || step > 0);
        }
        wgmma_commit();
    }
    wgmma_wait<0>();
    fence_registers(rD);
#pragma unroll
    for (int e = 0; e < N / 2; ++e) d[e * THREADS + thread_index()] = rD[e];
}

// 64 deep; register i of thread t at step s is given in a[s][i][t].
template <typename T, int N, int SWIZZLE, bool TRANSPOSED>
__device__ __forceinline__ void product_rs(const uint32* a, const uint16* b, int accumulate,
                                           float* d) {
    constexpr int DEPTH = 64, STEPS = DEPTH / K_STEP;
    char* const sB = dynamic_shared<1024>();
    store_panels<SWIZZLE>(sB, b, TRANSPOSED ? DEPTH : N, TRANSPOSED ? N : DEPTH);
    fence_proxy_async();
    block_sync();
    constexpr uint64 LAYOUT = matrix_layout<SWIZZLE>(TRANSPOSED ? DEPTH * SWIZZLE : 16);
    const uint64 first_b = matrix_descriptor(LAYOUT, shared_address(sB));
    uint32 rA[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rA[step][i] = a[(step * 4 + i) * THREADS + thread_index()];
        fence_registers(rA[step]);
    }
    float rD[N / 2];
#pragma unroll
    for (int e = 0; e < N / 2; ++e) rD[e] = d[e * THREADS + thread_index()];
    if (!accumulate) forget_registers(rD);  // the first product overwrites them
    fence_registers(rD);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int k = step * K_STEP;
        const int in_row = k % PANEL_COLS<SWIZZLE> * 2;
        const uint64 step_b = advance_descriptor(
            first_b, TRANSPOSED ? k * SWIZZLE : k / PANEL_COLS<SWIZZLE> * N * SWIZZLE + in_row);
        wgmma<T, N, TRANSPOSED>(rD, rA[step], step_b, step > 0 || accumulate);
    }
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(rD);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) fence_registers(rA[step]);
#pragma unroll
    for (int e = 0; e < N / 2; ++e) d[e * THREADS + thread_index()] = rD[e];
}

constexpr bool rows = false, transposed = true;

// Named by where a is, the type, the swizzle, how b is stored and N.
#define SS(T, SWIZZLE, B, N)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) ss_##T##_##SWIZZLE##_##B##_##N( \
        const uint16* a, const uint16* b, int depth, int accumulate, float* d) {             \
        product_ss<T, N, SWIZZLE, B>(a, b, depth, accumulate, d);                            \
    }
#define RS(T, SWIZZLE, B, N)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) rs_##T##_##SWIZZLE##_##B##_##N( \
        const uint32* a, const uint16* b, int accumulate, float* d) {                        \
        product_rs<T, N, SWIZZLE, B>(a, b, accumulate, d);                                   \
    }

SS(half_t, 128, rows, 16)
SS(half_t, 128, rows, 32)
SS(half_t, 128, rows, 48)
SS(half_t, 128, rows, 64)
SS(half_t, 128, rows, 80)
SS(half_t, 128, rows, 96)
SS(half_t, 128, rows, 112)
SS(half_t, 128, rows, 128)
SS(half_t, 128, rows, 144)
SS(half_t, 128, rows, 160)
SS(half_t, 128, rows, 176)
SS(half_t, 128, rows, 192)
SS(half_t, 128, rows, 208)
SS(half_t, 128, rows, 224)
SS(half_t, 128, rows, 240)
SS(half_t, 128, rows, 256)
SS(half_t, 64, rows, 80)
SS(half_t, 32, rows, 16)
SS(half_t, 32, rows, 112)
SS(half_t, 32, transposed, 64)
SS(half_t, 128, transposed, 192)
SS(bfloat16_t, 32, rows, 256)
SS(bfloat16_t, 128, rows, 128)
SS(bfloat16_t, 64, transposed, 96)

RS(half_t, 128, transposed, 16)
RS(half_t, 128, transposed, 64)
RS(half_t, 128, transposed, 80)
RS(half_t, 128, transposed, 128)
RS(half_t, 128, transposed, 192)
RS(half_t, 128, transposed, 256)
RS(half_t, 64, transposed, 96)
RS(half_t, 32, transposed, 80)
RS(half_t, 128, rows, 112)
RS(bfloat16_t, 128, transposed, 64)
RS(bfloat16_t, 128, transposed, 176)

// 384 threads: one warpgroup gives registers to the others, which then need them. y = 8128 x, which
// is the sum of 0 x to 127 x.
extern "C" __global__ void __launch_bounds__(384, 1) shared_out(const float* x, float* y) {
    const int thread = thread_index();
    if (thread < 128) {
        registers_dec<24>();
        y[thread] = 8128.0f * x[thread];
    } else {
        registers_inc<240>();
        float r[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) r[i] = x[thread] * i;
        fence_registers(r);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 128; ++i) sum += r[i];
        y[thread] = sum;
    }
}

#else
extern "C" __global__ void nothing() {}
#endif
