// Probes of ptx/warp.cuh: one block.
#include <flashcore/ptx/warp.cuh>

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

// 32 threads.
extern "C" __global__ void integers(const int* x, const uint32* bits, int* from_five, int* negative,
                                    uint32* from_six, uint32* partner) {
    const int lane = threadIdx.x;
    from_five[lane] = shfl(x[lane], 5);
    negative[lane] = warp_count(x[lane] < 0);
    from_six[lane] = shfl(bits[lane], 6);
    partner[lane] = shfl_xor(bits[lane], 12);
}

// 32 threads: x and y are (32, 4), a row for each lane.
extern "C" __global__ void transposed_quads(const uint32* x, uint32* y) {
    uint32 words[4];
    for (int i = 0; i < 4; ++i) words[i] = x[threadIdx.x * 4 + i];
    quad_transpose(words);
    for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = words[i];
}

// 256 threads: pairs of warps hand each other their numbers, one more each time; the first pair
// once, the last four times, so no pair may wait for another.
extern "C" __global__ void pairs_of_warps(const float* x, float* y) {
    __shared__ float sX[256];
    const int thread = thread_index_anew(), pair = thread / 64;
    float mine = x[thread];
    for (int lap = 0; lap <= pair; ++lap) {
        sX[thread] = mine;
        named_barrier_sync(pair + 1, 64);
        mine = sX[thread ^ 32] + 1.0f;
        named_barrier_sync(pair + 1, 64);
    }
    y[thread] = mine;
}

// 256 threads, pairs of warps: whether x is 1 for any thread of the pair, and what the thread in
// the other warp has written.
extern "C" __global__ void any_of_pairs(const int* x, int* any, int* partner) {
    __shared__ int sX[256];
    const int thread = threadIdx.x, pair = thread / 64;
    sX[thread] = thread;
    any[thread] = named_barrier_any(pair + 1, 64, x[thread] == 1);
    partner[thread] = sX[thread ^ 32];
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
