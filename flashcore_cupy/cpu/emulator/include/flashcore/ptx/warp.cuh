// ptx/warp.cuh on the CPU - what a warp does together waits for its 32 lanes; the last one serves
// all. Only bar.warp.sync and the barriers order accesses to memory; shuffles and votes do not.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

constexpr uint32 FULL_WARP = 0xffffffffu;

namespace twin {

// Each lane gets the value of the lane that it names.
template <typename T>
__forceinline__ T exchange(const char* what, T x, int source_lane) {
    struct Operand {
        T value, result;
        int source;
    } mine = {x, x, source_lane & 31};
    emulator::collective(what, &mine, [](void** all) {
        for (int lane = 0; lane < 32; ++lane) {
            Operand& to = *static_cast<Operand*>(all[lane]);
            to.result = static_cast<Operand*>(all[to.source])->value;
        }
    });
    return mine.result;
}

}  // namespace twin

__forceinline__ float shfl_xor(float x, int lane_mask) {
    return twin::exchange("shfl.bfly", x, emulator::lane() ^ lane_mask);
}
__forceinline__ uint32 shfl_xor(uint32 x, int lane_mask) {
    return twin::exchange("shfl.bfly", x, emulator::lane() ^ lane_mask);
}
__forceinline__ float shfl(float x, int source_lane) {
    return twin::exchange("shfl.idx", x, source_lane);
}
__forceinline__ int shfl(int x, int source_lane) {
    return twin::exchange("shfl.idx", x, source_lane);
}
__forceinline__ uint32 shfl(uint32 x, int source_lane) {
    return twin::exchange("shfl.idx", x, source_lane);
}

// All lanes are here, and each sees what the others have written before.
__forceinline__ void warp_sync() { emulator::sync_warp(); }

// The same for all threads of the block that have not ended.
__forceinline__ void block_sync() { emulator::sync_block(); }

// A barrier counts arrivals. The one that makes the count full ends the round: all who wait go on,
// and the next round begins. Threads that arrive without waiting (ptx/mbarrier.cuh) are counted,
// too, so the same thread may be in two rounds.
__forceinline__ void named_barrier_sync(int id, int threads) { emulator::sync_named(id, threads); }

__forceinline__ int warp_count(bool condition) {
    struct Operand {
        bool condition;
        int count;
    } mine = {condition, 0};
    emulator::collective("vote", &mine, [](void** all) {
        int count = 0;
        for (int lane = 0; lane < 32; ++lane) count += static_cast<Operand*>(all[lane])->condition;
        for (int lane = 0; lane < 32; ++lane) static_cast<Operand*>(all[lane])->count = count;
    });
    return mine.count;
}
__forceinline__ int warp_leading_count(bool condition) {
    struct Operand {
        bool condition;
        int count;
    } mine = {condition, 0};
    emulator::collective("vote", &mine, [](void** all) {
        int count = 0;
        while (count < 32 && static_cast<Operand*>(all[count])->condition) ++count;
        for (int lane = 0; lane < 32; ++lane) static_cast<Operand*>(all[lane])->count = count;
    });
    return mine.count;
}

__forceinline__ bool warp_any(bool condition) { return warp_count(condition) != 0; }

// Which lane it is, is not said; but the same lanes elect the same one, every time. Here a seed
// chooses it.
__forceinline__ bool elect_one() {
    emulator::collective("elect.sync", nullptr, [](void**) {});
    return emulator::lane() == emulator::current().elected;
}

template <int WIDTH>
__forceinline__ float group_max(float x) {
    for (int mask = WIDTH / 2; mask > 0; mask /= 2) x = fmaxf(x, shfl_xor(x, mask));
    return x;
}

template <int WIDTH>
__forceinline__ float group_sum(float x) {
    for (int mask = WIDTH / 2; mask > 0; mask /= 2) x += shfl_xor(x, mask);
    return x;
}

__forceinline__ void quad_transpose(uint32 (&x)[4]) {
    for (int mask = 1; mask <= 2; mask *= 2) {
        const bool upper = thread_index() & uint32(mask);
        for (int i = 0; i < 4; ++i) {
            if (i & mask) continue;
            const uint32 got = shfl_xor(upper ? x[i] : x[i + mask], mask);
            (upper ? x[i] : x[i + mask]) = got;
        }
    }
}

}  // namespace flashcore
