// ptx/cp_async.cuh - asynchronous copies from global to shared memory, past the registers (sm_80
// and later). A thread waits for its own copies, and a barrier makes them visible to others; or an
// mbarrier counts them (ptx/mbarrier.cuh).
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// Copies `valid` bytes and fills the rest of the 16, 8 or 4 with zeros; valid = 0 reads nothing.
// Only the 16-byte form may bypass L1 (.cg), which is wanted here: a tile is used from shared
// memory. L2::128B fetches the rest of the 128-byte line into L2, which is copied next.
__device__ __forceinline__ void cp_async_16(uint32 shared, const void* global, int valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared),
                 "l"(global), "r"(valid)
                 : "memory");
}

__device__ __forceinline__ void cp_async_8(uint32 shared, const void* global, int valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global),
                 "r"(valid)
                 : "memory");
}

__device__ __forceinline__ void cp_async_4(uint32 shared, const void* global, int valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
                 "r"(valid)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's most recent groups are still in flight.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace flashcore
