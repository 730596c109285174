// ptx/tma.cuh on the CPU - boxes of a tensor, copied sometime between the call and the barrier.
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

struct alignas(64) TensorMap {
    uint64 opaque[16];
};

constexpr uint64 EVICT_FIRST = 0x12F0000000000000;
constexpr uint64 EVICT_LAST = 0x14F0000000000000;

// It changes nothing but the time that the first copy takes.
__forceinline__ void prefetch_tensormap(const TensorMap*) {}

namespace twin {

// A map, as the host encodes it here: a tensor of four dimensions, the contiguous one first, and
// how much of it a box has.
struct Tensor {
    uint64 address;
    uint64 sizes[4];    // elements
    uint64 strides[3];  // bytes, of the last three dimensions
    uint64 boxes;       // elements, 16 bits for each dimension
    uint64 element_bytes_, swizzle_;

    uint64 size(int d) const { return sizes[d]; }
    uint64 stride(int d) const { return d == 0 ? element_bytes_ : strides[d - 1]; }
    int box(int d) const { return int(boxes >> 16 * d & 0xffff); }
    int element_bytes() const { return int(element_bytes_); }
    int swizzle() const { return int(swizzle_); }
};

// The box of a map at some coordinates, any of which may lie outside of the tensor. The map is
// copied: it is among the parameters of a thread, which may end before its copies do.
struct Box {
    Tensor map;
    int first[4];

    Box(const TensorMap* map, int c0, int c1, int c2, int c3) : first{c0, c1, c2, c3} {
        std::memcpy(&this->map, map, sizeof this->map);
    }

    int row_bytes() const { return map.box(0) * map.element_bytes(); }
    int bytes() const { return row_bytes() * map.box(1) * map.box(2) * map.box(3); }

    // For each row of the box: act(its number, where in the tensor it begins or would begin, which
    // of its bytes the tensor has, from `begin` to `end`).
    template <typename Act>
    __forceinline__ void each_row(Act act) const {
        const auto clamp = [&](long long x) {
            return int(min(max(x, 0ll), (long long)map.box(0)));
        };
        const int begin = clamp(-(long long)first[0]);
        const int end = clamp((long long)map.size(0) - first[0]);
        int row = 0;
        for (int i3 = 0; i3 < map.box(3); ++i3)
            for (int i2 = 0; i2 < map.box(2); ++i2)
                for (int i1 = 0; i1 < map.box(1); ++i1, ++row) {
                    const long long c[4] = {first[0], first[1] + i1, first[2] + i2, first[3] + i3};
                    bool is_inside = begin < end;
                    long long at = c[0] * map.element_bytes();
                    for (int d = 1; d < 4; ++d) {
                        is_inside = is_inside && c[d] >= 0 && uint64(c[d]) < map.size(d);
                        at += c[d] * (long long)map.stride(d);
                    }
                    char* const global = reinterpret_cast<char*>(map.address) + at;
                    act(row, global, is_inside ? begin * map.element_bytes() : 0,
                        is_inside ? end * map.element_bytes() : 0);
                }
    }
};

// In shared memory the rows of a box lie one after the other. The 16-byte pieces of a row are
// permuted: bits 4 and up of a piece's address are xored with bits 7 and up, as many as the swizzle
// says. So the same piece of eight rows side by side is in eight different groups of banks.
struct SharedBox {
    char* smem;  // where the shared address 0 would be
    uint32 address;
    int row_bytes, swizzle;

    char* piece(int row, int i) const {
        const uint32 plain = address + uint32(row * row_bytes + i * 16);
        return smem + (plain ^ (plain >> 3 & uint32(swizzle - 16)));
    }
};

__forceinline__ SharedBox box_in_shared(const Box& box, const void* shared, const char* what) {
    const emulator::Inside inside;
    const int swizzle = box.map.swizzle();
    if (box.row_bytes() != swizzle)
        emulator::fail("%s: rows of the box have %d bytes, the swizzle %d", what, box.row_bytes(),
                       swizzle);
    const int first = box.first[0] * box.map.element_bytes();
    if (first % 16)
        emulator::fail("%s: the box begins at byte %d of its rows, no multiple of 16", what, first);
    const uint32 address = shared_address(shared);
    char* const at = emulator::shared_pointer(address, box.bytes(), 8 * swizzle, what);
    return {at - address, address, box.row_bytes(), swizzle};
}

}  // namespace twin

// What lies outside of the tensor arrives as zeros. All bytes of the box count, wherever it lies.
__forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64* barrier, int c0,
                                 int c1, int c2, int c3) {
    const twin::Box box(map, c0, c1, c2, c3);
    const twin::SharedBox to = twin::box_in_shared(box, shared, "TMA load");
    twin::mbarrier(barrier, "TMA load");
    {
        const emulator::Inside inside;
        emulator::note_counted_write(barrier, shared, size_t(box.bytes()), true);
        box.each_row([](int, const char* global, int begin, int end) {
            if (begin < end)
                emulator::note_read(emulator::By::THREAD, global + begin, size_t(end - begin));
        });
    }
    emulator::start(emulator::Operation([=] {
        box.each_row([&](int row, const char* global, int begin, int end) {
            char bytes[128] = {};
            std::memcpy(bytes + begin, global + begin, size_t(end - begin));
            for (int i = 0; i < to.row_bytes / 16; ++i)
                std::memcpy(to.piece(row, i), bytes + i * 16, 16);
        });
        twin::count(barrier, 0, box.bytes());
    }));
}

// What L2 is to do with the lines, no result shows.
__forceinline__ void tma_load_4d(void* shared, const TensorMap* map, uint64* barrier, int c0,
                                 int c1, int c2, int c3, uint64) {
    tma_load_4d(shared, map, barrier, c0, c1, c2, c3);
}

// Only what lies inside of the tensor is written. Unlike a load, a store takes no negative
// coordinates.
__forceinline__ void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2,
                                  int c3, uint64) {
    if (c0 < 0 || c1 < 0 || c2 < 0 || c3 < 0) emulator::fail("TMA store: a negative coordinate");
    const twin::Box box(map, c0, c1, c2, c3);
    const twin::SharedBox from = twin::box_in_shared(box, shared, "TMA store");
    {
        const emulator::Inside inside;
        emulator::note_read(emulator::By::STORE, shared, size_t(box.bytes()));
        box.each_row([](int, const char* global, int begin, int end) {
            if (begin < end)
                emulator::note_write(emulator::By::STORE, global + begin, size_t(end - begin));
        });
    }
    emulator::start(emulator::Queue::STORES, emulator::Operation([=] {
                        box.each_row([&](int row, char* global, int begin, int end) {
                            char bytes[128];
                            for (int i = 0; i < from.row_bytes / 16; ++i)
                                std::memcpy(bytes + i * 16, from.piece(row, i), 16);
                            std::memcpy(global + begin, bytes + begin, size_t(end - begin));
                        });
                    }));
}

__forceinline__ void tma_store_commit() { emulator::close_group(emulator::Queue::STORES); }

// After it shared memory may be written again. That global memory has been written, it does not
// say.
__forceinline__ void tma_store_wait() { emulator::finish_all_but(emulator::Queue::STORES, 0); }

}  // namespace flashcore
