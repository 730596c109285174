// machine.hpp - thread blocks on the CPU: who runs next, what waits for what, and what is still on
// its way.
//
// The threads of a cluster (of one block, mostly) are fibers of one OS thread. A fiber runs until
// it has to wait: at a barrier, at a warp's collective, for an mbarrier, for its copies. What it
// waits for is a condition that the scheduler looks at; it takes the warps in a random order, and
// their lanes, too (a seed makes it the same again).
//
// What a GPU does on its own, copies and matrix products, is an Operation here. It is legal for it
// to end at any time up to a wait that promises its result. An operation ends where such a wait
// asks for it; when nothing else can run; or, if `eager` says so, at a random moment before.
#pragma once
#include <emulator/fiber.hpp>
#include <emulator/places.hpp>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

constexpr int WARP = 32;
constexpr uint32_t SHARED_BASE = 1024;  // the shared address of a block's first byte; 0 is none
constexpr int MOST_IDLE = 1 << 16;      // times that threads ask in vain, with nobody else left
constexpr int PEER_SHIFT = 24;          // of a shared address: which block of the cluster, plus 1

struct Random {  // xorshift64*
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15ull + 0x1234567) {}
    uint32_t operator()(uint32_t below) {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return uint32_t((state * 0x2545F4914F6CDD1Dull) >> 33) % below;
    }
};

struct Options {
    uint64_t seed;
    int eager;                 // of 100 looks of the scheduler, at how many an operation ends early
    const volatile int* stop;  // not 0: nobody waits for the result any more
};

struct Block;
struct Fiber;

// Of a checking build (races.hpp). By thread of the cluster, then by agent: the last epoch that is
// known of each.
using Clock = std::vector<uint32_t>;
// Of a barrier: what those that have arrived know, and what those that pass it get to know.
struct SyncClock {
    Clock arrived, passed;
};
struct Cell {
    int writer = -1;
    uint32_t epoch = 0;
    bool is_async = false;
    const void* place = nullptr;
};
struct Readers {
    uint32_t epoch = 0, lanes = 0;
    int first = 0;
    const void* place = nullptr;
};

// What a whole warp does together: each lane brings something, the last one to come does it all.
struct Collective {
    const char* what = nullptr;
    int arrived = 0;
    uint32_t generation = 0;
    void* operands[WARP];
};

// A group of operations that are still under way, oldest first, and how many have been closed.
struct Groups {
    std::deque<std::vector<std::function<void()>>> closed;
    std::vector<std::function<void()>> open;

    void close() {
        closed.push_back(std::move(open));
        open.clear();
    }
    // The oldest operation that is left; it may be of a group that is still open.
    bool finish_one() {
        for (auto& group : closed)
            if (finish_first(group)) return true;
        return finish_first(open);
    }
    void finish_all_but(size_t pending) {
        while (closed.size() > pending) {
            auto group = std::move(closed.front());
            closed.pop_front();
            for (auto& operation : group) operation();
        }
    }

  private:
    static bool finish_first(std::vector<std::function<void()>>& group) {
        if (group.empty()) return false;
        const auto operation = std::move(group.front());
        group.erase(group.begin());
        operation();
        return true;
    }
};

struct Warp {
    Collective collective;
    Groups products;  // wgmma's
    Clock clock;      // of what all lanes know, but for each other
    uint32_t epoch = 1, collective_epoch = 0;
};

struct NamedBarrier {
    int arrived = 0, expected = 0;
    uint32_t generation = 0;
    bool any = false, result = false;
    SyncClock clock;
};

struct Copy {
    char* to;
    const char* from;
    int bytes, valid;
};
using OnWrite = std::function<void(const void*, size_t)>;

struct Fiber {
    Context context;
    Block* block;
    int thread;
    bool ended = false;
    bool (*is_ready)(const void*) = nullptr;
    const void* condition = nullptr;
    const char* waits_for = "";
    const void* place = nullptr;  // where in the kernel it waits
    bool polls = false;           // it waits for nothing: it asks again
    // cp.async: those started, in order, of which `finished` have been made.
    std::vector<Copy> copies;
    size_t finished = 0;
    std::deque<size_t> copy_groups;  // ends of the closed groups
    Groups stores;                   // TMA's
    Clock own_clock;                 // what it knows beside its warp, until they meet
    uint32_t fenced_epoch = 0;
    uint32_t cluster_phase = 0;  // in which it has arrived at the cluster's barrier
    int inside = 0;              // of the layer's functions: accesses are not the kernel's then

    void finish_copies(size_t end, const OnWrite& on_write) {
        for (; finished < end; ++finished) {
            const Copy& c = copies[finished];
            on_write(c.to, size_t(c.bytes));
            std::memcpy(c.to, c.from, size_t(c.valid));
            std::memset(c.to + c.valid, 0, size_t(c.bytes - c.valid));
        }
    }
};

struct Cluster;
struct Block {
    Cluster* cluster;
    int rank, index;
    char* smem;
    int smem_bytes;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    int living = 0;
    std::vector<Cell> cells;
    std::vector<Readers> readers;  // reader_slots per cell
    size_t reader_slots = 0;
};

