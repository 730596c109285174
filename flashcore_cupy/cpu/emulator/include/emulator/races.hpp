// races.hpp - in a checking build: who may read what of shared memory, and who has written it.
//
// Two accesses to the same bytes, one of them a write, by different threads, must be ordered: by a
// barrier, by an mbarrier, by a collective of the warp. Whether they are does not depend on who
// came first in this run, so a race is found in whatever order the threads have run.
//
// Vector clocks (Fidge, Mattern 1988; FastTrack, Flanagan and Freund 2009), made cheap by warps:
//   - All lanes of a warp have one counter, its epoch. An access is stamped with it.
//   - What a thread knows of another one is the last epoch of that one's accesses that are ordered
//     before its own. What the lanes of a warp know together is kept once; a lane that has waited
//     for something alone has a clock of its own up to the warp's next collective.
//   - Barriers have a clock: an arrival adds what the thread knows to it, a wait takes it.
// Copies that the GPU makes on its own are accesses of an agent of the warp, which knows what the
// thread that has started them knew then, and of which others know by the barrier that counts it.
//
// Plain accesses of the kernel reach this by -fsanitize=thread, whose calls (__tsan_read4, ...) are
// defined below; no other part of that tool is used.
#pragma once
#include <emulator/machine.hpp>

namespace emulator {

#ifdef EMULATOR_CHECK

constexpr uint32_t GRANULE = 2;  // bytes that are told apart

inline void join(Clock& into, const Clock& from) {
    for (size_t i = 0; i < from.size(); ++i) into[i] = max(into[i], from[i]);
}
inline int id_of(const Fiber& f) { return f.block->rank * int(f.block->fibers.size()) + f.thread; }
// The agent of a warp has the number after all threads' and the agents' before.
inline int agent_of(const Fiber& f) {
    const Block& b = *f.block;
    const int threads = int(b.cluster->blocks.size() * b.fibers.size());
    return threads + b.rank * int(b.warps.size()) + f.thread / WARP;
}
inline Warp& warp_of(const Fiber& f) { return f.block->warps[size_t(f.thread / WARP)]; }

// All that a thread knows, as a clock of its own.
inline Clock knowledge(const Fiber& f) {
    const Warp& w = warp_of(f);
    Clock all = f.own_clock.empty() ? w.clock : f.own_clock;
    const int first = id_of(f) - f.thread % WARP;
    for (int lane = 0; lane < WARP && f.thread / WARP * WARP + lane < int(f.block->fibers.size());
         ++lane)
        all[size_t(first + lane)] = max(all[size_t(first + lane)], w.collective_epoch);
    all[size_t(id_of(f))] = w.epoch;
    return all;
}
inline void release_to(SyncClock& clock) {
    if (clock.arrived.empty()) clock.arrived.resize(current->block->cluster->clock_size);
    join(clock.arrived, knowledge(*current));
    ++warp_of(*current).epoch;
}
inline void acquire_from(const SyncClock& clock) {
    if (clock.passed.empty()) return;
    Fiber& f = *current;
    if (f.own_clock.empty()) f.own_clock = warp_of(f).clock;
    join(f.own_clock, clock.passed);
}
inline void meet_in_warp(Warp& w, Block& b) {
    const size_t first = size_t(&w - b.warps.data()) * WARP;
    for (size_t t = first; t < min(first + WARP, b.fibers.size()); ++t) {
        if (b.fibers[t].own_clock.empty()) continue;
        join(w.clock, b.fibers[t].own_clock);
        b.fibers[t].own_clock.clear();
    }
    w.collective_epoch = w.epoch++;
}

// Who asks: a thread now, or an agent with what it knew.
struct Asker {
    int id, warp;  // warp: its place in a cell's list of readers
    uint32_t epoch, lanes;
    const Fiber* fiber;  // of a thread
    const Clock* clock;  // of an agent
    bool is_async;

