// ptx/wgmma.cuh on the CPU - products of four warps, made when a wait asks for them.
//
// Each warp makes its own 16 of the 64 rows. From the first wgmma to the wait the accumulators hold
// NaN, and what they are to hold is kept aside: a kernel that touches them too soon shows it. A and
// B are read from shared memory, and A's registers, when the product is made: whoever overwrites
// them too soon shows it, too.
#pragma once
#include <emulator/numbers.hpp>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

#include <map>

namespace flashcore {

constexpr int WARPGROUP_WARPS = 4;
constexpr int WARPGROUP_THREADS = WARPGROUP_WARPS * WARP_SIZE;

template <int SWIZZLE>
constexpr uint32 swizzled(uint32 offset) {
    static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32);
    return offset ^ (offset >> 3 & (SWIZZLE - 16));
}

template <int SWIZZLE>
constexpr uint64 matrix_layout(uint32 leading_bytes = 16, uint32 stride_bytes = 8 * SWIZZLE) {
    static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32);
    constexpr uint64 CODE = SWIZZLE == 128 ? 1 : SWIZZLE == 64 ? 2 : 3;
    return uint64(leading_bytes >> 4) << 16 | uint64(stride_bytes >> 4) << 32 | CODE << 62;
}
constexpr uint64 matrix_descriptor(uint64 layout, uint32 address) {
    return layout | (address & 0x3ffffu) >> 4;
}
constexpr uint64 advance_descriptor(uint64 descriptor, uint32 bytes) {
    return (descriptor & 0xffffffff00000000) | (uint32(descriptor) + (bytes >> 4));
}

// A matrix in shared memory, as its descriptor says.
struct SharedMatrix {
    char* smem;  // of the block, whose shared addresses begin at SHARED_BASE
    uint32 address, leading, stride;
    int swizzle;

    explicit SharedMatrix(uint64 descriptor)
        : smem(emulator::block().smem),
          address(uint32(descriptor & 0x3fff) << 4),
          leading(uint32(descriptor >> 16 & 0x3fff) << 4),
          stride(uint32(descriptor >> 32 & 0x3fff) << 4),
          swizzle(int(256 >> (descriptor >> 62))) {}

    // The whole of it, as a warp's first lane reads it now.
    void note_k_major(int first_row, int rows, const emulator::Fiber& fiber) const {
        for (int row = first_row; row < first_row + rows; ++row)
            for (int piece = 0; piece < 2; ++piece)
                emulator::note(
                    fiber, place(uint32(row / 8) * stride + uint32(row % 8 * swizzle + piece * 16)),
                    16, false, true);
    }
    void note_transposed(int columns, const emulator::Fiber& fiber) const {
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < columns; column += 8)
                emulator::note(
                    fiber,
                    place(uint32(column / (swizzle / 2)) * leading + uint32(k / 8) * stride +
                          uint32(k % 8 * swizzle + column % (swizzle / 2) * 2)),
                    16, false, true);
    }
    const char* place(uint32 offset) const {
        const uint32 plain = address + offset;
        return smem + (plain ^ (plain >> 3 & uint32(swizzle - 16))) - emulator::SHARED_BASE;
    }
    uint16 at(uint32 offset) const {
        const uint32 plain = address + offset;
        const uint32 place = plain ^ (plain >> 3 & uint32(swizzle - 16));
        uint16 bits;
        std::memcpy(&bits, smem + place - emulator::SHARED_BASE, 2);
        return bits;
    }
    // K-major: element k of a row of A, or of a column of B.
    uint16 k_major(int row, int k) const {
        return at(uint32(row / 8) * stride + uint32(row % 8 * swizzle + k * 2));
    }
    // Transposed: rows of k, panels of swizzle / 2 columns.
    uint16 transposed(int column, int k) const {
        const int columns = swizzle / 2;
        return at(uint32(column / columns) * leading + uint32(k / 8) * stride +
                  uint32(k % 8 * swizzle + column % columns * 2));
    }
};

// The accumulators of a warp's lanes while products are on their way.
struct InFlight {
    int pending = 0;
    float* of_lane[32];
    std::vector<float> kept[32];
};

inline std::map<float*, std::shared_ptr<InFlight>>& in_flight() {
    static thread_local std::map<float*, std::shared_ptr<InFlight>> all;
    return all;
}

inline std::shared_ptr<InFlight> take_accumulators(void** all, float* (*of)(void*), int count) {
    std::shared_ptr<InFlight>& found = in_flight()[of(all[0])];
    if (!found) {
        found = std::make_shared<InFlight>();
        for (int lane = 0; lane < 32; ++lane) {
            float* const d = found->of_lane[lane] = of(all[lane]);
            found->kept[lane].assign(d, d + count);
            for (int i = 0; i < count; ++i) d[i] = emulator::float_of(0x7fffffffu);
        }
    }
    ++found->pending;
    return found;
}

