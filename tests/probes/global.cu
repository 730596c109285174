// Probes of ptx/global.cuh.
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

// Any number of blocks of 256 threads. Thread t of each block leaves a number; the one among them
// that arrives last adds up all of them, as fwd_sm80 does with split keys. x, parts, before:
// (blocks, 256); arrivals, sum: 256.
extern "C" __global__ void last_one_sums(const float* x, float* parts, int* before, int* arrivals,
                                         float* sum) {
    const int thread = thread_index(), mine = block_index() * 256 + thread;
    parts[mine] = x[mine];
    fence_gpu();  // my number first, then the news of it
    before[mine] = atomic_add(arrivals + thread, 1);
    if (before[mine] + 1 < grid_size()) return;
    fence_gpu();  // the news first, then the others' numbers
    float total = 0.0f;
    for (int block = 0; block < grid_size(); ++block)
        total += load_l2(parts + block * 256 + thread);
    sum[thread] = total;
}

// Any number of blocks of 256 threads, which all add to the same numbers. x: (blocks, 256); sums: 8.
extern "C" __global__ void sums(const int* x, int* sums) {
    const int thread = thread_index();
    atomic_add(sums + thread % 8, x[block_index() * 256 + thread]);
}

// Any number of blocks of 32 threads, by turns in the order in which they draw a number. Each makes
// of y, a number per thread, what tells the order. counters: drawn, then whose turn it is. x: 32 per
// block.
extern "C" __global__ void turns(const uint32* x, int* counters, uint32* y) {
    int* const sDrawn = reinterpret_cast<int*>(dynamic_shared<16>());
    const int thread = thread_index();
    if (thread == 0) *sDrawn = atomic_add(counters, 1);
    warp_sync();
    const int drawn = *sDrawn;
    while (read_count(counters + 1) < drawn) {
    }
    y[thread] = y[thread] * 3 + x[drawn * 32 + thread];
    warp_sync();
    if (thread > 0) return;
    fence_gpu();  // what all threads have written, before it is the next one's turn
    red_add(counters + 1, 1);
}

// One warp: the loads of one, two and four numbers. x: 128; y: 32 + 64 + 128.
extern "C" __global__ void loads(const float* x, float* y) {
    const int lane = thread_index();
    const float2 two = load_l2(reinterpret_cast<const float2*>(x) + lane);
    const float4 four = load_l2(reinterpret_cast<const float4*>(x) + lane);
    y[lane] = load_l2(x + lane);
    y[32 + 2 * lane] = two.x;
    y[32 + 2 * lane + 1] = two.y;
    float* const rest = y + 96 + 4 * lane;
    rest[0] = four.x;
    rest[1] = four.y;
    rest[2] = four.z;
    rest[3] = four.w;
}
