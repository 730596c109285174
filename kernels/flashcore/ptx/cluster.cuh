// ptx/cluster.cuh - clusters: CTAs that run at the same time and reach each other's shared memory
// (sm_90 and later). A kernel's __cluster_dims__ make clusters of neighbouring CTAs.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

// This CTA's number within its cluster.
__device__ __forceinline__ int cluster_rank() {
    uint32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// A barrier for all threads of the cluster that have not exited. After it each of them sees what
// the others wrote before it, to any shared memory of the cluster. Whole warps call it together.
__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

// The same without ordering memory. It suffices before a CTA exits whose shared memory others have
// read: a thread that has used a value has waited for its load.
__device__ __forceinline__ void cluster_sync_relaxed() {
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.aligned;" ::
            : "memory");
}

// The two halves of a barrier for all threads of the cluster that have not exited. Nobody waits in
// the first, which orders no memory. Barriers that were made before it, and fenced by
// fence_mbarrier_init, are there after the second.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Returns the address at which CTA `rank` of the cluster has what this CTA has at `shared`.
__device__ __forceinline__ uint32 peer_address(uint32 shared, int rank) {
    uint32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

__device__ __forceinline__ void load_peer(float2& x, uint32 address) {
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_peer(float4& x, uint32 address) {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
}

// Stores to a peer's shared memory without waiting. The bytes count on a barrier of the same peer,
// which must expect them; who waits for that barrier sees them.
__device__ __forceinline__ void store_peer_async(uint32 address, const float4& x, uint32 barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(address),
        "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
        : "memory");
}

}  // namespace flashcore
