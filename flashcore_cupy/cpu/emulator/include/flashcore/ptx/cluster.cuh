// ptx/cluster.cuh on the CPU - the blocks of a cluster are fibers of the same OS thread.
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ int cluster_rank() { return emulator::block().rank; }

__forceinline__ void cluster_sync() {
    emulator::Cluster& c = *emulator::block().cluster;
    emulator::sync_all(c.meeting, c.living, "barrier.cluster");
}

__forceinline__ void cluster_sync_relaxed() { cluster_sync(); }

__forceinline__ void cluster_arrive_relaxed() {
    emulator::Cluster& c = *emulator::block().cluster;
    emulator::current->cluster_phase = emulator::arrive_all(c.meeting, c.living);
}
__forceinline__ void cluster_wait() {
    emulator::wait_all(emulator::block().cluster->meeting, emulator::current->cluster_phase,
                       "barrier.cluster.wait");
}

__forceinline__ uint32 peer_address(uint32 shared, int rank) {
    return shared | uint32(rank + 1) << emulator::PEER_SHIFT;
}

template <typename Vector>
__forceinline__ void load_peer(Vector& x, uint32 address) {
    const char* const from =
        emulator::shared_pointer(address, sizeof(Vector), sizeof(Vector), "ld.shared::cluster");
    emulator::note(*emulator::current, from, sizeof(Vector), false);
    const emulator::Inside inside;
    x = *reinterpret_cast<const Vector*>(from);
}

__forceinline__ void store_peer_async(uint32 address, const float4& x, uint32 barrier) {
    char* const to = emulator::shared_pointer(address, sizeof(x), sizeof(x), "st.async");
    uint64* const at = reinterpret_cast<uint64*>(
        emulator::shared_pointer(barrier, sizeof(uint64), sizeof(uint64), "st.async"));
    emulator::SyncClock& clock = emulator::clock_of(at);
    const emulator::Agent agent(*emulator::current);
    emulator::block().cluster->operations.push_back([to, x, at, &clock, agent] {
        agent.note(to, sizeof(x), true);
        std::memcpy(to, &x, sizeof(x));
        agent.arrive(clock);
        count_bytes(mbarrier(at), clock, sizeof(x));
    });
}

}  // namespace flashcore
