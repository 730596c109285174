// ptx/mbarrier.cuh on the CPU - a barrier's 64 bits, as here only the emulator knows them.
//
// A phase waits for arrivals and for bytes. When neither is missing it is over, and the next one
// begins: with the arrivals that the barrier was made for, and no bytes. Nothing else is kept: a
// thread that waits too late, when the next phase is over as well, waits for ever.
#pragma once
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

namespace twin {

struct MBarrier {
    uint16 missing, count;  // arrivals of this phase, of each phase
    int bytes : 30;         // that are missing; below 0: a byte has come before it was expected
    uint32 parity : 1;      // of the phase
    uint32 : 1;
};
static_assert(sizeof(MBarrier) == sizeof(uint64));

__forceinline__ MBarrier& mbarrier(uint64* barrier, const char* what) {
    emulator::shared_pointer(shared_address(barrier), 8, 8, what);
    return *reinterpret_cast<MBarrier*>(barrier);
}

inline void count(uint64* barrier, int arrivals, int bytes) {
    MBarrier& b = *reinterpret_cast<MBarrier*>(barrier);
    b.missing -= uint16(arrivals);
    b.bytes -= bytes;
    if (b.missing > 0 || b.bytes != 0) return;
    b.missing = b.count;
    b.parity ^= 1;
    emulator::barrier_over(barrier);
}

}  // namespace twin

__forceinline__ void mbarrier_init(uint64* barrier, int count) {
    if (count < 1 || count > 0xffff) emulator::fail("mbarrier.init: %d arrivals", count);
    twin::MBarrier& b = twin::mbarrier(barrier, "mbarrier.init");
    emulator::barrier_made(barrier);
    const emulator::Inside inside;
    b = {uint16(count), uint16(count), 0, 0};
}

// To TMA a new barrier is like any plain store: see fence_proxy_async.
__forceinline__ void fence_mbarrier_init() { emulator::fence_for_async(); }

namespace twin {

__forceinline__ void arrive(uint64* barrier, int bytes, const char* what) {
    const MBarrier& b = mbarrier(barrier, what);
    emulator::barrier_arrival(barrier);
    const emulator::Inside inside;
    if (b.missing == 0) emulator::fail("%s: more arrivals than the phase counts", what);
    count(barrier, 1, -bytes);
}

}  // namespace twin

// Whoever waits for the phase sees what those have done before who have arrived.
__forceinline__ void mbarrier_arrive(uint64* barrier) {
    twin::arrive(barrier, 0, "mbarrier.arrive");
}

// The arrival comes when the copies have been made: sometime.
__forceinline__ void mbarrier_arrive_copied(uint64* barrier) {
    twin::mbarrier(barrier, "cp.async.mbarrier.arrive");
    emulator::barrier_counts_copies(barrier);
    emulator::start_when_copied(emulator::Operation([=] { twin::count(barrier, 1, 0); }));
}

// First the bytes are missing, then the arrival is counted: the phase cannot be over in between.
__forceinline__ void mbarrier_arrive_expect_tx(uint64* barrier, uint32 bytes) {
    twin::arrive(barrier, int(bytes), "mbarrier.arrive.expect_tx");
}

namespace twin {

// A phase that is not over has its parity. One that is over has left its successor's.
struct Phase {
    const uint64* barrier;
    uint32 parity;

    const MBarrier& state() const { return *reinterpret_cast<const MBarrier*>(barrier); }
    bool is_over() const { return state().parity != parity; }
    void explain() const {
        emulator::explain(", whose phase misses %d arrivals and %d bytes", state().missing,
                          state().bytes);
    }
};

}  // namespace twin

// The hardware may let the thread sleep before it says no. Here all others go first, once.
__forceinline__ bool mbarrier_try_wait(uint64* barrier, uint32 parity) {
    twin::mbarrier(barrier, "mbarrier.try_wait");
    const twin::Phase phase = {barrier, parity};
    {
        const emulator::Inside inside;
        if (!phase.is_over()) emulator::let_others_go("mbarrier.try_wait");
        if (!phase.is_over()) return false;
    }
    emulator::barrier_passed(barrier, parity);
    return true;
}

__forceinline__ bool mbarrier_test_wait(uint64* barrier, uint32 parity) {
    return mbarrier_try_wait(barrier, parity);
}

__forceinline__ void mbarrier_wait(uint64* barrier, uint32 parity) {
    twin::mbarrier(barrier, "mbarrier.try_wait");
    {
        const emulator::Inside inside;
        emulator::wait_until("mbarrier", twin::Phase{barrier, parity});
    }
    emulator::barrier_passed(barrier, parity);
}

__forceinline__ void named_barrier_arrive(int id, int threads) {
    emulator::arrive_named(id, threads);
}

// TMA and wgmma read shared memory past what orders threads: they may see what was there before a
// plain store that the thread, and whoever it has told, see long since.
__forceinline__ void fence_proxy_async() { emulator::fence_for_async(); }

}  // namespace flashcore
