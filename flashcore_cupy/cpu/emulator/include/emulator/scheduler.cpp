// scheduler.cpp - thread blocks on the CPU: who runs next, and when nobody can.
#include <emulator/cluster.hpp>
#include <emulator/places.hpp>

#include <algorithm>
#include <cstdlib>

namespace emulator {

thread_local const Thread* running = nullptr;

static void begin_fiber() {
    Fiber& self = fiber();
    const Launch& launch = cluster().launch;
    launch.kernel(launch.params);
    ++self.inside;
    watch_end(self);
    self.copies.finish_to(self.copies.started);
    self.stores.finish_to(self.stores.started);
    self.ended = true;
    Block& b = *self.owner;
    Barrier& meeting = b.cluster->meeting;
    // Threads that have ended are not waited for by those that meet as a whole block or cluster.
    if (--b.living == b.barriers[0].arrived && b.living) b.barriers[0].open();
    if (--b.cluster->living == meeting.arrived && meeting.arrived) meeting.open();
    yield();
    abort();
}

int Block::index() const { return cluster->number * cluster->launch.grid.cluster + rank; }

void Block::begin() {
    const Grid& grid = cluster->launch.grid;
    smem_bytes = grid.smem_bytes;
    living = grid.threads;
    warps.resize(size_t(grid.threads + WARP - 1) / WARP);
    for (Warp& warp : warps) warp.registers = start_registers(grid.threads);
    for (int t = 0; t < grid.threads; ++t) {
        const int slot = rank * grid.threads + t;
        auto* const f = new (cluster->stacks.of(slot)) Fiber();
        f->index = t, f->rank = rank, f->block = index(), f->grid = grid.blocks;
        f->smem = smem;
        f->elected = int(grid.options.seed % WARP);
        f->owner = this;
        f->warp = &warps[size_t(t / WARP)];
        f->warp->lanes[t % WARP] = f;
        fibers.push_back(f);
        cluster->stacks.prepare(slot, f->context, begin_fiber);
    }
    cluster->living += living;
}

static void begin_scheduler() {
    cluster().run_threads();
    switch_to(fiber().context, cluster().outside);
    abort();
}

Launch::Launch(const Grid& grid, void (*kernel)(const char*), const char* params, size_t bytes)
    : grid(grid), kernel(kernel), params(params), watched(grid, params, bytes) {}

Cluster::Cluster(const Launch& launch, const Stacks& stacks, int number)
    : launch(launch),
      stacks(stacks),
      number(number),
      random(launch.grid.options.seed * 1000003 + uint64_t(number)),
      blocks(size_t(launch.grid.cluster)) {
    for (size_t rank = 0; rank < blocks.size(); ++rank) {
        blocks[rank].cluster = this;
        blocks[rank].rank = int(rank);
    }
    scheduler = new (stacks.of(launch.grid.threads * launch.grid.cluster)) Fiber();
    scheduler->owner = &blocks[0];
    scheduler->inside = 1;
}
Cluster::~Cluster() {
    for (Block& b : blocks)
        for (Fiber* f : b.fibers) f->~Fiber();
    scheduler->~Fiber();
}

// The scheduler has a stack of its own: what runs on it may ask who it is.
void Cluster::run() {
    stacks.prepare(launch.grid.threads * launch.grid.cluster, scheduler->context, begin_scheduler);
    faults_are_of(this);
    switch_to(outside, scheduler->context);
    faults_are_of(nullptr);
    if (fault.signal && failure.empty()) failure = "illegal: a copy" + describe(fault);
}

// Lets a thread run until it waits. Returns whether it could.
bool Cluster::take_turn(Fiber& f) {
    if (f.ended || (f.is_over && !f.is_over(f.condition))) return false;
    f.is_over = nullptr;
    f.polls = false;
    running = &f;
    switch_to(scheduler->context, f.context);
    running = nullptr;
    if (fault.signal) failure = "illegal: " + name_of(f) + describe(fault);
    return true;
}

// Ends one of the operations that barriers wait for.
bool Cluster::finish_one() {
    if (operations.empty()) return false;
    const size_t which = random(operations.size());
    Counted it = operations[which];
    operations.erase(operations.begin() + long(which));
    if (it.copies) it.copies->finish_to(it.end);
    it.operation();
    return true;
}
// Ends one of those that the threads of a warp wait for themselves.
void Cluster::finish_one_of(Block& b, Warp& w) {
    w.products.finish_one();
    const size_t first = size_t(&w - b.warps.data()) * WARP;
    Fiber& f = *b.fibers[first + random(std::min(size_t(WARP), b.fibers.size() - first))];
    f.copies.finish_one();
    f.stores.finish_one();
}

constexpr int ROUNDS_ASKED = 16;
constexpr int MOST_IDLE = 1 << 16;  // times that threads ask in vain, with nobody else left

void Cluster::run_threads() {
    std::vector<std::pair<Block*, Warp*>> order;
    for (Block& b : blocks)
        for (Warp& w : b.warps) order.push_back({&b, &w});
    const auto at_once = [&] { return int(random(100)) < launch.grid.options.eager; };
    int idle = 0;  // rounds in a row in which some asked again, and nothing else happened
    while (living > 0) {
        if (*launch.grid.options.stop) failure = "stopped";
        bool moved = false, polled = false;
        const size_t first = random(order.size());
        for (size_t i = 0; i < order.size() && failure.empty(); ++i) {
            auto& [b, w] = order[(i + first) % order.size()];
            const size_t start = random(WARP);
            for (size_t n = 0; n < WARP && failure.empty(); ++n) {
                Fiber* const f = w->lanes[(n + start) % WARP];
                if (!f || !take_turn(*f)) continue;
                moved |= !f->polls;
                polled |= f->polls;
            }
            if (at_once()) moved |= finish_one();
            if (at_once()) finish_one_of(*b, *w);
        }
        if (!failure.empty()) return;
        // A warp that asks again and again never comes to rest: an operation ends all the same.
        if (polled && random(ROUNDS_ASKED) == 0) finish_one();
        moved = moved || finish_one();
        idle = moved ? 0 : idle + 1;
        if (!moved && (!polled || idle > MOST_IDLE)) failure = deadlock();
    }
}

std::string Cluster::deadlock() {
    std::vector<const void*> places;
    for (const Block& b : blocks)
        for (const Fiber* f : b.fibers)
            if (!f->ended) places.push_back(f->place);
    auto lines = lines_of(places);
    const auto state_of = [&](const Fiber& f) {
        if (f.ended) return std::string("ended");
        explanation.clear();
        if (f.is_over) f.explain(f.condition);
        return "wait for " + std::string(f.waits_for) + explanation + at_line(lines, f.place);
    };
    std::string text = "deadlock: nobody can go on";
    for (const Block& b : blocks) {
        for (size_t t = 0, end; t < b.fibers.size(); t = end) {
            const std::string state = state_of(*b.fibers[t]);
            for (end = t + 1; end < b.fibers.size() && state_of(*b.fibers[end]) == state;) ++end;
            text += "\n  block " + std::to_string(b.index()) + ", threads " + std::to_string(t) +
                    " to " + std::to_string(end - 1) + ": " + state;
        }
    }
    return text;
}

std::string name_of(const Fiber& f) {
    return "thread " + std::to_string(f.index) + " of block " + std::to_string(f.block);
}

}  // namespace emulator
