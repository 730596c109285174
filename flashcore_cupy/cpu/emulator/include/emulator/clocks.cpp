// clocks.cpp - who tells whom what has been done before: barriers, mbarriers, fences, atomics.
#include <emulator/memory.hpp>
#include <emulator/places.hpp>

#ifdef EMULATOR_CHECK

#include <algorithm>

namespace emulator {

static void add(Epochs& into, const Epochs& more) {
    if (into.size() < more.size()) into.resize(more.size());
    for (size_t i = 0; i < more.size(); ++i) into[i] = std::max(into[i], more[i]);
}
static bool has(const Epochs& all, const Epochs& some) {
    for (size_t i = 0; i < some.size(); ++i)
        if (at(all, i) < some[i]) return false;
    return true;
}
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

// ---- mbarriers ----------------------------------------------------------------------------------

static WatchedBarrier& watched(const void* barrier) { return cluster().watched.barriers[barrier]; }
void barrier_made(const void* barrier) {
    note(By::THREAD, true, barrier, 8, __builtin_return_address(0));
    WatchedBarrier& b = watched(barrier);
    if (b.number > 0)
        fail_with("mbarrier: " + emulator::name_of(fiber()) + " makes one where one is already" +
                  at_line(__builtin_return_address(0)));
    b.number = cluster().watched.agents++;
}
void keep_off_barriers(const void* memory, size_t bytes, const void* place) {
    const auto& barriers = cluster().watched.barriers;
    const auto first = reinterpret_cast<uintptr_t>(memory);
    for (uintptr_t at = first / 8 * 8; at < first + bytes; at += 8)
        if (barriers.count(reinterpret_cast<const void*>(at)))
            fail_with("mbarrier: " + emulator::name_of(fiber()) + " writes over one" +
                      at_line(place));
}
void barrier_arrival(const void* barrier) {
    note(By::THREAD, false, barrier, 8, __builtin_return_address(0));
    watched(barrier).clock.release(fiber());
}
void barrier_over(const void* barrier) {
    WatchedBarrier& b = watched(barrier);
    b.clock.add_agent(b.number, b.phase);
    b.clock.pass(b.parity);
    b.parity ^= 1;
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

// ---- atomics ------------------------------------------------------------------------------------

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

// It orders nothing.
void watch_red(const void* address, size_t bytes) {
    Access now = access(By::THREAD, true, fiber().place);
    now.is_atomic = true;
    touch(address, bytes, now);
}

}  // namespace emulator

#endif
