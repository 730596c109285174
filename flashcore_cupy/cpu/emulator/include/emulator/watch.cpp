// watch.cpp - what a checking build makes of accesses to memory, and of what orders them.
//
// Two accesses to the same bytes, one of them a write, by two threads, must be ordered: by a
// barrier, an mbarrier, bar.warp.sync, or by fences around an atomic. Whether they are does not
// depend on who comes first, so a race is found in whatever order the threads have run. An operation
// of the GPU's own counts from where it is started to where it is waited for, whenever it has ended.
#include <emulator/cluster.hpp>
#include <emulator/places.hpp>

#ifdef EMULATOR_CHECK

#include <algorithm>
#include <mutex>

namespace emulator {

// ---- clocks ------------------------------------------------------------------------------------

static void add(Epochs& into, const Epochs& more) {
    if (into.size() < more.size()) into.resize(more.size());
    for (size_t i = 0; i < more.size(); ++i) into[i] = std::max(into[i], more[i]);
}
static bool has(const Epochs& all, const Epochs& some) {
    for (size_t i = 0; i < some.size(); ++i)
        if (at(all, i) < some[i]) return false;
    return true;
}
using ByCluster = std::map<int, Epochs>;
static void add(ByCluster& into, const ByCluster& more) {
    for (const auto& [cluster, epochs] : more) add(into[cluster], epochs);
}
static bool has(const ByCluster& all, const ByCluster& some) {
    return std::all_of(some.begin(), some.end(), [&](const auto& one) {
        const auto found = all.find(one.first);
        return found != all.end() && has(found->second, one.second);
    });
}
void Knowledge::add(const Knowledge& more) {
    emulator::add(known, more.known);
    emulator::add(shown, more.shown);
    emulator::add(global, more.global);
    emulator::add(others, more.others);
    emulator::add(promised, more.promised);
}
bool Knowledge::has(const Knowledge& more) const {
    return emulator::has(known, more.known) && emulator::has(shown, more.shown) &&
           emulator::has(global, more.global) && emulator::has(others, more.others) &&
           emulator::has(promised, more.promised);
}

// Mostly one of the two has it all.
Known WatchedCluster::join(const Known& a, const Known& b) {
    if (a == b) return a;
    for (const Joined& j : joined_)
        if (j.a == a && j.b == b) return j.result;
    Known result = b->has(*a) ? b : a->has(*b) ? a : nullptr;
    if (!result) {
        auto both = std::make_shared<Knowledge>(*a);
        both->add(*b);
        result = both;
    }
    joined_[next_++ % 4] = {a, b, result};
    return result;
}

void SyncClock::release(Fiber& f) {
    WatchedThread& t = f.watched;
    if (last_ != t.knows) arrived_.add(*t.knows);
    last_ = t.knows;
    raise(arrived_.known, t.number, t.epoch++);
}
void SyncClock::pass(int parity) { passed_[parity] = std::make_shared<const Knowledge>(arrived_); }
void SyncClock::acquire(Fiber& f, int parity) const {
    if (passed_[parity])
        f.watched.knows = f.owner->cluster->watched.join(f.watched.knows, passed_[parity]);
}

void align_epochs(Warp& warp) {
    Epoch last = 0;
    for (const Fiber* f : warp.lanes) last = std::max(last, f->watched.epoch);
    for (Fiber* f : warp.lanes) f->watched.epoch = last;
}
void order_lanes(Warp& warp) {
    SyncClock clock;
    for (Fiber* f : warp.lanes) clock.release(*f);
    clock.pass(0);
    for (Fiber* f : warp.lanes) clock.acquire(*f, 0);
}

// What the thread knows, to be changed.
template <typename Change>
static void learn(WatchedThread& t, const Change& change) {
    auto more = std::make_shared<Knowledge>(*t.knows);
    change(*more);
    t.knows = more;
}

void fence_for_async() {
    WatchedThread& t = fiber().watched;
    learn(t, [&](Knowledge& k) {
        k.shown = k.known;
        raise(k.shown, t.number, t.epoch++);
    });
}
void fence_for_gpu() {
    WatchedThread& t = fiber().watched;
    learn(t, [&](Knowledge& k) {
        add(k.others, k.promised);
        add(k.known, k.others[cluster().number]);
        k.promised.clear();
        k.global = k.known;
        raise(k.global, t.number, t.epoch++);
    });
}

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

// ---- reports -----------------------------------------------------------------------------------

// Who has the number among a cluster's threads, products and barriers.
static std::string name_of(const Block& b) { return "block " + std::to_string(b.index()); }
static std::string name_of(int cluster_number, size_t who, bool in_flight) {
    const Cluster& c = cluster();
    const size_t threads = c.blocks[0].fibers.size(), warps = c.blocks[0].warps.size();
    const auto of_block = [&](size_t rank) {
        return " of block " + std::to_string(size_t(cluster_number) * c.blocks.size() + rank);
    };
    if (who < c.watched.threads)
        return (in_flight ? "a copy of thread " : "thread ") + std::to_string(who % threads) +
               of_block(who / threads) + (in_flight ? ", not waited for," : "");
    who -= c.watched.threads;
    if (who < warps * c.blocks.size())
        return "a wgmma of warp " + std::to_string(who % warps) + of_block(who / warps);
    return "a copy that an mbarrier counts";
}

// "writes byte 16 of o at fwd_sm80.cu:40"
static std::string does(const Access& now, const std::string& what, size_t byte) {
    return std::string(now.is_async && !now.writes ? " has the asynchronous proxy read byte "
                       : now.writes                ? " writes byte "
                                                   : " reads byte ") +
           std::to_string(byte) + " of " + what + at_line(now.place);
}

static void report(const Finding& found, const Access& now, const std::string& memory,
                   size_t byte) {
    const Record& r = found.before;
    const std::string subject =
        name_of(now.cluster, now.who, now.in_flight) + does(now, memory, byte);
    if (found.what == Wrong::UNWRITTEN)
        fail_with("uninitialised: " + subject + ",\n  which nobody has written");
    const size_t who = size_t(r.warp) * 32 + size_t(__builtin_ctz(r.lanes));
    const std::string before = ",\n  which " + name_of(r.cluster, who, r.in_flight) +
                               (r.writes ? " has written" : " has read") + at_line(r.place);
    if (found.what == Wrong::RACE)
        fail_with("race: " + subject + before + ", with nothing between that orders the two");
    fail_with("no fence: " + subject + before + ", without a fence_proxy_async between");
}

// ---- memory ------------------------------------------------------------------------------------

WatchedLaunch::WatchedLaunch(const Grid& grid, const char* params, size_t bytes) {
    if (grid.array_count == 0) return;
    memory = std::make_shared<WatchedMemory>();
    for (int i = 0; i < grid.array_count; ++i) {
        memory->ranges.push_back({grid.arrays[i], {}});
        if (grid.arrays[i].is_writable)
            memory->ranges.back().shadow.watch(grid.arrays[i].begin, grid.arrays[i].bytes, true);
    }
    Array own = {const_cast<char*>(params), bytes, "the parameters", nullptr, 0};
    memory->ranges.push_back({own, {}});
}

// Whether it is in the library that the kernel is in, where its constants are.
static bool is_constant(const void* p) {
    Dl_info there, here;
    return dladdr(p, &there) && dladdr(reinterpret_cast<void*>(&is_constant), &here) &&
           there.dli_fbase == here.dli_fbase;
}

// Why the bytes are not the array's to be touched; nothing if they are.
static const char* forbids(const Array& array, const char* p, size_t bytes, bool writes) {
    const size_t offset = size_t(p - array.begin);
    if (offset + bytes > array.bytes) return "beyond its end";
    if (array.state && memchr(array.state + offset, 2, bytes)) return "between its elements";
    return writes && !array.is_writable ? "which a kernel must not write" : nullptr;
}

[[noreturn]] static void fail_beside(const WatchedMemory& memory, const char* p, size_t bytes,
                                     const Access& now) {
    std::string where = ", where no array is";
    size_t nearest = 1 << 12;
    for (const auto& [array, _] : memory.ranges) {
        const char* const end = array.begin + array.bytes;
        const size_t away = p < array.begin ? size_t(array.begin - p)
                            : p < end       ? 0
                                            : size_t(p - end);
        if (away >= nearest) continue;
        nearest = away;
        where = " of " + std::string(array.name) + ", " +
                (p < array.begin ? "before it begins" : forbids(array, p, bytes, now.writes));
    }
    fail_with("out of bounds: " + name_of(now.cluster, now.who, now.in_flight) +
              (now.writes ? " writes " : " reads ") + std::to_string(bytes) + " bytes" + where +
              at_line(now.place));
}

// A plain store that is at odds with another access. It may leave the value as it is: then there is
// no harm in it. That shows when it has been made.
struct Doubt {
    Shadow& shadow;
    std::mutex* mutex;
    const void* memory;
    size_t bytes;
    char value[16];
    Access access;
    Finding found;
    std::string where;
    size_t byte;
};
void settle_doubt(Fiber& f) {
    if (!f.watched.doubt) return;
    const auto doubt = std::move(f.watched.doubt);
    if (std::memcmp(doubt->memory, doubt->value, doubt->bytes) != 0)
        report(doubt->found, doubt->access, doubt->where, doubt->byte);
    std::unique_lock<std::mutex> lock;
    if (doubt->mutex) lock = std::unique_lock(*doubt->mutex);
    doubt->shadow.remember_unchanged(doubt->memory, doubt->bytes, doubt->access);
}
static void doubt_or_report(const Doubt& doubt) {
    if (!doubt.access.is_plain || doubt.bytes > sizeof doubt.value)
        report(doubt.found, doubt.access, doubt.where, doubt.byte);
    fiber().watched.doubt = std::make_shared<Doubt>(doubt);
    std::memcpy(fiber().watched.doubt->value, doubt.memory, doubt.bytes);
}

static void touch_global(WatchedMemory& memory, const char* p, size_t bytes, const Access& now) {
    for (auto& [array, shadow] : memory.ranges) {
        if (p < array.begin || p >= array.begin + array.bytes) continue;
        if (forbids(array, p, bytes, now.writes)) continue;
        if (!array.is_writable) return;
        size_t byte = size_t(p - array.begin);
        unsigned char* const state = array.state ? array.state + byte : nullptr;
        Finding found;
        {
            const std::lock_guard<std::mutex> lock(memory.mutex);
            const void* const unwritten = state && !now.writes ? memchr(state, 0, bytes) : nullptr;
            if (unwritten) {
                found.what = Wrong::UNWRITTEN;
                byte += size_t(static_cast<const unsigned char*>(unwritten) - state);
            } else {
                found = shadow.touch(p, bytes, now, byte);
            }
        }
        if (found.what != Wrong::NOTHING)
            doubt_or_report({shadow, &memory.mutex, p, bytes, {}, now, found, array.name, byte});
        if (state && now.writes) std::memset(state, 1, bytes);
        return;
    }
    if (now.writes || !is_constant(p)) fail_beside(memory, p, bytes, now);
}

// The block whose shared memory it is in.
static Block* block_at(const void* memory) {
    const char* const p = static_cast<const char*>(memory);
    const Fiber& f = fiber();
    if (size_t(p - f.smem) < size_t(f.owner->smem_bytes)) return f.owner;
    for (Block& b : cluster().blocks)
        if (size_t(p - b.smem) < size_t(b.smem_bytes)) return &b;
    return nullptr;
}

static void touch(const void* memory, size_t bytes, const Access& now) {
    const char* const p = static_cast<const char*>(memory);
    WatchedMemory* const global = cluster().launch.watched.memory.get();
    if (Block* const b = block_at(p)) {
        size_t byte = 0;
        const Finding found = b->shadow->touch(p, bytes, now, byte);
        if (found.what == Wrong::NOTHING) return;
        const std::string whose = b == fiber().owner ? "" : " of " + name_of(*b);
        doubt_or_report(
            {*b->shadow, nullptr, p, bytes, {}, now, found, "shared memory" + whose, byte});
    } else if (global && !cluster().stacks.has(p)) {
        touch_global(*global, p, bytes, now);
    }
}

static Access access(By by, bool writes, const void* place) {
    const Fiber& f = fiber();
    const WatchedThread& t = f.watched;
    Access now = {cluster().number, t.number, t.number, t.epoch, t.knows.get(), place, writes};
    now.is_together = by == By::WARP;
    now.is_async = by == By::STORE || by == By::PRODUCT;
    now.in_flight = by == By::COPY || by == By::STORE;
    if (by == By::PRODUCT) {
        now.who = f.warp->watched.number;
        now.epoch = f.warp->watched.groups + 1;
    }
    return now;
}
// `place` is in the kernel, unless the last lane does something for its warp.
static void note(By by, bool writes, const void* memory, size_t bytes, const void* place) {
    if (by == By::WARP || by == By::PRODUCT) place = fiber().place;
    settle_doubt(fiber());
    touch(memory, bytes, access(by, writes, place));
    WatchedThread& t = fiber().watched;
    if (by == By::COPY && writes) t.copies.add({0, memory, bytes, writes, place});
    if (by == By::STORE && !writes) t.stores.add({0, memory, bytes, writes, place});
}
void note_read(By by, const void* memory, size_t bytes) {
    note(by, false, memory, bytes, __builtin_return_address(0));
}
void note_write(By by, const void* memory, size_t bytes) {
    note(by, true, memory, bytes, __builtin_return_address(0));
}

// What it has started is over now: by `who`, in its epoch.
static void complete(const Pending& one, size_t who, Epoch epoch) {
    Access now = access(By::THREAD, one.writes, one.place);
    now.who = who;
    now.epoch = epoch;
    now.completes = true;
    touch(one.memory, one.bytes, now);
}

static void finish_products(Warp& w, size_t pending);
void close_watched(Queue queue) {
    Fiber& f = fiber();
    if (queue == Queue::COPIES) ++f.watched.copies.groups;
    if (queue == Queue::STORES) ++f.watched.stores.groups;
    if (queue == Queue::PRODUCTS) ++f.warp->watched.groups;
}
void finish_watched(Queue queue, size_t pending) {
    Fiber& f = fiber();
    WatchedThread& t = f.watched;
    if (queue == Queue::PRODUCTS) return finish_products(*f.warp, pending);
    (queue == Queue::COPIES ? t.copies : t.stores).finish_all_but(pending, [&](const Pending& one) {
        complete(one, t.number, t.epoch);
    });
}

// ---- registers of wgmma ------------------------------------------------------------------------

// A word for each register, from the first one that a wgmma uses to the last.
enum : unsigned char { UNTOUCHED, TOUCHED, IN_USE };

void Registers::cover(const char* first, size_t size) {
    const char* const low = begin ? std::min(begin, first) : first;
    const char* const high = std::max(begin + 4 * words.size(), first + size);
    if (low == begin && high == begin + 4 * words.size()) return;
    std::vector<unsigned char> more(size_t(high - low) / 4, UNTOUCHED);
    std::copy(words.begin(), words.end(), more.begin() + (begin ? begin - low : 0) / 4);
    begin = low;
    words.swap(more);
}
unsigned char* Registers::at(const void* p) {
    return words.data() + size_t(static_cast<const char*>(p) - begin) / 4;
}

static void touch_registers(Fiber& f, const void* p, const void* place) {
    unsigned char& word = *f.watched.registers.at(p);
    if (word == IN_USE)
        fail_with("too soon: " + emulator::name_of(f) +
                  " touches a register of a wgmma that is not waited for" + at_line(place));
    word = TOUCHED;
}
void note_registers(const void* p, size_t bytes) {
    Fiber& f = fiber();
    Registers& registers = f.watched.registers;
    registers.cover(static_cast<const char*>(p), bytes);
    unsigned char* const word = registers.at(p);
    if (memchr(word, TOUCHED, bytes / 4))
        fail_with("no fence: " + emulator::name_of(f) +
                  " has touched a register of the wgmma after its last wgmma_fence" +
                  at_line(__builtin_return_address(0)));
    std::memset(word, IN_USE, bytes / 4);
    registers.in_use.push_back({f.warp->watched.groups, p, bytes});
}
void fence_for_products() {
    for (unsigned char& word : fiber().watched.registers.words)
        if (word == TOUCHED) word = UNTOUCHED;
}
// For all lanes at once.
static void finish_products(Warp& w, size_t pending) {
    const size_t all = w.watched.groups, done = all > pending ? all - pending : 0;
    for (Fiber* f : w.lanes) {
        WatchedThread& t = f->watched;
        Registers& registers = t.registers;
        auto& in_use = registers.in_use;
        for (const auto& one : in_use) std::memset(registers.at(one.p), UNTOUCHED, one.bytes / 4);
        in_use.erase(std::remove_if(in_use.begin(), in_use.end(),
                                    [&](const auto& one) { return one.group < done; }),
                     in_use.end());
        for (const auto& one : in_use) std::memset(registers.at(one.p), IN_USE, one.bytes / 4);
    }
    auto reads = std::make_shared<Knowledge>();
    raise(reads->known, w.watched.number, Epoch(done));
    for (Fiber* f : w.lanes) f->watched.knows = cluster().watched.join(f->watched.knows, reads);
}

// ---- mbarriers ---------------------------------------------------------------------------------

static WatchedBarrier& watched(const void* barrier) { return cluster().watched.barriers[barrier]; }
void barrier_made(const void* barrier) {
    note(By::THREAD, true, barrier, 8, __builtin_return_address(0));
    WatchedBarrier& b = watched(barrier);
    if (b.number == 0) b.number = cluster().watched.agents++;
}
void barrier_arrival(const void* barrier) {
    note(By::THREAD, false, barrier, 8, __builtin_return_address(0));
    watched(barrier).clock.release(fiber());
}
void barrier_over(const void* barrier) {
    WatchedBarrier& b = watched(barrier);
    b.clock.add_agent(b.number, b.phase);
    b.clock.pass((b.phase - 1) % 2);
    ++b.phase;
}
void barrier_passed(const void* barrier, unsigned parity) {
    note(By::THREAD, false, barrier, 8, __builtin_return_address(0));
    watched(barrier).clock.acquire(fiber(), int(parity));
}
void note_counted_write(const void* barrier, const void* memory, size_t bytes, bool by_tma) {
    Access now = access(By::THREAD, false, __builtin_return_address(0));
    now.who = watched(barrier).number;
    now.epoch = watched(barrier).phase;
    now.is_async = true;
    touch(barrier, 8, now);
    now.is_async = by_tma;
    now.writes = true;
    touch(memory, bytes, now);
}
void barrier_counts_copies(const void* barrier) {
    note(By::THREAD, false, barrier, 8, __builtin_return_address(0));
    const WatchedBarrier& b = watched(barrier);
    fiber().watched.copies.finish([&](const Pending& one) { complete(one, b.number, b.phase); });
}

// ---- a cluster begins, a thread ends -----------------------------------------------------------

void watch_cluster(Cluster& c) {
    const auto nothing = std::make_shared<const Knowledge>();
    size_t number = 0;
    for (Block& b : c.blocks) {
        b.shadow->watch(b.smem, size_t(b.smem_bytes), false);
        for (Fiber* f : b.fibers) {
            f->watched.number = number++;
            f->watched.knows = nothing;
        }
    }
    c.watched.threads = number;
    for (Block& b : c.blocks)
        for (Warp& w : b.warps) w.watched.number = number++;
    c.watched.agents = number;
}

// When a block has ended its shared memory is another one's.
static void watch_block_end(Block& b) {
    Knowledge all;
    for (const Fiber* f : b.fibers) {
        all.add(*f->watched.knows);
        raise(all.known, f->watched.number, f->watched.epoch);
    }
    Access end = access(By::THREAD, true, nullptr);
    end.knows = &all;
    const size_t first = b.fibers.front()->watched.number;
    const Finding found = b.shadow->check_end(first, first + b.fibers.size(), end);
    if (found.what == Wrong::NOTHING) return;
    const Record& r = found.before;
    const size_t who = size_t(r.warp) * 32 + size_t(__builtin_ctz(r.lanes));
    fail_with("too soon: " + name_of(b) + " may end while " + name_of(r.cluster, who, r.in_flight) +
              (r.writes ? " writes" : " reads") + " its shared memory" + at_line(r.place));
}
void watch_end(Fiber& f) {
    settle_doubt(f);
    if (!f.watched.stores.is_empty())
        fail_with("too soon: " + emulator::name_of(f) +
                  " ends while TMA may read its shared memory: no tma_store_wait follows" +
                  at_line(f.watched.stores.first().place));
    if (f.owner->living == 1) watch_block_end(*f.owner);
}

// ---- atomics -----------------------------------------------------------------------------------

int watched_add(int* counter, int x) {
    Fiber& f = fiber();
    Access now = access(By::THREAD, true, f.place);
    now.is_atomic = true;
    touch(counter, sizeof *counter, now);
    WatchedMemory* const memory = cluster().launch.watched.memory.get();
    if (!memory) return __atomic_fetch_add(counter, x, __ATOMIC_SEQ_CST);
    const std::lock_guard<std::mutex> lock(memory->mutex);
    ByCluster& known = memory->atomics[counter];
    learn(f.watched, [&](Knowledge& k) {
        add(k.promised, known);
        add(known, k.others);
        add(known[now.cluster], k.global);
    });
    return __atomic_fetch_add(counter, x, __ATOMIC_SEQ_CST);
}

// ---- plain accesses ----------------------------------------------------------------------------

[[noreturn]] static void misaligned(const void* p, size_t bytes, bool writes, const void* place) {
    fail_with("misaligned: " + emulator::name_of(fiber()) + (writes ? " writes " : " reads ") +
              std::to_string(bytes) + " bytes at an address that is no multiple of them" +
              at_line(place));
}

// Whoever calls this is a fiber, if only the scheduler.
__attribute__((always_inline)) static inline void plain(const void* p, size_t bytes, bool writes,
                                                        bool is_aligned, const void* place) {
    Fiber& f = fiber();
    if (f.inside) return;
    if (f.watched.doubt) settle_doubt(f);
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (address - reinterpret_cast<uintptr_t>(&f) < STACK_BYTES) {
        const Registers& registers = f.watched.registers;
        if (address - reinterpret_cast<uintptr_t>(registers.begin) < 4 * registers.words.size())
            touch_registers(f, p, place);
        return;
    }
    if (is_aligned && address % bytes && !cluster().stacks.has(p))
        misaligned(p, bytes, writes, place);
    Access now = access(By::THREAD, writes, place);
    now.is_plain = writes;
    touch(p, bytes, now);
}

}  // namespace emulator

