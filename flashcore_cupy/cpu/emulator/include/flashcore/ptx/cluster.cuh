// ptx/cluster.cuh on the CPU - the blocks of a cluster are fibers of the same OS thread.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ int cluster_rank() { return emulator::block().rank; }

__forceinline__ void cluster_sync() {
    emulator::Cluster& c = *emulator::block().cluster;
    emulator::sync_all(c.meeting, c.living, "barrier.cluster");
}

__forceinline__ void cluster_sync_relaxed() { cluster_sync(); }

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

}  // namespace flashcore
