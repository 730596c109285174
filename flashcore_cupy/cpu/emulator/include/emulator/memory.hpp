// memory.hpp - in a checking build: where accesses are looked at. What they are is in shadow.hpp.
#pragma once
#include <emulator/cluster.hpp>

#ifdef EMULATOR_CHECK
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace emulator {

// Global memory, as far as a launch may touch it.
struct WatchedMemory {
    struct Range {
        Array array;
        Shadow shadow;  // of an array that is written
    };
    std::mutex mutex;
    std::vector<Range> ranges;
    std::map<const void*, ByCluster> atomics;  // what those know who have changed this one
};

// Now, by this thread or by what it starts.
Access access(By by, bool writes, const void* place);
// Says what is wrong with an access, and ends the launch; or remembers it.
void touch(const void* memory, size_t bytes, const Access& now);
// The same for what a twin tells. A copy is remembered, to be completed.
void note(By by, bool writes, const void* memory, size_t bytes, const void* place);
// What was started is over, and in `epoch` of `who`.
void complete(const Pending& one, size_t who, Epoch epoch);

// An mbarrier is not written but by its own instructions.
void keep_off_barriers(const void* memory, size_t bytes, const void* place);

// Registers of a wgmma: a plain access; the wait for all groups but the `pending` last ones.
void touch_registers(Fiber& f, const void* p, size_t bytes, const void* place);
void finish_products(Warp& w, size_t pending);

}  // namespace emulator

#endif
