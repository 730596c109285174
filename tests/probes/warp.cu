// Probes of ptx/warp.cuh: one block.
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

// x of the lane with a number (0 to 63, of which a warp has half), and of the lane that differs in
// the bits of a mask. from: (64, 32); partner: (32, 32).
template <typename T>
__device__ void from_each(const T* x, T* from) {
    const int lane = thread_index();
    for (int source = 0; source < 64; ++source)
        from[source * WARP_SIZE + lane] = shfl(x[lane], source);
}
template <typename T>
__device__ void by_each_mask(const T* x, T* partner) {
    const int lane = thread_index();
    for (int mask = 0; mask < WARP_SIZE; ++mask)
        partner[mask * WARP_SIZE + lane] = shfl_xor(x[lane], mask);
}

// 32 threads.
extern "C" __global__ void shuffles(const float* x, const uint32* bits, const int* numbers,
                                    float* x_partner, uint32* bits_partner, float* x_from,
                                    uint32* bits_from, int* numbers_from) {
    by_each_mask(x, x_partner);
    by_each_mask(bits, bits_partner);
    from_each(x, x_from);
    from_each(bits, bits_from);
    from_each(numbers, numbers_from);
}

template <int WIDTH>
__device__ void group(const float* x, float* largest, float* sum) {
    const int lane = thread_index();
    largest[lane] = group_max<WIDTH>(x[lane]);
    sum[lane] = group_sum<WIDTH>(x[lane]);
}

// 32 threads. Groups of 1, 2, 4, 8, 16, 32 lanes: (6, 32).
extern "C" __global__ void groups(const float* x, float* largest, float* sum) {
    group<1>(x, largest, sum);
    group<2>(x, largest + 32, sum + 32);
    group<4>(x, largest + 64, sum + 64);
    group<8>(x, largest + 96, sum + 96);
    group<16>(x, largest + 128, sum + 128);
    group<32>(x, largest + 160, sum + 160);
}

// 32 threads. Bit l of each word is lane l's condition. any, count, leading: (words, 32).
extern "C" __global__ void votes(const uint32* conditions, int words, int* any, int* count,
                                 int* leading) {
    const int lane = thread_index();
    for (int i = 0; i < words; ++i) {
        const bool mine = conditions[i] >> lane & 1;
        any[i * WARP_SIZE + lane] = warp_any(mine);
        count[i * WARP_SIZE + lane] = warp_count(mine);
        leading[i * WARP_SIZE + lane] = warp_leading_count(mine);
    }
}

// 32 threads: x and y are (32, 4), a row for each lane.
extern "C" __global__ void transposed_quads(const uint32* x, uint32* y) {
    uint32 words[4];
    for (int i = 0; i < 4; ++i) words[i] = x[thread_index() * 4 + i];
    quad_transpose(words);
    for (int i = 0; i < 4; ++i) y[thread_index() * 4 + i] = words[i];
}

// 960 threads: 15 pairs of warps, with barriers 1 to 15, hand each other their numbers, one more
// each time; the pairs go one to five times, so none may wait for another.
extern "C" __global__ void pairs_of_warps(const float* x, float* y) {
    float* const sX = reinterpret_cast<float*>(dynamic_shared<16>());
    const int thread = thread_index_volatile(), pair = thread / 64;
    float mine = x[thread];
    for (int lap = 0; lap <= pair % 5; ++lap) {
        sX[thread] = mine;
        named_barrier_sync(pair + 1, 64);
        mine = sX[thread ^ 32] + 1.0f;
        named_barrier_sync(pair + 1, 64);
    }
    y[thread] = mine;
}

// 256 threads: each reads what another warp (block_sync) and another lane (warp_sync) has written.
extern "C" __global__ void syncs(const float* x, float* across_block, float* across_warp) {
    float* const sBlock = reinterpret_cast<float*>(dynamic_shared<16>());
    float* const sWarp = sBlock + 256;
    const int thread = thread_index();
    sBlock[thread] = x[thread];
    block_sync();
    across_block[thread] = sBlock[255 - thread];
    sWarp[thread] = x[thread];
    warp_sync();
    across_warp[thread] = sWarp[thread ^ 31];
}