struct Failure {
    std::string text;
};

struct Cluster {
    Options options;
    Random random;
    int grid_size;
    std::function<void()> kernel;
    std::vector<Block> blocks;
    std::deque<std::function<void()>> operations;  // under way for the block; any order
    Context scheduler;
    std::string failure;
    NamedBarrier meeting;  // the cluster's
    int living = 0;
    size_t clock_size = 0;
    Clock agent_epochs;
    std::map<const void*, SyncClock> barrier_clocks;

    explicit Cluster(const Options& o) : options(o), random(o.seed) {}
    void run();
    bool finish_one();
    void finish_one_of(Block& b, Warp& w);
    void report_deadlock();
};

inline thread_local Fiber* current = nullptr;

inline Block& block() { return *current->block; }
inline Warp& warp() { return block().warps[current->thread / WARP]; }
inline int lane() { return current->thread % WARP; }

inline void yield() { switch_to(current->context, block().cluster->scheduler); }

// Ends the launch with a message.
[[noreturn]] inline __attribute__((noinline)) void fail(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    Cluster& cluster = *block().cluster;
    cluster.failure = "block " + std::to_string(block().index) + ", thread " +
                      std::to_string(current->thread) + ": " + text;
#ifdef EMULATOR_CHECK
    cluster.failure +=
        " at " + line_of(current->place ? current->place : __builtin_return_address(0));
#endif
    yield();
    abort();
}

template <typename Condition>
void wait_until(const char* what, const Condition& condition) {
    if (condition()) return;
    current->waits_for = what;
    current->condition = &condition;
    current->is_ready = [](const void* c) { return (*static_cast<const Condition*>(c))(); };
    yield();
}

// Lets all others go first, once.
inline void let_others_go(const char* what) {
    current->waits_for = what;
    current->polls = true;
    yield();
}

}  // namespace emulator

#include <emulator/races.hpp>

namespace emulator {

// The layer's own accesses are not the kernel's.
struct Inside {
    Inside() { ++current->inside; }
    ~Inside() { --current->inside; }
};

// All 32 lanes of a warp bring an operand; act(operands) happens once, when the last one is here.
template <typename Act>
__attribute__((noinline)) void collective(const char* what, void* operand, const Act& act) {
    const Inside inside;
    current->place = __builtin_return_address(0);
    Collective& c = warp().collective;
    if (c.arrived == 0) c.what = what;
    if (c.what != what) fail("%s, while other lanes of the warp are at %s", what, c.what);
    c.operands[lane()] = operand;
    const uint32_t mine = c.generation;
    if (++c.arrived == WARP) {
        c.arrived = 0;
        meet_in_warp(warp(), block());
        act(c.operands);
        ++c.generation;
        return;
    }
    wait_until(what, [&c, mine] { return c.generation != mine; });
}

// Barrier `id` of the block: counts an arrival; returns what to wait for.
inline void release(NamedBarrier& b) {
    pass(b.clock);
    b.result = b.any;
    b.any = false;
    b.arrived = b.expected = 0;
    ++b.generation;
}
inline uint32_t arrive(NamedBarrier& b, int threads, bool condition, const char* what) {
    if (b.arrived && b.expected != threads)
        fail("%s of %d threads, while others expect %d", what, threads, b.expected);
    const uint32_t mine = b.generation;
    b.expected = threads;
    b.any |= condition;
    release_to(b.clock);
    if (++b.arrived == threads) release(b);
    return mine;
}
inline __attribute__((noinline)) bool sync(NamedBarrier& b, int threads, bool condition,
                                           const char* what) {
    current->place = __builtin_return_address(0);
    const uint32_t mine = arrive(b, threads, condition, what);
    wait_until(what, [&b, mine] { return b.generation != mine; });
    acquire_from(b.clock);
    return b.result;
}

// All threads that live, of a block or of a cluster: the half that does not wait, which returns the
// barrier's phase, and the half that waits for it.
inline uint32_t arrive_all(NamedBarrier& b, const int& living) {
    const Inside inside;
    const uint32_t mine = b.generation;
    release_to(b.clock);
    if (++b.arrived == living) release(b);
    return mine;
}
inline void wait_all(NamedBarrier& b, uint32_t phase, const char* what) {
    const Inside inside;
    wait_until(what, [&b, phase] { return b.generation != phase; });
    acquire_from(b.clock);
}
// Both halves.
inline __attribute__((noinline)) void sync_all(NamedBarrier& b, const int& living,
                                               const char* what) {
    current->place = __builtin_return_address(0);
    wait_all(b, arrive_all(b, living), what);
}

// ---- shared addresses --------------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer, const void* place = here()) {
    current->place = place;
    const auto offset = static_cast<const char*>(pointer) - block().smem;
    if (offset < 0 || offset > block().smem_bytes) fail("a pointer that is not to shared memory");
    return uint32_t(offset) + SHARED_BASE;
}

