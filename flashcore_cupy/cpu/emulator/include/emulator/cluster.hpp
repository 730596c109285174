// cluster.hpp - the blocks of a cluster, their warps and threads, as the runtime knows them.
#pragma once
#include <emulator/clocks.hpp>
#include <emulator/fiber.hpp>
#include <emulator/launch.hpp>
#include <emulator/machine.hpp>
#include <emulator/shadow.hpp>
#include <emulator/signals.hpp>

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

struct Random {  // xorshift64*
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 0x1234567) {}
    uint32_t operator()(size_t below) {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return uint32_t(((state * 0x2545F4914F6CDD1Dull) >> 33) % below);
    }
};

// Operations that end in the order in which they were started. A group ends with its last one.
struct Groups {
    std::deque<Operation> under_way;
    std::deque<size_t> ends;  // of the closed groups: how many operations were started before
    size_t started = 0, finished = 0;

    void start(const Operation& operation) {
        under_way.push_back(operation);
        ++started;
    }
    void close() { ends.push_back(started); }
    void finish_one() {
        if (under_way.empty()) return;
        Operation operation = under_way.front();
        under_way.pop_front();
        ++finished;
        operation();
    }
    void finish_to(size_t end) {
        while (finished < end) finish_one();
    }
    void finish_all_but(size_t groups) {
        for (; ends.size() > groups; ends.pop_front()) finish_to(ends.front());
    }
};

// An operation whose end a barrier tells; if `copies` is set, after those up to `end`.
struct Counted {
    Operation operation;
    Groups* copies;
    size_t end;
};

// What a whole warp does together: each lane brings something, the last one to come does it all.
struct Collective {
    const char* what = nullptr;
    int arrived = 0;
    uint32_t round = 0;
    void* operands[WARP];
};

struct Barrier {
    int arrived = 0, expected = 0;
    uint32_t round = 0;
    SyncClock clock;

    void open();  // the round is over: everybody may go on
};

// The accumulators of a warp's lanes while wgmmas are under way that add to them.
struct Accumulators {
    int pending = 0;
    float* of_lane[WARP];
    std::vector<float> kept[WARP];
};

struct Fiber;
struct Warp {
    Fiber* lanes[WARP] = {};
    Collective collective;
    Groups products;  // wgmma's
    int registers;    // of each lane
    std::map<const float*, std::shared_ptr<Accumulators>> accumulators;
    WatchedWarp watched;
};

// How many registers each thread has at first, where so many share a multiprocessor.
int start_registers(int threads);

struct Block;
struct Fiber : Thread {
    Block* owner;
    Warp* warp;
    Context context;
    bool ended = false;
    bool polls = false;  // it waits for nothing: it asks again
    const char* waits_for = "";
    bool (*is_over)(const void*) = nullptr;  // none: it can go on
    void (*explain)(const void*) = nullptr;
    const void* condition = nullptr;
    const void* place = nullptr;   // in the kernel, of what it has called last
    uint32_t cluster_round = 0;    // of the cluster's barrier, at which it has arrived
    uint32_t next_round[16] = {};  // of each named barrier: the first one that it may come to
    Groups copies, stores;         // cp.async's and TMA's
    WatchedThread watched;
};
static_assert(sizeof(Fiber) <= Stacks::HEAD);

struct Cluster;
struct Block {
    Cluster* cluster = nullptr;
    int rank = 0;
    char* smem = nullptr;
    int smem_bytes = 0;
    Shadow* shadow = nullptr;
    int living = 0;
    int spare_registers = 0;  // that warps have given up
    std::vector<Fiber*> fibers;
    std::vector<Warp> warps;
    Barrier barriers[16];

    int index() const;  // in the grid
    void begin();
};

// A kernel and what it is started with.
struct Launch {
    const Grid& grid;
    void (*kernel)(const char*);
    const char* params;
    WatchedLaunch watched;

    Launch(const Grid& grid, void (*kernel)(const char*), const char* params, size_t bytes);
};

struct Cluster {
    const Launch& launch;
    const Stacks& stacks;
    const int number;  // in the grid
    Random random;
    std::vector<Block> blocks;
    Fiber* scheduler;
    Context outside;  // of the scheduler
    Fault fault;
    std::deque<Counted> operations;
    std::string failure, explanation;
    Barrier meeting;  // the cluster's
    int living = 0;
    WatchedCluster watched;

    Cluster(const Launch& launch, const Stacks& stacks, int number);
    ~Cluster();
    void run();
    void run_threads();

  private:
    bool take_turn(Fiber& fiber);
    bool finish_one();
    void finish_one_of(Block& b, Warp& w);
    std::string deadlock();
};

inline Fiber& fiber() { return static_cast<Fiber&>(current()); }
inline Cluster& cluster() { return *fiber().owner->cluster; }

// Back to the scheduler, until it is this thread's turn again.
void yield();
// "thread 5 of block 3"
std::string name_of(const Fiber& fiber);
[[noreturn]] void fail_with(const std::string& text);

}  // namespace emulator
