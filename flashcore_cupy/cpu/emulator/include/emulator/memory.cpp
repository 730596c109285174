// memory.cpp - what is wrong with an access to memory, and how it is said.
//
// Two accesses to the same bytes, one of them a write, by two threads, must be ordered: by a
// barrier, an mbarrier, bar.warp.sync, or by fences around an atomic. Whether they are does not
// depend on who comes first, so a race is found in whatever order the threads have run. An
// operation of the GPU's own counts from where it is started to where it is waited for, whenever it
// has ended.
#include <emulator/memory.hpp>
#include <emulator/places.hpp>

#ifdef EMULATOR_CHECK

#include <dlfcn.h>

#include <algorithm>

namespace emulator {

// ---- reports ------------------------------------------------------------------------------------

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

// ---- memory -------------------------------------------------------------------------------------

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

void touch(const void* memory, size_t bytes, const Access& now) {
    const char* const p = static_cast<const char*>(memory);
    WatchedMemory* const global = cluster().launch.watched.memory.get();
    if (Block* const b = block_at(p)) {
        if (now.is_plain) keep_off_barriers(p, bytes, now.place);
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

Access access(By by, bool writes, const void* place) {
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
void note(By by, bool writes, const void* memory, size_t bytes, const void* place) {
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

void note_rows(const void* const (&rows)[8]) {
    const auto bank = [](const void* row) { return reinterpret_cast<uintptr_t>(row) / 16 % 8; };
    const auto meets = [&](const void* row) {
        return row != rows[0] && bank(row) == bank(rows[0]);
    };
    if (std::all_of(rows + 1, rows + 8, meets))
        fail_with("slow: " + emulator::name_of(fiber()) +
                  "'s warp takes eight rows that all lie in the same banks" +
                  at_line(fiber().place));
}

void complete(const Pending& one, size_t who, Epoch epoch) {
    Access now = access(By::THREAD, one.writes, one.place);
    now.who = who;
    now.epoch = epoch;
    now.completes = true;
    touch(one.memory, one.bytes, now);
}

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

// ---- a cluster begins, a thread ends ------------------------------------------------------------

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

}  // namespace emulator

#endif
