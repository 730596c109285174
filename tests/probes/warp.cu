// Probes of ptx_warp.cuh: one block.
#include <flashcore/ptx_warp.cuh>

using namespace flashcore;

// 32 threads.
extern "C" __global__ void shuffles(const float* x, float* partner, float* from_five, float* max8,
                                    float* max32, float* sum4, float* sum32, float* any) {
    const int lane = threadIdx.x;
    partner[lane] = shfl_xor(x[lane], 3);
    from_five[lane] = shfl(x[lane], 5);
    max8[lane] = group_max<8>(x[lane]);
    max32[lane] = group_max<32>(x[lane]);
    sum4[lane] = group_sum<4>(x[lane]);
    sum32[lane] = group_sum<32>(x[lane]);
    any[lane] = float(warp_any(x[lane] == x[7]) && !warp_any(x[lane] > 1e9f));
}

// 256 threads: each reads what another warp (block_sync) and another lane (warp_sync) has written.
extern "C" __global__ void syncs(const float* x, float* across_block, float* across_warp) {
    __shared__ float sBlock[256];
    __shared__ float sWarp[256];
    const int thread = threadIdx.x;
    sBlock[thread] = x[thread];
    block_sync();
    across_block[thread] = sBlock[255 - thread];
    sWarp[thread] = x[thread];
    warp_sync();
    across_warp[thread] = sWarp[thread ^ 31];
}
