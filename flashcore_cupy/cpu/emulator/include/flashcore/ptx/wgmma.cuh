// ptx/wgmma.cuh on the CPU - products of four warps, each of which makes its own 16 of the 64 rows.
//
// A product is made sometime between its call and the wait for its group. Until then its
// accumulators hold NaN, and what they are to hold is kept aside: a kernel that touches them too
// soon shows it. A and B are read from shared memory, and A's registers, when the product is made:
// whoever overwrites them too soon shows it, too.
#pragma once
#include <emulator/numbers.hpp>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/types.cuh>

#ifdef EMULATOR_RUNTIME
#include <emulator/cluster.hpp>
#include <emulator/places.hpp>

#include <memory>
#endif

namespace flashcore {

constexpr int WARPGROUP_WARPS = 4;
constexpr int WARPGROUP_THREADS = WARPGROUP_WARPS * WARP_SIZE;

template <int SWIZZLE>
constexpr uint32 swizzled(uint32 offset) {
    static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32);
    return offset ^ (offset >> 3 & (SWIZZLE - 16));
}

// A descriptor: the address from bit 0 on, leading_bytes from bit 16 on, stride_bytes from bit 32
// on, 14 bits of each, without their lowest four; the swizzle from bit 62 on.
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

namespace twin {

// A matrix in shared memory, as its descriptor says: what lies at which place of it. The swizzle is
// of addresses, not of places: so a matrix may begin in the middle of a panel.
struct SharedMatrix {
    const char* smem;  // where the shared address 0 would be
    uint32 address, leading, stride;
    int swizzle;

    explicit SharedMatrix(uint64 descriptor)
        : smem(emulator::current().smem - emulator::SHARED_BASE),
          address(uint32(descriptor & 0x3fff) << 4),
          leading(uint32(descriptor >> 16 & 0x3fff) << 4),
          stride(uint32(descriptor >> 32 & 0x3fff) << 4),
          swizzle(int(256 >> (descriptor >> 62))) {}

    const char* at(uint32 place) const {
        const uint32 plain = address + place;
        return smem + (plain ^ (plain >> 3 & uint32(swizzle - 16)));
    }
    // K-major: k = 8 `half` and the next seven of a row of A, or of a column of B.
    const char* k_major(int row, int half) const {
        return at(uint32(row / 8) * stride + uint32(row % 8 * swizzle + half * 16));
    }
    // Transposed: eight columns of B, of one k. Panels are swizzle / 2 columns wide.
    const char* transposed(int column, int k) const {
        const int columns = swizzle / 2;
        return at(uint32(column / columns) * leading + uint32(k / 8) * stride +
                  uint32(k % 8 * swizzle + column % columns * 2));
    }
};

}  // namespace twin

// Whatever a thread has done to registers before comes before the wgmmas that use them. Without it
// they may find what was there before.
__forceinline__ void wgmma_fence() {
    emulator::fence_for_products();
    emulator::collective("wgmma.fence", nullptr, [](void**) {});
}

__forceinline__ void wgmma_commit() {
    emulator::collective("wgmma.commit_group", nullptr,
                         [](void**) { emulator::close_group(emulator::Queue::PRODUCTS); });
}

template <int PENDING>
__forceinline__ void wgmma_wait() {
    emulator::collective("wgmma.wait_group", nullptr, [](void**) {
        emulator::finish_all_but(emulator::Queue::PRODUCTS, PENDING);
    });
}

// A CPU's compiler knows that a wgmma reads and writes memory, as registers are here.
template <int COUNT>
__forceinline__ void fence_registers(float (&)[COUNT]) {}
template <int COUNT>
__forceinline__ void fence_registers(uint32 (&)[COUNT]) {}

// They hold NaN: whoever reads them all the same shows it.
template <int COUNT>
__forceinline__ void forget_registers(float (&r)[COUNT]) {
    for (float& x : r) x = __builtin_nanf("");
}

// Here a thread has as many as it wants. They are counted all the same: see setmaxnreg.cpp.
template <int COUNT>
__forceinline__ void registers_dec() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    emulator::give_registers(COUNT);
}
template <int COUNT>
__forceinline__ void registers_inc() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256);
    emulator::take_registers(COUNT);
}

// ---- the instruction ---------------------------------------------------------------------------

namespace twin {

// What a lane brings: its accumulators; and of A its registers or the descriptor.
struct WgmmaOperand {
    float* d;
    const uint32* a;
    uint64 descriptor_a, descriptor_b;
    int n;
    bool is_transposed, accumulates;
};
template <typename T>
void start_product(void** all);

}  // namespace twin

template <int N>
constexpr bool IS_WGMMA_WIDTH = N % 16 == 0 && N >= 16 && N <= 256;

template <typename T, int N, bool TRANSPOSE_B = false>
__forceinline__ void wgmma(float (&d)[N / 2], uint64 a, uint64 b, bool accumulate) {
    static_assert(IS_WGMMA_WIDTH<N>);
    emulator::note_registers(d, sizeof d);
    twin::WgmmaOperand mine = {d, nullptr, a, b, N, TRANSPOSE_B, accumulate};
    emulator::collective("wgmma", &mine, twin::start_product<T>);
}
template <typename T, int N, bool TRANSPOSE_B = false>
__forceinline__ void wgmma(float (&d)[N / 2], const uint32 (&a)[4], uint64 b, bool accumulate) {
    static_assert(IS_WGMMA_WIDTH<N>);
    emulator::note_registers(d, sizeof d);
    emulator::note_registers(a, sizeof a);
    twin::WgmmaOperand mine = {d, a, 0, b, N, TRANSPOSE_B, accumulate};
    emulator::collective("wgmma", &mine, twin::start_product<T>);
}

