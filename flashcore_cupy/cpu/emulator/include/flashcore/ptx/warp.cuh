// ptx/warp.cuh on the CPU - a warp's collectives wait for its 32 lanes; the last one serves all.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

constexpr uint32 FULL_WARP = 0xffffffffu;

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

__forceinline__ float shfl_xor(float x, int lane_mask) {
    return exchange("shfl.bfly", x, emulator::lane() ^ lane_mask);
}
__forceinline__ uint32 shfl_xor(uint32 x, int lane_mask) {
    return exchange("shfl.bfly", x, emulator::lane() ^ lane_mask);
}
__forceinline__ float shfl(float x, int source_lane) {
    return exchange("shfl.idx", x, source_lane);
}
__forceinline__ int shfl(int x, int source_lane) { return exchange("shfl.idx", x, source_lane); }
__forceinline__ uint32 shfl(uint32 x, int source_lane) {
    return exchange("shfl.idx", x, source_lane);
}

__forceinline__ void warp_sync() {
    emulator::collective("bar.warp.sync", nullptr, [](void**) {});
}

__forceinline__ void block_sync() {
    emulator::Block& b = emulator::block();
    emulator::sync_all(b.barriers[0], b.living, "bar.sync 0");
}

__forceinline__ emulator::NamedBarrier& named_barrier(int id, int threads) {
    if (id < 1 || id > 15) emulator::fail("barrier %d; there are 1 to 15", id);
    if (threads % 32) emulator::fail("barrier %d of %d threads; whole warps meet", id, threads);
    return emulator::block().barriers[id];
}

__forceinline__ void named_barrier_sync(int id, int threads) {
    emulator::sync(named_barrier(id, threads), threads, false, "bar.sync");
}

__forceinline__ bool named_barrier_any(int id, int threads, bool condition) {
    return emulator::sync(named_barrier(id, threads), threads, condition, "bar.red.or");
}

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

__forceinline__ bool warp_any(bool condition) { return warp_count(condition) != 0; }

// Which lane it is, is not said; but the same ones elect the same one, every time.
__forceinline__ bool elect_one() {
    bool mine = false;
    const emulator::Block& b = emulator::block();
    const uint32 elected = uint32(b.cluster->options.seed % 32);
    emulator::collective("elect.sync", &mine,
                         [=](void** all) { *static_cast<bool*>(all[elected]) = true; });
    return mine;
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
