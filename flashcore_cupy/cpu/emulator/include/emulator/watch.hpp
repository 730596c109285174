// watch.hpp - what a twin tells a checking build: who reads and writes what, and what orders it.
//
// The kernel's plain accesses are told by the compiler (-fsanitize=thread). Here are those that it
// does not see. Each function takes them to happen where it is called. Without checking none of
// them does anything. memory.cpp and clocks.cpp are what a checking build makes of it.
#pragma once
#include <cstddef>

namespace emulator {

#ifdef EMULATOR_CHECK
#define WATCH(...) __VA_ARGS__;
#else
#define WATCH(...) \
    inline __VA_ARGS__ {}
#endif

// Who accesses memory: the thread, before it goes on; its warp, as one, which the last lane to come
// tells; or an operation that the thread has started, which may be under way until the thread (of a
// product: its warp) has waited for the operation's group.
enum class By { THREAD, WARP, COPY, STORE, PRODUCT };
WATCH(void note_read(By by, const void* memory, size_t bytes))
WATCH(void note_write(By by, const void* memory, size_t bytes))

// Eight rows of 16 bytes that a warp reads or writes at once, if they lie in different banks.
WATCH(void note_rows(const void* const (&rows)[8]))

// An mbarrier: made; a thread arrives; a phase is over; a thread has waited for a phase.
WATCH(void barrier_made(const void* barrier))
WATCH(void barrier_arrival(const void* barrier))
WATCH(void barrier_over(const void* barrier))
WATCH(void barrier_passed(const void* barrier, unsigned parity))
// What an mbarrier tells the end of: a write, which TMA makes past what orders threads (see
// fence_proxy_async), or another unit; all copies of this thread so far.
WATCH(void note_counted_write(const void* barrier, const void* memory, size_t bytes, bool by_tma))
WATCH(void barrier_counts_copies(const void* barrier))

// From now on TMA and wgmma, or the whole GPU, see what the thread has done and knows of.
WATCH(void fence_for_async())
WATCH(void fence_for_gpu())

// Registers that a wgmma uses up to the wait for it, and the fence after which it may.
WATCH(void note_registers(const void* first, size_t bytes))
WATCH(void fence_for_products())

}  // namespace emulator
