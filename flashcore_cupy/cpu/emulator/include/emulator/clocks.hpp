// clocks.hpp - in a checking build: which accesses come before which, in every order of the
// threads.
//
// Vector clocks (Fidge, Mattern 1988; FastTrack, Flanagan and Freund 2009). A thread has an epoch,
// which ends when it tells others what it has done: it arrives at a barrier, it fences. An access
// bears the epoch that it is made in. A thread knows of each other one the last epoch whose
// accesses come before its own. Barriers collect what those know who arrive, and give it to those
// who pass.
//
// Two more have epochs like a thread, and are known by who has waited for them: the wgmma of a
// warp, one per group, and the copies that an mbarrier counts, one per phase.
#pragma once
#include <emulator/launch.hpp>
#include <emulator/machine.hpp>
#ifdef EMULATOR_CHECK
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>
#endif

namespace emulator {

struct Fiber;
struct Warp;
struct Cluster;

#ifdef EMULATOR_CHECK

using Epoch = uint32_t;
// By number: the threads of the cluster, its warps' products, its mbarriers. What is missing is 0.
using Epochs = std::vector<Epoch>;
inline Epoch at(const Epochs& epochs, size_t i) { return i < epochs.size() ? epochs[i] : 0; }
inline void raise(Epochs& epochs, size_t i, Epoch to) {
    if (i >= epochs.size()) epochs.resize(i + 1);
    if (epochs[i] < to) epochs[i] = to;
}

using ByCluster = std::map<int, Epochs>;  // by the cluster's number in the grid

struct Knowledge {
    Epochs known;        // come before
    Epochs shown;        // and are seen by the asynchronous proxy: TMA, wgmma
    Epochs global;       // and are seen by the whole GPU
    ByCluster others;    // come before, of the threads of other clusters
    ByCluster promised;  // will, from the next fence on

    void add(const Knowledge& more);
    bool has(const Knowledge& other) const;
};
// Many know the same, and share it.
using Known = std::shared_ptr<const Knowledge>;

// Of a barrier: what those know who have arrived, and what it tells those who wait for a phase.
class SyncClock {
  public:
    void release(Fiber& fiber);
    void add_agent(size_t number, Epoch epoch) { raise(arrived_.known, number, epoch); }
    void pass(int parity);
    void acquire(Fiber& fiber, int parity) const;

  private:
    Knowledge arrived_;
    Known last_, passed_[2];
};

// An mbarrier as an agent: its copies have the number of the phase that counts them.
struct WatchedBarrier {
    SyncClock clock;
    size_t number = 0;
    Epoch phase = 1;
    int parity = 0;
};
struct WatchedCluster {
    size_t threads = 0, agents = 0;  // agents: numbers that are taken, threads included
    std::unordered_map<const void*, WatchedBarrier> barriers;

    Known join(const Known& a, const Known& b);

  private:
    struct Joined {
        Known a, b, result;
    };
    Joined joined_[4];  // the last ones: a warp's lanes mostly do the same
    int next_ = 0;
};

// What a thread has started and not waited for yet.
struct Pending {
    size_t group;
    const void* memory;
    size_t bytes;
    bool writes;
    const void* place;
};
class PendingGroups {
  public:
    size_t groups = 0;  // that are closed

    void add(Pending one) {
        one.group = groups;
        all_.push_back(one);
    }
    template <typename Act>
    void finish_all_but(size_t pending, const Act& complete) {
        for (; !all_.empty() && all_.front().group + pending < groups; all_.pop_front())
            complete(all_.front());
    }
    template <typename Act>
    void finish(const Act& complete) {
        for (; !all_.empty(); all_.pop_front()) complete(all_.front());
    }
    bool is_empty() const { return all_.empty(); }
    const Pending& first() const { return all_.front(); }

  private:
    std::deque<Pending> all_;
};

// Of a thread's registers, which lie on its stack, those that its wgmmas use.
struct Registers {
    struct InUse {
        size_t group;
        const void* p;
        size_t bytes;
    };
    const char* begin = nullptr;
    std::vector<unsigned char> words;
    std::vector<InUse> in_use;
    bool are_fenced = false;  // by a first wgmma_fence

    void cover(const char* first, size_t bytes);
    unsigned char* at(const void* p);
};

struct WatchedThread {
    size_t number = 0;  // in the cluster
    Epoch epoch = 1;
    Known knows;
    PendingGroups copies, stores;
    Registers registers;
    std::shared_ptr<struct Doubt> doubt;
};
struct WatchedWarp {
    size_t number = 0;  // of its products
    Epoch groups = 0;
};
struct WatchedMemory;
struct WatchedLaunch {
    std::shared_ptr<WatchedMemory> memory;
    WatchedLaunch(const Grid& grid, const char* params, size_t bytes);
};

#else

struct SyncClock {
    void release(Fiber&) {}
    void pass(int) {}
    void acquire(Fiber&, int) const {}
};
struct WatchedCluster {};
struct WatchedThread {};
struct WatchedWarp {};
struct WatchedLaunch {
    WatchedLaunch(const Grid&, const char*, size_t) {}
};

#endif

#ifdef EMULATOR_CHECK
int watched_add(int* counter, int x);
#else
inline int watched_add(int* counter, int x) {
    return __atomic_fetch_add(counter, x, __ATOMIC_SEQ_CST);
}
#endif

// What the runtime tells by itself.
WATCH(void watch_red(const void* address, size_t bytes))
WATCH(void watch_cluster(Cluster&))
WATCH(void watch_end(Fiber&))
WATCH(void align_epochs(Warp&))   // lanes of one epoch are looked up together
WATCH(void order_lanes(Warp&))    // bar.warp.sync
WATCH(void settle_doubt(Fiber&))  // before the thread does anything else
WATCH(void close_watched(Queue))
WATCH(void finish_watched(Queue, size_t))

}  // namespace emulator