// Where `bytes` bytes at a shared address are, which must be a multiple of `align`.
inline char* shared_pointer(uint32_t address, int bytes, int align, const char* what,
                            const void* place = here()) {
    current->place = place;
    Block* owner = &block();
    if (const uint32_t peer = address >> PEER_SHIFT) owner = &owner->cluster->blocks[peer - 1];
    const int64_t offset = int64_t(address & ((1u << PEER_SHIFT) - 1)) - SHARED_BASE;
    if (offset < 0 || offset + bytes > owner->smem_bytes)
        fail("%s: shared address %lld, %d bytes, is outside of the %d bytes of shared memory", what,
             (long long)offset, bytes, owner->smem_bytes);
    if (offset % align)
        fail("%s: shared address %lld is no multiple of %d", what, (long long)offset, align);
    return owner->smem + offset;
}

// ---- the scheduler -----------------------------------------------------------------------------

inline void begin_fiber() {
    block().cluster->kernel();
    Fiber& self = *current;
    self.finish_copies(self.copies.size(),
                       [&](const void* to, size_t n) { note(self, to, n, true); });
    self.stores.close();
    self.stores.finish_all_but(0);
    self.ended = true;
    Block& b = block();
    --b.living;
    --b.cluster->living;
    // Threads that have ended are not waited for by those that meet as a whole block or cluster.
    if (b.barriers[0].arrived && b.barriers[0].arrived == b.living) release(b.barriers[0]);
    NamedBarrier& meeting = b.cluster->meeting;
    if (meeting.arrived && meeting.arrived == b.cluster->living) release(meeting);
    yield();
    abort();
}

// One of the operations that barriers wait for.
inline bool Cluster::finish_one() {
    if (operations.empty()) return false;
    const size_t which = random(uint32_t(operations.size()));
    const auto operation = std::move(operations[which]);
    operations.erase(operations.begin() + long(which));
    operation();
    return true;
}
// One of those that the threads of a warp wait for themselves: a product, or what a lane stores.
inline void Cluster::finish_one_of(Block& b, Warp& w) {
    w.products.finish_one();
    const size_t first = size_t(&w - b.warps.data()) * WARP;
    const size_t lanes = min(size_t(WARP), b.fibers.size() - first);
    b.fibers[first + random(uint32_t(lanes))].stores.finish_one();
}

inline void Cluster::run() {
    std::vector<std::pair<Block*, int>> order;
    for (Block& b : blocks)
        for (size_t w = 0; w < b.warps.size(); ++w) order.push_back({&b, int(w)});
    int idle = 0;  // rounds in a row in which some asked again, and nothing else happened
    while (living > 0) {
        if (*options.stop) {
            failure = "stopped";
            return;
        }
        bool moved = false, polled = false;
        const uint32_t first = random(uint32_t(order.size()));
        for (size_t i = 0; i < order.size(); ++i) {
            auto& [b, w] = order[(i + first) % order.size()];
            const int count = min(WARP, int(b->fibers.size()) - w * WARP);
            const int start = int(random(uint32_t(count)));
            for (int n = 0; n < count; ++n) {
                Fiber& fiber = b->fibers[w * WARP + (n + start) % count];
                if (fiber.ended || (fiber.is_ready && !fiber.is_ready(fiber.condition))) continue;
                fiber.is_ready = nullptr;
                fiber.polls = false;
                current = &fiber;
                switch_to(scheduler, fiber.context);
                current = nullptr;
                moved |= !fiber.polls;
                polled |= fiber.polls;
                if (!failure.empty()) return;
            }
            if (int(random(100)) < options.eager) moved |= finish_one();
            if (int(random(100)) < options.eager) finish_one_of(*b, b->warps[size_t(w)]);
        }
        moved = moved || finish_one();
        if (!failure.empty()) return;
        idle = moved ? 0 : idle + 1;
        if (!moved && (!polled || idle > MOST_IDLE)) return report_deadlock();
    }
}

inline void Cluster::report_deadlock() {
    failure = "deadlock: nobody can go on";
    std::vector<const void*> places;
    for (Block& b : blocks)
        for (const Fiber& f : b.fibers) places.push_back(f.place);
    auto lines = lines_of(places);
    for (Block& b : blocks) {
        for (size_t t = 0; t < b.fibers.size();) {
            size_t end = t + 1;
            const Fiber& f = b.fibers[t];
            const auto same = [&](const Fiber& g) {
                return f.ended == g.ended &&
                       (f.ended || (std::strcmp(f.waits_for, g.waits_for) == 0 &&
                                    lines[f.place] == lines[g.place]));
            };
            while (end < b.fibers.size() && same(b.fibers[end])) ++end;
            failure += "\n  block " + std::to_string(b.index) + ", threads " + std::to_string(t) +
                       " to " + std::to_string(end - 1) + ": " +
                       (f.ended ? "ended"
                                : "wait for " + std::string(f.waits_for) + " at " + lines[f.place]);
            t = end;
        }
    }
}

}  // namespace emulator

// A thread that sleeps lets others go first: 1000 nanoseconds are one look of the scheduler.
inline __attribute__((noinline)) void __nanosleep(unsigned nanoseconds) {
    emulator::current->place = __builtin_return_address(0);
    for (unsigned i = 0; i < nanoseconds; i += 1000) emulator::let_others_go("nanosleep");
}