// ---- how a product is made ---------------------------------------------------------------------

namespace twin {

#ifdef EMULATOR_RUNTIME

using Accumulators = std::shared_ptr<emulator::Accumulators>;

// From now on the accumulators hold NaN. Products that are under way already share them.
inline Accumulators take(void** all) {
    const auto of = [&](int lane) { return static_cast<const WgmmaOperand*>(all[lane]); };
    Accumulators& found = emulator::fiber().warp->accumulators[of(0)->d];
    if (!found) {
        found = std::make_shared<emulator::Accumulators>();
        for (int lane = 0; lane < 32; ++lane) {
            float* const d = found->of_lane[lane] = of(lane)->d;
            found->kept[lane].assign(d, d + of(lane)->n / 2);
            std::fill_n(d, of(lane)->n / 2, emulator::float_of(0x7fffffffu));
        }
    }
    ++found->pending;
    return found;
}

struct Product {
    emulator::Warp* warp;
    Accumulators d;
    const uint32* registers_a[32];  // or null
    SharedMatrix a, b;
    int n, first_row;
    bool is_transposed, accumulates;

    // What it reads of shared memory.
    void note() const {
        for (int row = first_row; !registers_a[0] && row < first_row + 16; ++row)
            for (int half = 0; half < 2; ++half) note(a.k_major(row, half));
        for (int column = 0; !is_transposed && column < n; ++column)
            for (int half = 0; half < 2; ++half) note(b.k_major(column, half));
        for (int k = 0; is_transposed && k < 16; ++k)
            for (int column = 0; column < n; column += 8) note(b.transposed(column, k));
    }

    template <typename T>
    void make() const {
        float x[16][16], y[16][256];
        read_a<T>(x);
        read_b<T>(y);
        for (int row = 0; row < 16; ++row) {
            double sum[256] = {};
            for (int k = 0; k < 16; ++k)
                for (int c = 0; c < n; ++c) sum[c] += double(x[row][k]) * y[k][c];
            for (int c = 0; c < n; ++c) {
                // Lane l has columns 2 (l % 4) and the next one of each eight.
                float& of =
                    d->kept[row % 8 * 4 + c % 8 / 2][size_t(c / 8 * 4 + row / 8 * 2 + c % 2)];
                of = float((accumulates ? double(of) : 0.0) + sum[c]);
            }
        }
        if (--d->pending > 0) return;
        warp->accumulators.erase(d->of_lane[0]);
        for (int lane = 0; lane < 32; ++lane)
            std::copy(d->kept[lane].begin(), d->kept[lane].end(), d->of_lane[lane]);
    }

  private:
    static void note(const char* piece) {
        const emulator::Fiber& f = emulator::fiber();
        const auto offset = piece - f.smem;
        if (offset < 0 || offset + 16 > f.owner->smem_bytes)
            emulator::fail_with(emulator::name_of(f) + ": wgmma: an operand reaches beyond the " +
                                std::to_string(f.owner->smem_bytes) + " bytes of shared memory" +
                                emulator::at_line(f.place));
        emulator::note_read(emulator::By::PRODUCT, piece, 16);
    }

    template <typename T>
    static void read_piece(const char* piece, float* to, int step) {
        uint16 bits[8];
        std::memcpy(bits, piece, 16);
        for (int i = 0; i < 8; ++i) to[i * step] = element<T>(bits[i], 0);
    }
    // This warp's rows of A. In registers they lie as those of mma.m16n8k16.
    template <typename T>
    void read_a(float (&x)[16][16]) const {
        for (int row = 0; row < 16; ++row) {
            for (int half = 0; !registers_a[0] && half < 2; ++half)
                read_piece<T>(a.k_major(first_row + row, half), &x[row][half * 8], 1);
            for (int k = 0; registers_a[0] && k < 16; ++k)
                x[row][k] =
                    element<T>(registers_a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
        }
    }
    template <typename T>
    void read_b(float (&y)[16][256]) const {
        for (int column = 0; !is_transposed && column < n; ++column)
            for (int half = 0; half < 2; ++half)
                read_piece<T>(b.k_major(column, half), &y[half * 8][column], 256);
        for (int k = 0; is_transposed && k < 16; ++k)
            for (int column = 0; column < n; column += 8)
                read_piece<T>(b.transposed(column, k), &y[k][column], 1);
    }
};

template <typename T>
void start_product(void** all) {
    const emulator::Fiber& f = emulator::fiber();
    const auto& mine = *static_cast<const WgmmaOperand*>(all[0]);
    auto* const product = new Product{f.warp,
                                      take(all),
                                      {},
                                      SharedMatrix(mine.descriptor_a),
                                      SharedMatrix(mine.descriptor_b),
                                      mine.n,
                                      f.index / 32 % 4 * 16,
                                      mine.is_transposed,
                                      mine.accumulates};
    for (int lane = 0; lane < 32; ++lane)
        product->registers_a[lane] = static_cast<const WgmmaOperand*>(all[lane])->a;
    product->note();
    emulator::start(emulator::Queue::PRODUCTS, emulator::Operation([product] {
                        product->make<T>();
                        delete product;
                    }));
}
template void start_product<half_t>(void**);
template void start_product<bfloat16_t>(void**);

#endif

}  // namespace twin

}  // namespace flashcore
