// Probes of ptx/mbarrier.cuh: one block.
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

#if __CUDA_ARCH__ >= 900

constexpr int WARPGROUP_THREADS = 128;

// One thread: what a barrier of `count` arrivals says of each parity when new and after each of
// five phases, and of the phase's own parity while arrivals are missing.
extern "C" __global__ void phases(int count, int* passed) {
    uint64* const barrier = reinterpret_cast<uint64*>(dynamic_shared<16>());
    mbarrier_init(barrier, count);
    fence_mbarrier_init();
    for (int phase = 0; phase < 5; ++phase) {
        for (int parity = 0; parity < 2; ++parity) *passed++ = mbarrier_try_wait(barrier, parity);
        for (int parity = 0; parity < 2; ++parity) *passed++ = mbarrier_test_wait(barrier, parity);
        for (int missing = count - 1; missing > 0; --missing) {
            mbarrier_arrive(barrier);
            *passed++ = mbarrier_try_wait(barrier, phase % 2);
        }
        mbarrier_arrive(barrier);
    }
}

// One thread asks for the end of a phase that nobody ends. A GPU would ask forever.
extern "C" __global__ void asks_in_vain() {
    uint64* const barrier = reinterpret_cast<uint64*>(dynamic_shared<16>());
    mbarrier_init(barrier, 1);
    while (!mbarrier_try_wait(barrier, 0)) {
    }
}

// 160 threads: warp 4 puts x[i] in one of two stages, round after round, and the warpgroup takes
// it. Now one side is slow and now the other. y: (rounds, 128).
extern "C" __global__ void hand_over(const int* x, int rounds, int* y) {
    constexpr int STAGES = 2;
    struct Shared {
        uint64 full[STAGES], empty[STAGES];
        int number[STAGES];
    };
    Shared& s = *reinterpret_cast<Shared*>(dynamic_shared<16>());
    const int thread = thread_index();
    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(&s.full[stage], 1);
            mbarrier_init(&s.empty[stage], WARPGROUP_THREADS / WARP_SIZE);
        }
        fence_mbarrier_init();
    }
    block_sync();
    if (thread == WARPGROUP_THREADS) {
        for (int i = 0; i < rounds; ++i) {
            const int stage = i % STAGES, parity = i / STAGES % 2;
            mbarrier_wait(&s.empty[stage], parity ^ 1);
            if (i % 3 == 0) __nanosleep(2000);
            s.number[stage] = x[i];
            mbarrier_arrive(&s.full[stage]);
        }
    } else if (thread < WARPGROUP_THREADS) {
        for (int i = 0; i < rounds; ++i) {
            const int stage = i % STAGES, parity = i / STAGES % 2;
            mbarrier_wait(&s.full[stage], parity);
            if (i % 5 == thread / WARP_SIZE) __nanosleep(4000);
            y[i * WARPGROUP_THREADS + thread] = s.number[stage];
            warp_sync();
            if (thread % WARP_SIZE == 0) mbarrier_arrive(&s.empty[stage]);
        }
    }
}

// 256 threads: two warpgroups in turn note their numbers, through two named barriers; who is slow
// changes. order: 2 * rounds.
extern "C" __global__ void turns(int rounds, int* order) {
    int* const sNext = reinterpret_cast<int*>(dynamic_shared<16>());
    const int thread = thread_index(), mine = thread / WARPGROUP_THREADS;
    if (thread == 0) *sNext = 0;
    block_sync();
    if (mine == 1) named_barrier_arrive(1, 2 * WARPGROUP_THREADS);  // the first turn is the other's
    for (int i = 0; i < rounds; ++i) {
        if (i % 2 == mine) __nanosleep(2000);
        named_barrier_sync(1 + mine, 2 * WARPGROUP_THREADS);
        if (thread % WARPGROUP_THREADS == i) order[(*sNext)++] = mine;
        warp_sync();
        const bool last = mine == 1 && i + 1 == rounds;
        if (!last) named_barrier_arrive(2 - mine, 2 * WARPGROUP_THREADS);
    }
}

#else
extern "C" __global__ void nothing() {}
#endif
