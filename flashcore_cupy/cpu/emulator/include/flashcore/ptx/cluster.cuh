// ptx/cluster.cuh on the CPU - the threads of all blocks of a cluster are fibers of one OS thread:
// each can reach the shared memory of all.
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ int cluster_rank() { return emulator::current().rank; }

__forceinline__ void cluster_sync() { emulator::sync_cluster(); }

// All have come; what they wrote, others need not see. Here they do, and so they do after the
// halves below: that a kernel relies on it is not found.
__forceinline__ void cluster_sync_relaxed() { emulator::sync_cluster(); }

__forceinline__ void cluster_arrive_relaxed() { emulator::arrive_cluster(); }
__forceinline__ void cluster_wait() { emulator::wait_cluster(); }

// The upper bits say whose shared memory it is; without them it is the thread's own.
__forceinline__ uint32 peer_address(uint32 shared, int rank) {
    return shared | uint32(rank + 1) << emulator::PEER_SHIFT;
}

template <typename Vector>
__forceinline__ void load_peer(Vector& x, uint32 address) {
    x = *reinterpret_cast<const Vector*>(
        emulator::shared_pointer(address, sizeof(Vector), sizeof(Vector), "ld.shared::cluster"));
}

// The store is made sometime, and its bytes count then. The barrier lies where the bytes go.
__forceinline__ void store_peer_async(uint32 address, const float4& x, uint32 barrier) {
    if (address >> emulator::PEER_SHIFT != barrier >> emulator::PEER_SHIFT)
        emulator::fail("st.async: the barrier is in another block's shared memory");
    char* const to = emulator::shared_pointer(address, sizeof x, sizeof x, "st.async");
    uint64* const counts = reinterpret_cast<uint64*>(
        emulator::shared_pointer(barrier, sizeof(uint64), sizeof(uint64), "st.async"));
    emulator::note_counted_write(counts, to, sizeof x, false);
    emulator::start(emulator::Operation([=] {
        std::memcpy(to, &x, sizeof x);
        twin::count(counts, 0, sizeof x);
    }));
}

}  // namespace flashcore
