// ptx/cluster.cuh on the CPU - the blocks of a cluster are fibers of the same OS thread.
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ int cluster_rank() { return emulator::current().rank; }

__forceinline__ void cluster_sync() { emulator::sync_cluster(); }

// Here it orders writes as well.
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

// The store is made sometime before the peer's barrier has its bytes.
__forceinline__ void store_peer_async(uint32 address, const float4& x, uint32 barrier) {
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
