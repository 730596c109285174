// ptx/cp_async.cuh on the CPU - a copy is made when a wait asks for it, and not before.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ uint32 shared_address(const void* pointer) {
    return emulator::shared_address(pointer);
}

template <int BYTES>
__forceinline__ void cp_async(uint32 shared, const void* global, int valid, const char* what) {
    if (valid < 0 || valid > BYTES) emulator::fail("%s of %d bytes", what, valid);
    if (valid > 0 && reinterpret_cast<unsigned long long>(global) % BYTES)
        emulator::fail("%s: global address %p is no multiple of %d", what, global, BYTES);
    char* const to = emulator::shared_pointer(shared, BYTES, BYTES, what);
    emulator::current->copies.push_back({to, static_cast<const char*>(global), BYTES, valid});
}

__forceinline__ void cp_async_16(uint32 shared, const void* global, int valid) {
    cp_async<16>(shared, global, valid, "cp.async 16");
}
__forceinline__ void cp_async_8(uint32 shared, const void* global, int valid) {
    cp_async<8>(shared, global, valid, "cp.async 8");
}
__forceinline__ void cp_async_4(uint32 shared, const void* global, int valid) {
    cp_async<4>(shared, global, valid, "cp.async 4");
}

__forceinline__ void cp_async_commit() {
    emulator::Fiber& f = *emulator::current;
    f.copy_groups.push_back(f.copies.size());
}

template <int PENDING>
__forceinline__ void cp_async_wait() {
    const emulator::Inside inside;
    emulator::Fiber& f = *emulator::current;
    while (f.copy_groups.size() > PENDING) {
        f.finish_copies(f.copy_groups.front(),
                        [&](const void* to, size_t bytes) { emulator::note(f, to, bytes, true); });
        f.copy_groups.pop_front();
    }
}

}  // namespace flashcore
