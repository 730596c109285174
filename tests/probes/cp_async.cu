// Probes of ptx/cp_async.cuh, and of a barrier that counts its copies. 32 threads copy 16, 8 and 4
// bytes each, odd threads with `valid` bytes of 0, in two groups of which the first is waited for
// alone.
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

extern "C" __global__ void copies(const uint8* x, uint8* y16, uint8* y8, uint8* y4, int* aligned) {
    __shared__ __align__(16) uint8 s16[512];
    __shared__ __align__(16) uint8 s8[256];
    __shared__ __align__(16) uint8 s4[128];
    const int t = threadIdx.x;
    const bool valid = t % 2 == 0;
    for (int i = t; i < 512; i += 32) s16[i] = 0xff;
    for (int i = t; i < 256; i += 32) s8[i] = 0xff;
    for (int i = t; i < 128; i += 32) s4[i] = 0xff;
    block_sync();
    cp_async_16(shared_address(s16 + 16 * t), x + 16 * t, valid ? 16 : 0);
    cp_async_commit();
    cp_async_8(shared_address(s8 + 8 * t), x + 8 * t, valid ? 8 : 0);
    cp_async_4(shared_address(s4 + 4 * t), x + 4 * t, valid ? 4 : 0);
    cp_async_commit();
    cp_async_wait<1>();
    block_sync();
    for (int i = t; i < 512; i += 32) y16[i] = s16[i];
    cp_async_wait<0>();
    block_sync();
    for (int i = t; i < 256; i += 32) y8[i] = s8[i];
    for (int i = t; i < 128; i += 32) y4[i] = s4[i];
    if (t == 0) *aligned = shared_address(s16) % 16 == 0 && shared_address(s16 + 4) % 16 == 4;
}

// 64 threads, round after round: each copies 16 bytes to one of two places and takes what its
// neighbour copied, when all copies have arrived. In between one of two warps is late. x, y:
// (rounds, 1024) bytes.
extern "C" __global__ void counted(const uint8* x, int rounds, uint8* y) {
    constexpr int THREADS = 64, BYTES = 16 * THREADS;
    __shared__ __align__(16) uint8 places[2][BYTES];
    __shared__ uint64 full[2], empty[2];
    const int t = threadIdx.x;
    if (t == 0) {
        for (int place = 0; place < 2; ++place) {
            mbarrier_init(&full[place], THREADS);
            mbarrier_init(&empty[place], THREADS);
        }
    }
    block_sync();
    for (int i = 0; i < rounds; ++i) {
        const int place = i % 2, parity = i / 2 % 2;
        mbarrier_wait(&empty[place], parity ^ 1);
        if (i % 4 == t / WARP_SIZE) __nanosleep(4000);
        cp_async_16(shared_address(&places[place][16 * t]), x + i * BYTES + 16 * t, 16);
        mbarrier_arrive_copied(&full[place]);
        mbarrier_wait(&full[place], parity);
        if (i % 4 == 2 + t / WARP_SIZE) __nanosleep(4000);
        const int other = (t + 1) % THREADS;
        for (int b = 0; b < 16; ++b) y[i * BYTES + 16 * t + b] = places[place][16 * other + b];
        mbarrier_arrive(&empty[place]);
    }
}
