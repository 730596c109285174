// Probe of ptx/cluster.cuh: clusters of four thread blocks of 64 threads.
#include <flashcore/ptx/cluster.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

#if __CUDA_ARCH__ >= 900

constexpr int BLOCKS = 4, THREADS = 64;

// Each thread block leaves x of its own, late where `late` says so, and reads everyone's:
// four (2, blocks in all, BLOCKS, 64, 4), two (..., 2), rank (blocks in all). Warp 1 of thread block
// 3 has ended before; its part is left by warp 0. Then all leave something else and go again.
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1)
    leave_and_read(const float* x, int late, int* rank, float* four, float* two) {
    float4* const sFour = reinterpret_cast<float4*>(dynamic_shared<16>());
    float2* const sTwo = reinterpret_cast<float2*>(sFour + THREADS);
    const int block = block_index(), thread = thread_index(), own = cluster_rank();
    const bool leaves_early = own == 3;
    if (leaves_early && thread >= 32) return;
    if (thread == 0) rank[block] = own;
    for (int round = 0; round < 2; ++round) {
        if (own == late) __nanosleep(20000);
        for (int t = thread; t < THREADS; t += leaves_early ? 32 : THREADS) {
            const float value = x[block * THREADS + t] + 1000.0f * round;
            sFour[t] = {value, value + 0.25f, value + 0.5f, value + 0.75f};
            sTwo[t] = {-value, value};
        }
        warp_sync();
        cluster_sync();  // all is there
        for (int t = thread; t < THREADS; t += leaves_early ? 32 : THREADS) {
            for (int peer = 0; peer < BLOCKS; ++peer) {
                float4 a;
                float2 b;
                load_peer(a, peer_address(shared_address(&sFour[t]), peer));
                load_peer(b, peer_address(shared_address(&sTwo[t]), peer));
                const int64 i =
                    ((int64(round) * grid_size() + block) * BLOCKS + peer) * THREADS + t;
                reinterpret_cast<float4*>(four)[i] = a;
                reinterpret_cast<float2*>(two)[i] = b;
            }
        }
        warp_sync();
        cluster_sync_relaxed();  // all has been read
    }
}

// Pairs of thread blocks give each other x (blocks, 64, 4) without waiting, late where `late` says so:
// y (blocks, 64, 4). A barrier counts the bytes.
extern "C" __global__ void __cluster_dims__(2, 1, 1) give(const float* x, int late, float* y) {
    float4* const sGiven = reinterpret_cast<float4*>(dynamic_shared<16>());
    uint64* const full = reinterpret_cast<uint64*>(sGiven + THREADS);
    const int thread = thread_index(), own = cluster_rank(), i = block_index() * THREADS + thread;
    if (thread == 0) {
        mbarrier_init(full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(full, THREADS * sizeof(float4));
    }
    block_sync();
    if (own == late) __nanosleep(20000);
    cluster_arrive_relaxed();
    cluster_wait();  // the peer has made its barrier
    store_peer_async(peer_address(shared_address(&sGiven[thread]), own ^ 1),
                     reinterpret_cast<const float4*>(x)[i],
                     peer_address(shared_address(full), own ^ 1));
    mbarrier_wait(full, 0);
    reinterpret_cast<float4*>(y)[i] = sGiven[thread];
}

#else
extern "C" __global__ void nothing() {}
#endif