    bool knows(int other, uint32_t at) const {
        if (other == id) return true;
        if (clock) return (*clock)[size_t(other)] >= at;
        const Warp& w = warp_of(*fiber);
        const int first = id - fiber->thread % WARP;
        if (other >= first && other < first + WARP && w.collective_epoch >= at) return true;
        return (fiber->own_clock.empty() ? w.clock : fiber->own_clock)[size_t(other)] >= at;
    }
};

inline Asker asking(const Fiber& f, bool is_async = false) {
    const Block& b = *f.block;
    return {id_of(f),
            b.rank * int(b.warps.size()) + f.thread / WARP,
            warp_of(f).epoch,
            1u << f.thread % WARP,
            &f,
            nullptr,
            is_async};
}

inline std::string name_of(const Cluster& c, int id) {
    const int per_block = int(c.blocks[0].fibers.size()), warps = int(c.blocks[0].warps.size());
    const int threads = per_block * int(c.blocks.size());
    if (id < threads)
        return "thread " + std::to_string(id % per_block) + " of block " +
               std::to_string(c.blocks[size_t(id / per_block)].index);
    return "a copy that warp " + std::to_string((id - threads) % warps) + " has started";
}

inline void found(Cluster& c, const std::string& what) {
    if (c.failure.empty()) c.failure = what;
}

inline void touch(Block& owner, const char* pointer, size_t bytes, bool writes, const Asker& who,
                  const void* place) {
    Cluster& c = *owner.cluster;
    const size_t first = size_t(pointer - owner.smem) / GRANULE;
    const size_t last = (size_t(pointer - owner.smem) + bytes - 1) / GRANULE;
    const auto where = [&](size_t at) {
        return " byte " + std::to_string(at * GRANULE) + " of shared memory at " + line_of(place);
    };
    const auto and_before = [&](int id, const char* has_done, const void* its_place) {
        return ",\n  which " + name_of(c, id) + has_done + " at " + line_of(its_place) +
               ", with nothing between that orders the two";
    };
    for (size_t at = first; at <= last; ++at) {
        Cell& cell = owner.cells[at];
        if (cell.writer < 0 && !writes)
            return found(c, "uninitialised: " + name_of(c, who.id) +
                                " reads what nobody has written," + where(at));
        if (cell.writer >= 0 && cell.writer != who.id && !who.knows(cell.writer, cell.epoch))
            return found(c, "race: " + name_of(c, who.id) + (writes ? " writes" : " reads") +
                                where(at) + and_before(cell.writer, " has written", cell.place));
        if (who.is_async && !writes && cell.writer >= 0 && !cell.is_async) {
            const int per_block = int(c.blocks[0].fibers.size());
            const Fiber& writer =
                c.blocks[size_t(cell.writer / per_block)].fibers[size_t(cell.writer % per_block)];
            if (writer.fenced_epoch < cell.epoch)
                return found(c, "no fence: " + name_of(c, who.id) +
                                    " has the asynchronous proxy read" + where(at) + ",\n  which " +
                                    name_of(c, cell.writer) + " has written at " +
                                    line_of(cell.place) + " without a fence_proxy_async");
        }
        Readers* const readers = &owner.readers[at * owner.reader_slots];
        if (writes) {
            for (size_t slot = 0; slot < owner.reader_slots; ++slot) {
                const Readers& r = readers[slot];
                for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1) {
                    const int reader = r.first + __builtin_ctz(lanes);
                    if (reader == who.id || who.knows(reader, r.epoch)) continue;
                    return found(c, "race: " + name_of(c, who.id) + " writes" + where(at) +
                                        and_before(reader, " has read", r.place));
                }
            }
            for (size_t slot = 0; slot < owner.reader_slots; ++slot) readers[slot].lanes = 0;
            cell = {who.id, who.epoch, who.is_async, place};
        } else {
            Readers& r = readers[who.warp];
            if (r.epoch != who.epoch || !r.lanes)
                r = {who.epoch, 0, who.fiber ? who.id - who.fiber->thread % WARP : who.id, place};
            r.lanes |= who.fiber ? who.lanes : 1u;
            r.place = place;
        }
    }
}

// A range that `fiber` reads or writes now, on whose behalf ever this runs.
inline void note(const Fiber& fiber, const void* pointer, size_t bytes, bool writes,
                 bool is_async = false, const void* place = here()) {
    const char* p = static_cast<const char*>(pointer);
    for (Block& b : fiber.block->cluster->blocks)
        if (p >= b.smem && p < b.smem + b.smem_bytes)
            return touch(b, p, bytes, writes, asking(fiber, is_async), place);
}

// A copy's agent: what it knows, and its next epoch.
struct Agent {
    const Fiber* fiber;
    Clock clock;
    const void* place;

    explicit Agent(const Fiber& f, const void* at = here())
        : fiber(&f), clock(knowledge(f)), place(at) {
        ++warp_of(f).epoch;
    }
    void note(const void* pointer, size_t bytes, bool writes) const {
        Block& b = *fiber->block;
        const int id = agent_of(*fiber);
        const Asker who = {
            id,
            int(b.reader_slots / 2) + b.rank * int(b.warps.size()) + fiber->thread / WARP,
            ++b.cluster->agent_epochs[size_t(id)],
            1,
            nullptr,
            &clock,
            true};
        const char* const p = static_cast<const char*>(pointer);
        for (Block& owner : b.cluster->blocks)  // it may write to a peer
            if (p >= owner.smem && p < owner.smem + owner.smem_bytes)
                touch(owner, p, bytes, writes, who, place);
    }
    void arrive(SyncClock& barrier) const {
        if (barrier.arrived.empty()) barrier.arrived.resize(fiber->block->cluster->clock_size);
        const size_t id = size_t(agent_of(*fiber));
        barrier.arrived[id] = fiber->block->cluster->agent_epochs[id];
    }
};

inline void pass(SyncClock& clock) { clock.passed = clock.arrived; }
inline SyncClock& clock_of(const void* barrier) {
    return current->block->cluster->barrier_clocks[barrier];
}
inline void fence_async() { current->fenced_epoch = warp_of(*current).epoch++; }

#else

struct Agent {
    explicit Agent(const Fiber&) {}
    void note(const void*, size_t, bool) const {}
    void arrive(SyncClock&) const {}
};
inline void release_to(SyncClock&) {}
inline void acquire_from(const SyncClock&) {}
inline void meet_in_warp(Warp&, Block&) {}
inline void note(const Fiber&, const void*, size_t, bool, bool = false, const void* = nullptr) {}
inline void pass(SyncClock&) {}
inline SyncClock& clock_of(const void*) {
    static SyncClock none;
    return none;
}
inline void fence_async() {}

#endif

}  // namespace emulator
