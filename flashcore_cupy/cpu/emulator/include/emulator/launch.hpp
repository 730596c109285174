// launch.hpp - a grid on the CPU: its clusters, spread over the cores.
#pragma once
#include <emulator/machine.hpp>

#include <mutex>
#include <thread>
#include <tuple>

namespace emulator {

struct Grid {
    int blocks, threads, smem_bytes, cluster;
    int workers;
    Options options;
};

// Runs one cluster; returns what went wrong, or nothing.
inline std::string run_cluster(const Grid& grid, int number, const Stacks& stacks,
                               const std::function<void()>& kernel) {
    Options options = grid.options;
    options.seed = options.seed * 1000003 + uint64_t(number);
    Cluster cluster(options);
    cluster.grid_size = grid.blocks;
    cluster.kernel = kernel;
    cluster.blocks.resize(size_t(grid.cluster));
    std::vector<std::unique_ptr<char, decltype(&std::free)>> memory;
    for (int rank = 0; rank < grid.cluster; ++rank) {
        Block& b = cluster.blocks[size_t(rank)];
        b.cluster = &cluster;
        b.rank = rank;
        b.index = number * grid.cluster + rank;
        const size_t bytes = size_t(grid.smem_bytes + 1023) / 1024 * 1024 + 1024;
        memory.emplace_back(static_cast<char*>(aligned_alloc(1024, bytes)), &std::free);
        b.smem = memory.back().get();
        b.smem_bytes = grid.smem_bytes;
        std::memset(b.smem, 0xff, bytes);  // NaN, where nothing has been written
        b.living = grid.threads;
        b.fibers.resize(size_t(grid.threads));
        b.warps.resize(size_t(grid.threads + WARP - 1) / WARP);
        for (int t = 0; t < grid.threads; ++t) {
            Fiber& fiber = b.fibers[size_t(t)];
            fiber.block = &b;
            fiber.thread = t;
            prepare(fiber.context, stacks.of(rank * grid.threads + t),
                    Stacks::BYTES - Stacks::GUARD, begin_fiber);
        }
    }
    cluster.living = grid.threads * grid.cluster;
#ifdef EMULATOR_CHECK
    const size_t agents = cluster.blocks.size() * cluster.blocks[0].warps.size();
    cluster.clock_size = size_t(cluster.living) + agents;
    cluster.agent_epochs.resize(cluster.clock_size);
    for (Block& b : cluster.blocks) {
        for (Warp& w : b.warps) w.clock.resize(cluster.clock_size);
        b.cells.resize(size_t(b.smem_bytes) / GRANULE + 1);
        b.reader_slots = 2 * agents;
        b.readers.resize(b.cells.size() * b.reader_slots);
    }
#endif
    cluster.run();
    return cluster.failure;
}

inline std::string run_grid(const Grid& grid, const std::function<void()>& kernel) {
    std::atomic<int> next{0};
    std::string failure;
    std::mutex mutex;
    const auto fail = [&](const std::string& wrong) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (failure.empty()) failure = wrong;
        next = grid.blocks;
    };
    const auto work = [&] {
        try {
            const Stacks stacks(grid.threads * grid.cluster);
            for (int n = next++; n < grid.blocks / grid.cluster; n = next++) {
                const std::string wrong = run_cluster(grid, n, stacks, kernel);
                if (!wrong.empty()) fail(wrong);
            }
        } catch (const std::bad_alloc&) {
            fail("out of memory");
        }
    };
    std::vector<std::thread> others;
    const int workers = min(grid.workers, grid.blocks / grid.cluster);
    try {
        for (int i = 1; i < workers; ++i) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads are to be had
    }
    work();
    for (auto& thread : others) thread.join();
    return failure;
}

// The next parameter: parameters lie one after the other, each at a multiple of its alignment.
template <typename T>
T next_parameter(const char* params, size_t& at) {
    std::remove_cv_t<T> value;
    at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
    std::memcpy(&value, params + at, sizeof(T));
    at += sizeof(T);
    return value;
}

template <typename... Params>
std::string launch(void (*kernel)(Params...), const void* params, const Grid& grid) {
    size_t at = 0;
    // Braces: from left to right.
    const std::tuple<Params...> own{
        next_parameter<Params>(static_cast<const char*>(params), at)...};
    return run_grid(grid, [&] { std::apply(kernel, own); });
}

}  // namespace emulator

// The library's entry: launches `entry`; writes what went wrong into `message`; returns whether
// something did.
#define EMULATOR_LAUNCH(entry)                                                     \
    extern "C" __attribute__((visibility("default"))) int launch_##entry(          \
        const void* params, const emulator::Grid* grid, char* message, int size) { \
        const std::string wrong = emulator::launch(entry, params, *grid);          \
        snprintf(message, size_t(size), "%s", wrong.c_str());                      \
        return !wrong.empty();                                                     \
    }
