// tsan.hpp - what -fsanitize=thread has the compiler call at each plain access of a kernel.
#pragma once
#include <emulator/machine.hpp>

#ifdef EMULATOR_CHECK

// A function in which no calls are made. (Of clang's own, no_sanitize leaves those at atomics.)
#ifdef __clang__
#define EMULATOR_UNWATCHED __attribute__((disable_sanitizer_instrumentation))
#else
#define EMULATOR_UNWATCHED __attribute__((no_sanitize("thread")))
#endif

namespace emulator {

inline EMULATOR_UNWATCHED void plain_access(const void* p, size_t bytes, bool writes,
                                            const void* place) {
    if (!current || current->inside) return;
    ++current->inside;
    note(*current, p, bytes, writes, false, place);
    const bool failed = !current->block->cluster->failure.empty();
    if (failed) yield();
    --current->inside;
}

}  // namespace emulator

#define EMULATOR_ACCESS(name, bytes, writes)                                   \
    extern "C" EMULATOR_UNWATCHED void name(void* p) {                         \
        emulator::plain_access(p, bytes, writes, __builtin_return_address(0)); \
    }
#define EMULATOR_ACCESSES(bytes)                                \
    EMULATOR_ACCESS(__tsan_read##bytes, bytes, false)           \
    EMULATOR_ACCESS(__tsan_write##bytes, bytes, true)           \
    EMULATOR_ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
    EMULATOR_ACCESS(__tsan_unaligned_write##bytes, bytes, true) \
    EMULATOR_ACCESS(__tsan_volatile_read##bytes, bytes, false)  \
    EMULATOR_ACCESS(__tsan_volatile_write##bytes, bytes, true)
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
extern "C" {
EMULATOR_UNWATCHED void __tsan_read_range(void* p, size_t n) {
    emulator::plain_access(p, n, false, __builtin_return_address(0));
}
EMULATOR_UNWATCHED void __tsan_write_range(void* p, size_t n) {
    emulator::plain_access(p, n, true, __builtin_return_address(0));
}
// Of clang, in place of the calls without __tsan_.
EMULATOR_UNWATCHED void* __tsan_memset(void* p, int byte, size_t n) {
    emulator::plain_access(p, n, true, __builtin_return_address(0));
    return std::memset(p, byte, n);
}
EMULATOR_UNWATCHED void* __tsan_memcpy(void* to, const void* from, size_t n) {
    emulator::plain_access(from, n, false, __builtin_return_address(0));
    emulator::plain_access(to, n, true, __builtin_return_address(0));
    return std::memcpy(to, from, n);
}
EMULATOR_UNWATCHED void* __tsan_memmove(void* to, const void* from, size_t n) {
    emulator::plain_access(from, n, false, __builtin_return_address(0));
    emulator::plain_access(to, n, true, __builtin_return_address(0));
    return std::memmove(to, from, n);
}
#define EMULATOR_ATOMICS(bits, T)                                                                 \
    EMULATOR_UNWATCHED T __tsan_atomic##bits##_load(const volatile T* p, int) {                   \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                              \
    }                                                                                             \
    EMULATOR_UNWATCHED void __tsan_atomic##bits##_store(volatile T* p, T x, int) {                \
        __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                 \
    }                                                                                             \
    EMULATOR_UNWATCHED T __tsan_atomic##bits##_fetch_add(volatile T* p, T x, int) {               \
        return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                        \
    }                                                                                             \
    EMULATOR_UNWATCHED T __tsan_atomic##bits##_exchange(volatile T* p, T x, int) {                \
        return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                       \
    }                                                                                             \
    EMULATOR_UNWATCHED int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* old,   \
                                                                         T x, int, int) {         \
        return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }                                                                                             \
    EMULATOR_UNWATCHED T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T old, T x,    \
                                                                    int, int) {                   \
        __atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
        return old;                                                                               \
    }
EMULATOR_ATOMICS(8, char)
EMULATOR_ATOMICS(32, int)
EMULATOR_ATOMICS(64, long)
void __tsan_atomic_thread_fence(int) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
}

#endif
