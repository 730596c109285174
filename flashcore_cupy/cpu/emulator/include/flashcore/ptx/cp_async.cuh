// ptx/cp_async.cuh on the CPU - a copy is made sometime between its call and a wait for it. Before
// the wait nobody may touch what it writes, not even the thread itself.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

__forceinline__ uint32 shared_address(const void* pointer) {
    return emulator::shared_address(pointer);
}

namespace twin {

// Of the BYTES bytes that it writes, `valid` come from global memory; the rest are zeros.
template <int BYTES>
__forceinline__ void cp_async(uint32 shared, const void* global, int valid, const char* what) {
    if (valid < 0 || valid > BYTES) emulator::fail("%s of %d bytes", what, valid);
    if (valid > 0 && reinterpret_cast<uint64>(global) % BYTES)
        emulator::fail("%s: global address %p is no multiple of %d", what, global, BYTES);
    char* const to = emulator::shared_pointer(shared, BYTES, BYTES, what);
    if (valid > 0) emulator::note_read(emulator::By::COPY, global, size_t(valid));
    emulator::note_write(emulator::By::COPY, to, BYTES);
    emulator::start(emulator::Queue::COPIES, emulator::Operation([=] {
                        std::memcpy(to, global, size_t(valid));
                        std::memset(to + valid, 0, size_t(BYTES - valid));
                    }));
}

}  // namespace twin

__forceinline__ void cp_async_16(uint32 shared, const void* global, int valid) {
    twin::cp_async<16>(shared, global, valid, "cp.async 16");
}
__forceinline__ void cp_async_8(uint32 shared, const void* global, int valid) {
    twin::cp_async<8>(shared, global, valid, "cp.async 8");
}
__forceinline__ void cp_async_4(uint32 shared, const void* global, int valid) {
    twin::cp_async<4>(shared, global, valid, "cp.async 4");
}

// The copies since the last call are a group.
__forceinline__ void cp_async_commit() { emulator::close_group(emulator::Queue::COPIES); }

// Makes the copies of this thread's groups, but for those of the PENDING last ones. Others see them
// after the next barrier.
template <int PENDING>
__forceinline__ void cp_async_wait() {
    emulator::finish_all_but(emulator::Queue::COPIES, PENDING);
}

}  // namespace flashcore
