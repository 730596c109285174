// ptx/mbarrier.cuh on the CPU - a barrier's 64 bits, as here only the emulator knows them.
#pragma once
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Arrivals and bytes that the phase waits for, arrivals of each phase, and the phase's number. A
// byte may arrive before it is expected.
struct MBarrier {
    uint16 waits_for, count;
    int bytes : 30;
    uint32 parity : 1;
    uint32 made : 1;
};
static_assert(sizeof(MBarrier) == sizeof(uint64));

__forceinline__ MBarrier& mbarrier(uint64* barrier) {
    return *reinterpret_cast<MBarrier*>(barrier);
}
inline MBarrier& made_mbarrier(uint64* barrier, const char* what,
                               const void* place = emulator::here()) {
    const emulator::Inside inside;
    emulator::shared_pointer(emulator::shared_address(barrier, place), 8, 8, what, place);
    return mbarrier(barrier);
}
__forceinline__ void end_phase_if_over(MBarrier& b, emulator::SyncClock& clock) {
    if (b.waits_for > 0 || b.bytes != 0) return;
    emulator::pass(clock);
    b.waits_for = b.count;
    b.parity ^= 1;
}
__forceinline__ void count_arrival(MBarrier& b, emulator::SyncClock& clock) {
    --b.waits_for;
    end_phase_if_over(b, clock);
}
__forceinline__ void count_bytes(MBarrier& b, emulator::SyncClock& clock, int bytes) {
    b.bytes -= bytes;
    end_phase_if_over(b, clock);
}

__forceinline__ void mbarrier_init(uint64* barrier, int count) {
    MBarrier& b = made_mbarrier(barrier, "mbarrier.init");
    const emulator::Inside inside;
    b = {uint16(count), uint16(count), 0, 0, 1};
}

__forceinline__ void fence_mbarrier_init() {}

__forceinline__ void mbarrier_arrive(uint64* barrier) {
    MBarrier& b = made_mbarrier(barrier, "mbarrier.arrive");
    const emulator::Inside inside;
    if (b.waits_for == 0) emulator::fail("mbarrier.arrive: more arrivals than the phase counts");
    emulator::SyncClock& clock = emulator::clock_of(barrier);
    emulator::release_to(clock);
    count_arrival(b, clock);
}

// The arrival comes when the copies have been made: sometime.
__forceinline__ void mbarrier_arrive_copied(uint64* barrier) {
    MBarrier& b = made_mbarrier(barrier, "cp.async.mbarrier.arrive");
    emulator::Fiber* const fiber = emulator::current;
    const size_t end = fiber->copies.size();
    emulator::SyncClock& clock = emulator::clock_of(barrier);
    emulator::block().cluster->operations.push_back(
        [&b, &clock, fiber, end, agent = emulator::Agent(*fiber)] {
            fiber->finish_copies(
                end, [&](const void* to, size_t bytes) { agent.note(to, bytes, true); });
            agent.arrive(clock);
            count_arrival(b, clock);
        });
}

__forceinline__ void mbarrier_arrive_expect_tx(uint64* barrier, uint32 bytes) {
    MBarrier& b = made_mbarrier(barrier, "mbarrier.arrive.expect_tx");
    const emulator::Inside inside;
    if (b.waits_for == 0) emulator::fail("mbarrier.arrive: more arrivals than the phase counts");
    b.bytes += int(bytes);
    emulator::SyncClock& clock = emulator::clock_of(barrier);
    emulator::release_to(clock);
    count_arrival(b, clock);
}

__forceinline__ bool is_over(const MBarrier& b, uint32 parity) { return b.parity != parity; }

__forceinline__ bool mbarrier_try_wait(uint64* barrier, uint32 parity) {
    const emulator::Inside inside;
    const MBarrier& b = made_mbarrier(barrier, "mbarrier.try_wait");
    if (!is_over(b, parity)) emulator::let_others_go("mbarrier.try_wait");
    if (!is_over(b, parity)) return false;
    emulator::acquire_from(emulator::clock_of(barrier));
    return true;
}

__forceinline__ void mbarrier_wait(uint64* barrier, uint32 parity) {
    const MBarrier& b = made_mbarrier(barrier, "mbarrier.try_wait");
    const emulator::Inside inside;
    emulator::wait_until("mbarrier", [&b, parity] { return is_over(b, parity); });
    emulator::acquire_from(emulator::clock_of(barrier));
}

__forceinline__ void named_barrier_arrive(int id, int threads);

__forceinline__ void fence_proxy_async() { emulator::fence_async(); }

}  // namespace flashcore

#include <flashcore/ptx/warp.cuh>

namespace flashcore {

__forceinline__ void named_barrier_arrive(int id, int threads) {
    emulator::arrive(named_barrier(id, threads), threads, false, "bar.arrive");
}

}  // namespace flashcore