inline void give_back(const std::shared_ptr<InFlight>& d) {
    if (--d->pending > 0) return;
    in_flight().erase(d->of_lane[0]);
    for (int lane = 0; lane < 32; ++lane)
        std::memcpy(d->of_lane[lane], d->kept[lane].data(), d->kept[lane].size() * sizeof(float));
}

__forceinline__ void wgmma_fence() {
    emulator::collective("wgmma.fence", nullptr, [](void**) {});
}

__forceinline__ void wgmma_commit() {
    emulator::collective("wgmma.commit_group", nullptr,
                         [](void**) { emulator::warp().products.close(); });
}

template <int PENDING>
__forceinline__ void wgmma_wait() {
    emulator::collective("wgmma.wait_group", nullptr,
                         [](void**) { emulator::warp().products.finish_all_but(PENDING); });
}

template <int COUNT>
__forceinline__ void fence_registers(float (&)[COUNT]) {}
template <int COUNT>
__forceinline__ void fence_registers(uint32 (&)[COUNT]) {}

template <int COUNT>
__forceinline__ void registers_dec() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
}
template <int COUNT>
__forceinline__ void registers_inc() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
}

template <int N>
constexpr bool IS_WGMMA_WIDTH = N % 16 == 0 && N >= 16 && N <= 256;

struct WgmmaOperand {
    float* d;
    const uint32* a;  // null: a descriptor
};

template <typename T>
inline float to_number(uint16 bits) {
    return IS_BFLOAT16<T> ? emulator::bfloat16_to_float(bits) : emulator::half_to_float(bits);
}

// d += A B for this warp's 16 rows.
template <typename T, int N, bool TRANSPOSE_B>
void multiply(InFlight& d, const float (&a)[16][16], const SharedMatrix& b, bool accumulate) {
    static thread_local float columns[16][N];
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < N; ++n)
            columns[k][n] = to_number<T>(TRANSPOSE_B ? b.transposed(n, k) : b.k_major(n, k));
    for (int row = 0; row < 16; ++row) {
        double sum[N] = {};
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < N; ++n) sum[n] += double(a[row][k]) * columns[k][n];
        for (int n = 0; n < N; ++n) {
            float& x = d.kept[row % 8 * 4 + n % 8 / 2][size_t(n / 8 * 4 + row / 8 * 2 + n % 2)];
            x = float((accumulate ? double(x) : 0.0) + sum[n]);
        }
    }
}

template <typename T, int N, bool TRANSPOSE_B, typename ReadA, typename NoteA>
void start_product(void** all, uint64 b, bool accumulate, ReadA read_a, NoteA note_a) {
    const auto d = take_accumulators(
        all, [](void* operand) { return static_cast<WgmmaOperand*>(operand)->d; }, N / 2);
    const SharedMatrix matrix(b);
    const emulator::Fiber* const fiber = emulator::current;
    emulator::warp().products.open.push_back([=] {
        note_a(*fiber);
        if (TRANSPOSE_B) {
            matrix.note_transposed(N, *fiber);
        } else {
            matrix.note_k_major(0, N, *fiber);
        }
        float a[16][16];
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k) a[row][k] = to_number<T>(read_a(row, k));
        multiply<T, N, TRANSPOSE_B>(*d, a, matrix, accumulate);
        give_back(d);
    });
}

template <typename T, int N, bool TRANSPOSE_B = false>
__forceinline__ void wgmma(float (&d)[N / 2], uint64 a, uint64 b, bool accumulate) {
    static_assert(IS_WGMMA_WIDTH<N>);
    WgmmaOperand mine = {d, nullptr};
    emulator::collective("wgmma", &mine, [&](void** all) {
        const SharedMatrix matrix(a);
        const int first = emulator::current->thread / 32 % 4 * 16;
        start_product<T, N, TRANSPOSE_B>(
            all, b, accumulate, [=](int row, int k) { return matrix.k_major(first + row, k); },
            [=](const emulator::Fiber& fiber) { matrix.note_k_major(first, 16, fiber); });
    });
}

template <typename T, int N, bool TRANSPOSE_B = false>
__forceinline__ void wgmma(float (&d)[N / 2], const uint32 (&a)[4], uint64 b, bool accumulate) {
    static_assert(IS_WGMMA_WIDTH<N>);
    WgmmaOperand mine = {d, a};
    emulator::collective("wgmma", &mine, [&](void** all) {
        struct Registers {
            const uint32* of_lane[32];
        } registers;
        for (int lane = 0; lane < 32; ++lane)
            registers.of_lane[lane] = static_cast<WgmmaOperand*>(all[lane])->a;
        start_product<T, N, TRANSPOSE_B>(
            all, b, accumulate,
            [=](int row, int k) {
                const uint32 pair = registers.of_lane[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                return uint16(k % 2 ? pair >> 16 : pair);
            },
            [](const emulator::Fiber&) {});
    });
}

}  // namespace flashcore