// What -fsanitize=thread has the compiler call.
#define EMULATOR_ACCESS(name, bytes, writes, is_aligned)                            \
    extern "C" void name(void* p) {                                                 \
        emulator::plain(p, bytes, writes, is_aligned, __builtin_return_address(0)); \
    }
#define EMULATOR_ACCESSES(bytes)                                       \
    EMULATOR_ACCESS(__tsan_read##bytes, bytes, false, true)            \
    EMULATOR_ACCESS(__tsan_write##bytes, bytes, true, true)            \
    EMULATOR_ACCESS(__tsan_unaligned_read##bytes, bytes, false, false) \
    EMULATOR_ACCESS(__tsan_unaligned_write##bytes, bytes, true, false) \
    EMULATOR_ACCESS(__tsan_volatile_read##bytes, bytes, false, true)   \
    EMULATOR_ACCESS(__tsan_volatile_write##bytes, bytes, true, true)
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
extern "C" {
void __tsan_read_range(void* p, size_t n) {
    emulator::plain(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
    emulator::plain(p, n, true, false, __builtin_return_address(0));
}
// clang's.
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    emulator::plain(from, n, false, false, __builtin_return_address(0));
    emulator::plain(to, n, true, false, __builtin_return_address(0));
    return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    emulator::plain(from, n, false, false, __builtin_return_address(0));
    emulator::plain(to, n, true, false, __builtin_return_address(0));
    return memmove(to, from, n);
}
void* __tsan_memset(void* to, int byte, size_t n) {
    emulator::plain(to, n, true, false, __builtin_return_address(0));
    return memset(to, byte, n);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
}

#endif
