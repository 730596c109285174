// ptx/tma.cuh on the CPU - boxes of a tensor, copied sometime between the call and the barrier.
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// What the host encodes here, 16 words: the address; sizes of the four dimensions, elements; strides
// of the last three, bytes; the box, 16 bits each; bytes of an element; bytes of the swizzle.
struct alignas(64) TensorMap {
    uint64 opaque[16];

    uint64 size(int d) const { return opaque[1 + d]; }
    uint64 stride(int d) const { return d == 0 ? opaque[9] : opaque[4 + d]; }
    int box(int d) const { return int(opaque[8] >> 16 * d & 0xffff); }
    int element_bytes() const { return int(opaque[9]); }
    int swizzle() const { return int(opaque[10]); }
};

constexpr uint64 EVICT_FIRST = 0x12F0000000000000;
constexpr uint64 EVICT_LAST = 0x14F0000000000000;

__forceinline__ void prefetch_tensormap(const TensorMap*) {}

// For each row of the box: act(its place in shared memory, in the tensor or null, elements inside).
// Rows lie one after the other; 16-byte pieces of a row are permuted: see swizzled_copy.
// The map is copied: it lies among the parameters of a thread, which may end before its copies do.
struct Box {
    TensorMap map;
    int first[4];

    template <typename Act>
    void each_element(Act act) const {
        uint32 at = 0;
        const int bytes = map.element_bytes();
        for (int i3 = 0; i3 < map.box(3); ++i3)
            for (int i2 = 0; i2 < map.box(2); ++i2)
                for (int i1 = 0; i1 < map.box(1); ++i1)
                    for (int i0 = 0; i0 < map.box(0); ++i0, at += uint32(bytes)) {
                        const long long c[4] = {first[0] + i0, first[1] + i1, first[2] + i2,
                                                first[3] + i3};
                        const char* global = reinterpret_cast<const char*>(map.opaque[0]);
                        bool inside = true;
                        for (int d = 0; d < 4; ++d) {
                            inside = inside && c[d] >= 0 && uint64(c[d]) < map.size(d);
                            global += c[d] * (long long)map.stride(d);
                        }
                        act(at, inside ? global : nullptr);
                    }
    }
    int bytes() const {
        return map.box(0) * map.box(1) * map.box(2) * map.box(3) * map.element_bytes();
    }
};

// Bits 4 and up of a shared address are xored with bits 7 and up.
__forceinline__ uint32 swizzled_address(uint32 address, int swizzle) {
    return address ^ (address >> 3 & uint32(swizzle - 16));
}

inline char* box_in_shared(const Box& box, uint32 address, const char* what,
                           const void* place = emulator::here()) {
    const int swizzle = box.map.swizzle();
    if (box.map.box(0) * box.map.element_bytes() != swizzle)
        emulator::fail("%s: rows of the box have not the %d bytes of the swizzle", what, swizzle);
    return emulator::shared_pointer(address, box.bytes(), 8 * swizzle, what, place);
}

__forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64* barrier, int c0,
                                 int c1, int c2, int c3) {
    const Box box = {*map, {c0, c1, c2, c3}};
    const uint32 address = shared_address(shared);
    char* const to = box_in_shared(box, address, "TMA load");
    MBarrier& b = made_mbarrier(barrier, "TMA load");
    emulator::SyncClock& clock = emulator::clock_of(barrier);
    const emulator::Agent agent(*emulator::current);
    emulator::block().cluster->operations.push_back([box, to, address, &b, &clock, agent] {
        agent.note(to, size_t(box.bytes()), true);
        const int bytes = box.map.element_bytes(), swizzle = box.map.swizzle();
        box.each_element([&](uint32 at, const char* global) {
            char* const place = to - address + swizzled_address(address + at, swizzle);
            if (global) {
                std::memcpy(place, global, size_t(bytes));
            } else {
                std::memset(place, 0, size_t(bytes));
            }
        });
        agent.arrive(clock);
        count_bytes(b, clock, box.bytes());
    });
}

__forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64* barrier, int c0,
                                 int c1, int c2, int c3, uint64) {
    tma_load_4d(shared, map, barrier, c0, c1, c2, c3);
}

__forceinline__ void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2,
                                  int c3, uint64) {
    if (c0 < 0 || c1 < 0 || c2 < 0 || c3 < 0) emulator::fail("TMA store: a negative coordinate");
    const Box box = {*map, {c0, c1, c2, c3}};
    const uint32 address = shared_address(shared);
    const char* const from = box_in_shared(box, address, "TMA store");
    const emulator::Fiber* const fiber = emulator::current;
    emulator::current->stores.open.push_back([box, from, address, fiber] {
        emulator::note(*fiber, from, size_t(box.bytes()), false, true);
        const int bytes = box.map.element_bytes(), swizzle = box.map.swizzle();
        box.each_element([&](uint32 at, const char* global) {
            const char* const place = from - address + swizzled_address(address + at, swizzle);
            if (global) std::memcpy(const_cast<char*>(global), place, size_t(bytes));
        });
    });
}

__forceinline__ void tma_store_commit() { emulator::current->stores.close(); }
__forceinline__ void tma_store_wait() {
    const emulator::Inside inside;
    emulator::current->stores.finish_all_but(0);
}

}  // namespace flashcore
