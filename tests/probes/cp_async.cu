// Probes of ptx/cp_async.cuh, and of a barrier that counts its copies.
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

constexpr int THREADS = 64, GROUPS = 3;

// 64 threads copy 16, 8 and 4 bytes each, of which `valid` come from x and the others are zeros; a
// size is a group. Each group is waited for alone, the first first. valid: (3, 64); x, y: (3, 64,
// 16) bytes.
extern "C" __global__ void copies(const uint8* x, const int* valid, uint8* y) {
    uint8* const shared = reinterpret_cast<uint8*>(dynamic_shared<16>());
    constexpr int GROUP = 16 * THREADS;
    const int t = thread_index(), own = 16 * t;
    for (int i = t; i < GROUPS * GROUP / 4; i += THREADS)
        reinterpret_cast<uint32*>(shared)[i] = 0xffffffffu;
    block_sync();
    cp_async_16(shared_address(shared + own), x + own, valid[t]);
    cp_async_commit();
    cp_async_8(shared_address(shared + GROUP + own), x + GROUP + own, valid[THREADS + t]);
    cp_async_commit();
    cp_async_4(shared_address(shared + 2 * GROUP + own), x + 2 * GROUP + own,
               valid[2 * THREADS + t]);
    cp_async_commit();
    cp_async_wait<2>();
    for (int i = 0; i < 16; ++i) y[own + i] = shared[own + i];
    cp_async_wait<1>();
    for (int i = 0; i < 16; ++i) y[GROUP + own + i] = shared[GROUP + own + i];
    cp_async_wait<0>();
    block_sync();
    const int other = 16 * (THREADS - 1 - t);  // what another thread has copied
    for (int i = 0; i < 16; ++i) y[2 * GROUP + other + i] = shared[2 * GROUP + other + i];
}

// 64 threads, round after round: each copies 16 bytes to one of two places and takes what its
// neighbour copied, when all copies have arrived. In between one of two warps is late. x, y:
// (rounds, 1024) bytes.
extern "C" __global__ void counted(const uint8* x, int rounds, uint8* y) {
    constexpr int BYTES = 16 * THREADS;
    struct Shared {
        uint8 places[2][BYTES];
        uint64 full[2], empty[2];
    };
    Shared& s = *reinterpret_cast<Shared*>(dynamic_shared<16>());
    const int t = thread_index();
    if (t == 0) {
        for (int place = 0; place < 2; ++place) {
            mbarrier_init(&s.full[place], THREADS);
            mbarrier_init(&s.empty[place], THREADS);
        }
    }
    block_sync();
    for (int i = 0; i < rounds; ++i) {
        const int place = i % 2, parity = i / 2 % 2;
        mbarrier_wait(&s.empty[place], parity ^ 1);
        if (i % 4 == t / WARP_SIZE) __nanosleep(4000);
        cp_async_16(shared_address(&s.places[place][16 * t]), x + i * BYTES + 16 * t, 16);
        mbarrier_arrive_copied(&s.full[place]);
        mbarrier_wait(&s.full[place], parity);
        if (i % 4 == 2 + t / WARP_SIZE) __nanosleep(4000);
        const int other = (t + 1) % THREADS;
        for (int b = 0; b < 16; ++b) y[i * BYTES + 16 * t + b] = s.places[place][16 * other + b];
        mbarrier_arrive(&s.empty[place]);
    }
}
