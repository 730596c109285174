// machine.cpp - what a thread asks the machine for: to wait, to meet others, to start what the GPU
// does on its own.
#include <emulator/cluster.hpp>
#include <emulator/places.hpp>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

// A function that a kernel calls: what is wrong in it is wrong at the line of the call.
#define CALLED_HERE                              \
    fiber().place = __builtin_return_address(0); \
    settle_doubt(fiber())

namespace emulator {

// ---- one fiber ---------------------------------------------------------------------------------

void yield() { switch_to(fiber().context, cluster().scheduler->context); }

[[noreturn]] void fail_with(const std::string& text) {
    Cluster& c = cluster();
    if (c.failure.empty()) c.failure = text;
    yield();
    abort();
}
static std::string format(const char* format, va_list arguments) {
    char text[600];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}
// Called by the functions below, at the place that they were called at.
[[noreturn]] static void fail_there(const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    fail_with(name_of(fiber()) + ": " + format(text, arguments) + at_line(fiber().place));
}
void fail(const char* text, ...) {
    CALLED_HERE;
    va_list arguments;
    va_start(arguments, text);
    fail_with(name_of(fiber()) + ": " + format(text, arguments) + at_line(fiber().place));
}

static void wait_there(const char* what, bool (*is_over)(const void*), void (*explain)(const void*),
                       const void* condition) {
    if (is_over(condition)) return;
    Fiber& f = fiber();
    f.waits_for = what;
    f.is_over = is_over;
    f.explain = explain;
    f.condition = condition;
    yield();
}
void wait(const char* what, bool (*is_over)(const void*), void (*explain)(const void*),
          const void* condition) {
    CALLED_HERE;
    wait_there(what, is_over, explain, condition);
}
void explain(const char* text, ...) {
    va_list arguments;
    va_start(arguments, text);
    cluster().explanation = format(text, arguments);
}
static void let_others_go_there(const char* what) {
    fiber().waits_for = what;
    fiber().polls = true;
    yield();
}
void let_others_go(const char* what) {
    CALLED_HERE;
    let_others_go_there(what);
}

// ---- meeting -----------------------------------------------------------------------------------

// Waits until a round is over that so many of `all` have come to.
static void wait_for_round(const char* what, const uint32_t& round, uint32_t mine,
                           const int& arrived, int all) {
    struct Round {
        const uint32_t& round;
        uint32_t mine;
        const int& arrived;
        int all;
    } over = {round, mine, arrived, all};
    wait_there(
        what,
        [](const void* c) {
            const Round& r = *static_cast<const Round*>(c);
            return r.round != r.mine;
        },
        [](const void* c) {
            const Round& r = *static_cast<const Round*>(c);
            explain(", where %d of %d have come", r.arrived, r.all);
        },
        &over);
}

static void meet(const char* what, void* operand, void (*act)(void**)) {
    Fiber& f = fiber();
    ++f.inside;
    Collective& c = f.warp->collective;
    if (c.arrived == 0) c.what = what;
    if (c.what != what) fail_there("%s, while other lanes of the warp are at %s", what, c.what);
    c.operands[f.index % WARP] = operand;
    const uint32_t mine = c.round;
    if (++c.arrived == WARP) {
        c.arrived = 0;
        ++c.round;
        align_epochs(*f.warp);
        act(c.operands);
    } else {
        wait_for_round(what, c.round, mine, c.arrived, WARP);
    }
    --f.inside;
}
void collective(const char* what, void* operand, void (*act)(void**)) {
    CALLED_HERE;
    meet(what, operand, act);
}

void Barrier::open() {
    clock.pass(round & 1);
    arrived = expected = 0;
    ++round;
}
static void arrive(Barrier& b, int threads) {
    b.clock.release(fiber());
    if (++b.arrived == threads) b.open();
}
static void wait_for(Barrier& b, uint32_t round, int threads, const char* what) {
    wait_for_round(what, b.round, round, b.arrived, threads);
    b.clock.acquire(fiber(), round & 1);
}
static void sync(Barrier& b, int threads, const char* what) {
    const uint32_t mine = b.round;
    arrive(b, threads);
    wait_for(b, mine, threads, what);
}
void sync_warp() {
    CALLED_HERE;
    meet("bar.warp.sync", nullptr, [](void**) { order_lanes(*fiber().warp); });
}
void sync_block() {
    CALLED_HERE;
    sync(fiber().owner->barriers[0], fiber().owner->living, "bar.sync 0");
}
void sync_cluster() {
    CALLED_HERE;
    sync(cluster().meeting, cluster().living, "barrier.cluster");
}

void arrive_cluster() {
    CALLED_HERE;
    fiber().cluster_round = cluster().meeting.round;
    arrive(cluster().meeting, cluster().living);
}
void wait_cluster() {
    CALLED_HERE;
    wait_for(cluster().meeting, fiber().cluster_round, cluster().living, "barrier.cluster.wait");
}

static Barrier& named(int id, int threads, const char* what) {
    if (id < 1 || id > 15) fail_there("%s: barrier %d; there are 1 to 15", what, id);
    if (threads % WARP) fail_there("%s %d: %d threads; whole warps meet", what, id, threads);
    Barrier& b = fiber().owner->barriers[id];
    if (b.arrived && b.expected != threads)
        fail_there("%s %d of %d threads, while others expect %d", what, id, threads, b.expected);
    if (b.round < fiber().next_round[id])
        fail_there("%s %d: it has come to this round already, which is not over", what, id);
    fiber().next_round[id] = b.round + 1;
    b.expected = threads;
    return b;
}
void sync_named(int id, int threads) {
    CALLED_HERE;
    sync(named(id, threads, "bar.sync"), threads, "bar.sync");
}
void arrive_named(int id, int threads) {
    CALLED_HERE;
    arrive(named(id, threads, "bar.arrive"), threads);
}

// ---- shared addresses --------------------------------------------------------------------------

uint32_t shared_address(const void* pointer) {
    CALLED_HERE;
    const auto offset = static_cast<const char*>(pointer) - fiber().smem;
    if (offset < 0 || offset > fiber().owner->smem_bytes)
        fail_there("a pointer that is not to shared memory");
    return uint32_t(offset) + SHARED_BASE;
}
char* shared_pointer(uint32_t address, int bytes, int align, const char* what) {
    CALLED_HERE;
    const Block* owner = fiber().owner;
    if (const uint32_t peer = address >> PEER_SHIFT) {
        if (peer > cluster().blocks.size())
            fail_there("%s: there is no block %u in the cluster", what, peer - 1);
        owner = &cluster().blocks[peer - 1];
    }
    const int64_t offset = int64_t(address & ((1u << PEER_SHIFT) - 1)) - SHARED_BASE;
    if (offset < 0 || offset + bytes > owner->smem_bytes)
        fail_there("%s: shared address %lld, %d bytes, is outside of the %d bytes of shared memory",
                   what, (long long)offset, bytes, owner->smem_bytes);
    if (offset % align)
        fail_there("%s: shared address %lld is no multiple of %d", what, (long long)offset, align);
    return owner->smem + offset;
}

// ---- what the GPU does on its own --------------------------------------------------------------

static Groups& groups(Queue queue) {
    Fiber& f = fiber();
    return queue == Queue::COPIES ? f.copies : queue == Queue::STORES ? f.stores : f.warp->products;
}
void start(const Operation& operation) { cluster().operations.push_back({operation, nullptr, 0}); }
void start_when_copied(const Operation& operation) {
    cluster().operations.push_back({operation, &fiber().copies, fiber().copies.started});
}
void start(Queue queue, const Operation& operation) { groups(queue).start(operation); }
void close_group(Queue queue) {
    groups(queue).close();
    close_watched(queue);
}
void finish_all_but(Queue queue, int pending) {
    ++fiber().inside;
    groups(queue).finish_all_but(size_t(pending));
    finish_watched(queue, size_t(pending));
    --fiber().inside;
}

int atomic_add(int* counter, int x) {
    CALLED_HERE;
    return watched_add(counter, x);
}

void red_add(float* address, const float* x, int count) {
    CALLED_HERE;
    watch_red(address, size_t(count) * sizeof(float));
    for (int i = 0; i < count; ++i) {
        float old, sum;
        __atomic_load(address + i, &old, __ATOMIC_RELAXED);
        do sum = old + x[i];
        while (!__atomic_compare_exchange(address + i, &old, &sum, true, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    }
}

}  // namespace emulator

// A thread that sleeps lets others go first: 1000 nanoseconds are one look of the scheduler.
void __nanosleep(unsigned nanoseconds) {
    using namespace emulator;
    CALLED_HERE;
    for (unsigned i = 0; i < nanoseconds; i += 1000) let_others_go_there("nanosleep");
}
