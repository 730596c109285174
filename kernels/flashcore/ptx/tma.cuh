// ptx/tma.cuh - the unit that copies boxes of a tensor from global to shared memory when one thread
// asks (sm_90 and later). What it knows of the tensor, address, sizes, strides, box and swizzle, is
// in a tensor map, which the host encodes (cuTensorMapEncodeTiled).
//
// A box of rows of 128, 64 or 32 bytes lands row after row, in the layout that ptx/wgmma.cuh
// describes; it begins at a multiple of 1024, 512 or 256 bytes. Coordinates count elements and may
// be negative. What lies outside the tensor arrives as zeros, and counts among a box's bytes.
#pragma once
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// A kernel takes it as `const __grid_constant__ TensorMap`: the unit reads the parameter itself.
struct alignas(64) TensorMap {
    uint64 opaque[16];
};

// What L2 shall do with the lines of a copy: drop them before others, or after.
constexpr uint64 EVICT_FIRST = 0x12F0000000000000;
constexpr uint64 EVICT_LAST = 0x14F0000000000000;

// Fetches the map itself ahead of the first copy that needs it.
__device__ __forceinline__ void prefetch_tensormap(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts the copy of the box at (c0, c1, c2, c3), the contiguous dimension first. Its bytes count
// on the barrier, which must expect them.
__device__ __forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64* barrier,
                                            int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

__device__ __forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64* barrier,
                                            int c0, int c1, int c2, int c3, uint64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
        : "memory");
}

// The other way: starts to copy a box from shared memory to (c0, c1, c2, c3), none of which may be
// negative here. What lies outside the tensor is left out. The box was written before a
// fence_proxy_async.
__device__ __forceinline__ void tma_store_4d(const TensorMap* map, const void* shared, int c0,
                                             int c1, int c2, int c3, uint64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint "
        "[%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(map),
        "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
        : "memory");
}

// Closes a group of the stores that this thread has started since the last one.
__device__ __forceinline__ void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until TMA has read all of this thread's groups from shared memory, which is free then.
__device__ __forceinline__ void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace flashcore
