// launch.cpp - a grid on the CPU: its clusters, spread over the cores.
#include <emulator/cluster.hpp>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace emulator {

// An OS thread's memory for one cluster after the other.
class Worker {
  public:
    explicit Worker(const Launch& launch)
        : launch_(launch),
          stacks_(launch.grid.threads * launch.grid.cluster + 1),
          shadows_(size_t(launch.grid.cluster)) {
        for (int rank = 0; rank < launch.grid.cluster; ++rank)
            memory_.emplace_back(static_cast<char*>(aligned_alloc(1024, bytes())), &std::free);
    }

    // Returns what went wrong, or nothing.
    std::string run(int number) {
        Cluster cluster(launch_, stacks_, number);
        for (Block& b : cluster.blocks) {
            b.smem = memory_[size_t(b.rank)].get();
            b.shadow = &shadows_[size_t(b.rank)];
            std::memset(b.smem, 0xff, bytes());  // NaN, where nothing has been written
            b.begin();
        }
        watch_cluster(cluster);
        cluster.run();
        return cluster.failure;
    }

  private:
    size_t bytes() const { return size_t(launch_.grid.smem_bytes + 1023) / 1024 * 1024 + 1024; }

    const Launch& launch_;
    const SignalStack signals_;
    const Stacks stacks_;
    std::vector<Shadow> shadows_;
    std::vector<std::unique_ptr<char, decltype(&std::free)>> memory_;
};

static std::string run_clusters(const Launch& launch) {
    const int clusters = launch.grid.blocks / launch.grid.cluster;
    std::atomic<int> next{0};
    std::string failure;
    std::mutex mutex;
    const auto fail = [&](const std::string& wrong) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (failure.empty()) failure = wrong;
        next = clusters;
    };
    const auto work = [&] {
        try {
            Worker worker(launch);
            for (int n = next++; n < clusters; n = next++)
                if (const std::string wrong = worker.run(n); !wrong.empty()) fail(wrong);
        } catch (const std::bad_alloc&) {
            fail("out of memory");
        }
    };
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < std::min(launch.grid.workers, clusters); ++i) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads are to be had
    }
    work();
    for (auto& thread : others) thread.join();
    return failure;
}

int run_grid(const Grid& grid, void (*kernel)(const char*), const void* params, size_t params_bytes,
             char* message, size_t size) {
    const size_t room = params_bytes / 128 * 128 + 128;
    const std::unique_ptr<char, decltype(&std::free)> own(
        static_cast<char*>(aligned_alloc(128, room)), &std::free);
    std::memcpy(own.get(), params, params_bytes);
    const CatchSignals catching;
    const Launch launch(grid, kernel, own.get(), params_bytes);
    const std::string failure = run_clusters(launch);
    snprintf(message, size, "%s", failure.c_str());
    return !failure.empty();
}

}  // namespace emulator
