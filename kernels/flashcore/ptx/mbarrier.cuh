// ptx/mbarrier.cuh - barriers in shared memory that count arrivals (sm_80 and later) and bytes of
// TMA (sm_90 and later), and the fence between plain accesses and those of TMA and wgmma.
//
// A barrier is a uint64. Its phase is over when `count` arrivals and all expected bytes have come;
// the next one then begins by itself. Phases have parity 0, 1, 0, ...; a wait names the parity of
// the phase that must be over, and passes at once with parity 1 on a new barrier. So in a pipeline
// of S stages, with a full and an empty barrier each, the i-th time
//   a consumer waits for full[i % S], parity i / S % 2
//   a producer waits for empty[i % S], parity i / S % 2 ^ 1
#pragma once
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// One thread does this, once; then fence_mbarrier_init, if TMA will arrive; then a block barrier.
__device__ __forceinline__ void mbarrier_init(uint64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count)
                 : "memory");
}

// Makes new barriers visible to TMA. The thread that made them calls it.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives. Whoever waits sees what this thread wrote before it, and may overwrite what it read.
__device__ __forceinline__ void mbarrier_arrive(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Arrives once, when all cp.async that this thread has started before have finished. It does not
// wait for plain stores.
__device__ __forceinline__ void mbarrier_arrive_copied(uint64* barrier) {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
        : "memory");
}

// Arrives, and makes the phase wait for so many bytes of copies, too. A thread calls it before it
// starts the copies: a copy may be quicker than the thread.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64* barrier, uint32 bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

// Whether the phase of this parity is over; from sm_90 on the hardware may let the thread sleep a
// while before it says no.
__device__ __forceinline__ bool mbarrier_try_wait(uint64* barrier, uint32 parity) {
    uint32 done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// The same, never asleep.
__device__ __forceinline__ bool mbarrier_test_wait(uint64* barrier, uint32 parity) {
    uint32 done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint64* barrier, uint32 parity) {
    while (!mbarrier_try_wait(barrier, parity)) {
    }
}

// Arrives at a named barrier without waiting. threads: all that arrive here or wait in
// named_barrier_sync, whole warps.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Makes this thread's plain stores to shared memory visible to wgmma and TMA, and orders its plain
// reads before their writes. Each thread that stored or read calls it before the barrier after
// which they start.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace flashcore
