// tsan.cpp - in a checking build: what -fsanitize=thread has the compiler call at plain accesses.
#include <emulator/memory.hpp>
#include <emulator/places.hpp>

#ifdef EMULATOR_CHECK

namespace emulator {

[[noreturn]] static void misaligned(size_t bytes, bool writes, const void* place) {
    fail_with("misaligned: " + emulator::name_of(fiber()) + (writes ? " writes " : " reads ") +
              std::to_string(bytes) + " bytes at an address that is no multiple of them" +
              at_line(place));
}

// Whoever calls this is a fiber, if only the scheduler.
__attribute__((always_inline)) static inline void plain(const void* p, size_t bytes, bool writes,
                                                        bool is_aligned, const void* place) {
    Fiber& f = fiber();
    if (f.inside) return;
    if (f.watched.doubt) settle_doubt(f);
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (address - reinterpret_cast<uintptr_t>(&f) < STACK_BYTES) {
        const Registers& registers = f.watched.registers;
        if (address - reinterpret_cast<uintptr_t>(registers.begin) < 4 * registers.words.size())
            touch_registers(f, p, bytes, place);
        return;
    }
    if (is_aligned && address % bytes && !cluster().stacks.has(p)) misaligned(bytes, writes, place);
    Access now = access(By::THREAD, writes, place);
    now.is_plain = writes;
    touch(p, bytes, now);
}

}  // namespace emulator

// What -fsanitize=thread has the compiler call.
#define EMULATOR_ACCESS(name, bytes, writes, is_aligned)                            \
    extern "C" void name(void* p) {                                                 \
        emulator::plain(p, bytes, writes, is_aligned, __builtin_return_address(0)); \
    }
#define EMULATOR_ACCESSES(bytes)                                       \
    EMULATOR_ACCESS(__tsan_read##bytes, bytes, false, true)            \
    EMULATOR_ACCESS(__tsan_write##bytes, bytes, true, true)            \
    EMULATOR_ACCESS(__tsan_unaligned_read##bytes, bytes, false, false) \
    EMULATOR_ACCESS(__tsan_unaligned_write##bytes, bytes, true, false) \
    EMULATOR_ACCESS(__tsan_volatile_read##bytes, bytes, false, true)   \
    EMULATOR_ACCESS(__tsan_volatile_write##bytes, bytes, true, true)
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
extern "C" {
void __tsan_read_range(void* p, size_t n) {
    emulator::plain(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
    emulator::plain(p, n, true, false, __builtin_return_address(0));
}
// clang's.
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    emulator::plain(from, n, false, false, __builtin_return_address(0));
    emulator::plain(to, n, true, false, __builtin_return_address(0));
    return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    emulator::plain(from, n, false, false, __builtin_return_address(0));
    emulator::plain(to, n, true, false, __builtin_return_address(0));
    return memmove(to, from, n);
}
void* __tsan_memset(void* to, int byte, size_t n) {
    emulator::plain(to, n, true, false, __builtin_return_address(0));
    return memset(to, byte, n);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}
}

#endif
