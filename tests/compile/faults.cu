// faults.cu - kernels with a fault each, for test_races.py: what a checking build says of them.
//
// Each is there twice, as right_* and as wrong_*. x: 1024 floats; y: the same, as 32 rows of 32
// with gaps behind each; n: 64 counters, which are 0.
#include <flashcore/ptx/cluster.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>

using namespace flashcore;

#define FAULT(name)                                                             \
    template <bool RIGHT>                                                       \
    __device__ __forceinline__ void name(const float* x, float* y, int* n);     \
    extern "C" __global__ void right_##name(const float* x, float* y, int* n) { \
        name<true>(x, y, n);                                                    \
    }                                                                           \
    extern "C" __global__ void wrong_##name(const float* x, float* y, int* n) { \
        name<false>(x, y, n);                                                   \
    }                                                                           \
    template <bool RIGHT>                                                       \
    __device__ __forceinline__ void name([[maybe_unused]] const float* x,       \
                                         [[maybe_unused]] float* y, [[maybe_unused]] int* n)

constexpr int ROW = 40;  // from one row of y to the next

__device__ __forceinline__ float* numbers() {
    return reinterpret_cast<float*>(dynamic_shared<128>());
}
__device__ __forceinline__ uint64* barriers() {
    return reinterpret_cast<uint64*>(dynamic_shared<128>() + 8192);
}
__device__ __forceinline__ float& result(float* y) {
    return y[thread_index() / 32 * ROW + thread_index() % 32];
}

// ---- shared memory and what orders it: one block of 64 threads ---------------------------------

// A number for each thread, of which all know. Each thread writes another one.
__device__ __forceinline__ float* written_numbers() {
    float* const s = numbers();
    s[thread_index()] = 0.0f;
    block_sync();
    s[thread_index()] = 1.0f;
    return s;
}

FAULT(threads) {
    const float* const s = written_numbers();
    if (RIGHT) block_sync();
    result(y) = s[(thread_index() + 32) % 64];
}

FAULT(lanes) {
    const float* const s = written_numbers();
    if (RIGHT) warp_sync();
    result(y) = s[thread_index() ^ 1];
}

// A shuffle brings the lanes together, but orders nothing.
FAULT(shuffle) {
    const float* const s = written_numbers();
    if (RIGHT) warp_sync();
    shfl(0, 0);
    result(y) = s[thread_index() ^ 1];
}

// Lanes read the same number, some of them after they have told others of what they did before.
// Then one of them writes it.
FAULT(readers) {
    float* const s = numbers();
    if (thread_index() == 0) s[0] = 1.0f;
    if (thread_index() == 0) mbarrier_init(barriers(), 32);
    if (thread_index() == 0) mbarrier_init(barriers() + 1, 32);
    block_sync();
    if (thread_index() >= 32) return;
    if (thread_index() % 2) mbarrier_arrive(barriers());
    result(y) = s[0];
    if (RIGHT) mbarrier_arrive(barriers() + 1);
    if (RIGHT) mbarrier_wait(barriers() + 1, 0);
    if (thread_index() == 3) s[0] = 2.0f;
}

// Who arrives without waiting knows of nobody.
FAULT(named) {
    float* const s = written_numbers();
    if (thread_index() >= 32) {
        named_barrier_sync(1, 64);
        result(y) = s[thread_index() - 32];
        s[thread_index()] = 2.0f;
    } else {
        named_barrier_arrive(1, 64);
        result(y) = RIGHT ? 0.0f : s[thread_index() + 32];
    }
}

// Two warps, by turns. Who does not wait for its turn comes twice to the round of the other one.
FAULT(turns) {
    const int warp = thread_index() / 32;
    if (warp == 1) named_barrier_arrive(1, 64);
    for (int i = 0; i < 3; ++i) {
        if (RIGHT || warp == 0) named_barrier_sync(1 + warp, 64);
        named_barrier_arrive(2 - warp, 64);
    }
    result(y) = 0.0f;
}

FAULT(pipeline) {
    const float* const s = written_numbers();
    if (thread_index() == 0) mbarrier_init(barriers(), 32);
    block_sync();
    numbers()[thread_index()] = 2.0f;
    if (thread_index() < 32) {
        mbarrier_arrive(barriers());
        result(y) = 0.0f;
    } else {
        if (RIGHT) mbarrier_wait(barriers(), 0);
        result(y) = s[thread_index() - 32];
    }
}

FAULT(new_barrier) {
    if (thread_index() == 0) mbarrier_init(barriers(), 64);
    if (RIGHT) block_sync();
    mbarrier_arrive(barriers());
    mbarrier_wait(barriers(), 0);
}

FAULT(remade_barrier) {
    if (thread_index() > 0) return;
    mbarrier_init(barriers(), 1);
    mbarrier_init(barriers() + (RIGHT ? 1 : 0), 1);
}

FAULT(overwritten_barrier) {
    if (thread_index() > 0) return;
    mbarrier_init(barriers(), 1);
    reinterpret_cast<float*>(barriers())[RIGHT ? 2 : 1] = 0.0f;
}

FAULT(bytes) {
    if (thread_index() == 0) {
        mbarrier_init(barriers(), 1);
        mbarrier_arrive_expect_tx(barriers(), RIGHT ? 0 : 4096);
    }
    block_sync();
    mbarrier_wait(barriers(), 0);
}

FAULT(arrivals) {
    if (thread_index() == 0) mbarrier_init(barriers(), RIGHT ? 64 : 65);
    block_sync();
    mbarrier_arrive(barriers());
    if (thread_index() < 32) mbarrier_wait(barriers(), 0);
    block_sync();
}

FAULT(unwritten) {
    float* const s = numbers();
    if (RIGHT || thread_index() < 63) s[thread_index()] = 1.0f;
    block_sync();
    result(y) = s[63 - thread_index()];
}

// All store the same: that is no race.
FAULT(same_value) {
    float* const s = numbers();
    s[0] = RIGHT ? 1.0f : float(thread_index());
    block_sync();
    result(y) = s[0];
}

// Rows of 128 bytes lie in the same banks all of them; rows of 144 bytes in different ones.
FAULT(banks) {
    for (int i = 0; i < 18; ++i) numbers()[i * 64 + thread_index()] = 1.0f;
    block_sync();
    uint32 r[4];
    ldmatrix_x4(r, shared_address(numbers() + thread_index() % 32 * (RIGHT ? 36 : 32)));
    result(y) = float(r[0]);
}

// ---- copies ------------------------------------------------------------------------------------

FAULT(copy) {
    float* const s = numbers();
    cp_async_4(shared_address(s + thread_index()), x + thread_index(), 4);
    cp_async_commit();
    if (RIGHT) cp_async_wait<0>();
    result(y) = s[thread_index()];
    cp_async_wait<0>();
}

// The thread has waited, but others do not know of it.
FAULT(copies_of_others) {
    float* const s = numbers();
    cp_async_4(shared_address(s + thread_index()), x + thread_index(), 4);
    cp_async_commit();
    cp_async_wait<0>();
    if (RIGHT) block_sync();
    result(y) = s[63 - thread_index()];
}

FAULT(counted_copies) {
    float* const s = numbers();
    if (thread_index() == 0) mbarrier_init(barriers(), 64);
    block_sync();
    cp_async_4(shared_address(s + thread_index()), x + thread_index(), 4);
    if (RIGHT) mbarrier_arrive_copied(barriers());
    if (!RIGHT) mbarrier_arrive(barriers());
    mbarrier_wait(barriers(), 0);
    result(y) = s[63 - thread_index()];
}

// ---- global memory: two blocks of 64 threads ---------------------------------------------------

FAULT(beyond) { result(y) = x[thread_index() + (RIGHT ? 0 : 1000)]; }
FAULT(before) { result(y) = x[int(thread_index()) - (RIGHT ? 0 : 1)]; }
FAULT(between) { y[thread_index() % 32 * ROW + (RIGHT ? 31 : 32)] = 1.0f; }
FAULT(nowhere) {
    result(y) = *(RIGHT ? x : reinterpret_cast<const float*>(uint64(thread_index()) << 4));
}
FAULT(input) {
    if (!RIGHT) const_cast<float*>(x)[thread_index()] = 1.0f;
}
FAULT(copy_beyond) {
    const int last = RIGHT ? 1016 : 1024;
    cp_async_16(shared_address(numbers() + thread_index() * 4), x + last, 16);
    cp_async_wait<0>();
}
FAULT(misaligned) {
    const uint64 two = *reinterpret_cast<const uint64*>(x + (RIGHT ? 4 : 5));
    result(y) = float(two);
}
FAULT(unwritten_output) {
    if (RIGHT) result(y) = 1.0f;
    n[thread_index()] = int(result(y));
}

FAULT(blocks) {
    if (block_index() == 0 || !RIGHT) y[thread_index() % 32] = float(block_index());
}

// The last one to come adds up what all have left. Without a fence on both sides it may find what
// was there before.
FAULT(fences) {
    float* const mine =
        y + thread_index() / 32 * ROW + thread_index() % 32 + block_index() * 2 * ROW;
    *mine = x[thread_index()];
    if (RIGHT) fence_gpu();
    if (atomic_add(n + thread_index(), 1) + 1 < int(grid_size())) return;
    fence_gpu();
    *mine = y[thread_index() / 32 * ROW + thread_index() % 32] +
            y[thread_index() / 32 * ROW + thread_index() % 32 + 2 * ROW];
}
FAULT(second_fence) {
    float* const mine =
        y + thread_index() / 32 * ROW + thread_index() % 32 + block_index() * 2 * ROW;
    *mine = x[thread_index()];
    fence_gpu();
    if (atomic_add(n + thread_index(), 1) + 1 < int(grid_size())) return;
    if (RIGHT) fence_gpu();
    *mine = y[thread_index() / 32 * ROW + thread_index() % 32] +
            y[thread_index() / 32 * ROW + thread_index() % 32 + 2 * ROW];
}

// ---- what C++ leaves undefined, or would end the process ---------------------------------------

FAULT(division) { n[thread_index()] = 7 / (RIGHT ? 1 : n[thread_index()]); }
FAULT(overflow) { n[thread_index()] = (n[thread_index()] + (RIGHT ? 1 : 1 << 30)) * 2; }
FAULT(index) {
    int four[4] = {1, 2, 3, 4};
    n[thread_index()] = four[thread_index() / (RIGHT ? 16 : 8)];
}
FAULT(address) {
    float* const far = reinterpret_cast<float*>(uint64(1) << 44);
    *(RIGHT ? &result(y) : far + thread_index()) = 1.0f;
}
FAULT(copy_from_nowhere) {
    const float* const far = reinterpret_cast<const float*>(uint64(1) << 44);
    cp_async_16(shared_address(numbers() + thread_index() * 4), RIGHT ? x : far, 16);
    cp_async_wait<0>();
}

// ---- a cluster of two blocks -------------------------------------------------------------------

FAULT(peers) {
    float2* const s = reinterpret_cast<float2*>(numbers());
    s[thread_index()] = {1.0f, 2.0f};
    if (RIGHT) cluster_sync();
    float2 got;
    load_peer(got, peer_address(shared_address(s + thread_index()), 1 - cluster_rank()));
    result(y) = got.x;
    cluster_sync();
}

FAULT(barrier_elsewhere) {
    if (thread_index() == 0) {
        mbarrier_init(barriers(), 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(barriers(), sizeof(float4));
    }
    cluster_sync();
    const int peer = 1 - cluster_rank();
    const uint32 to = peer_address(shared_address(numbers()), peer);
    const uint32 barrier = peer_address(shared_address(barriers()), RIGHT ? peer : cluster_rank());
    if (thread_index() == 0) store_peer_async(to, float4{1.0f, 2.0f, 3.0f, 4.0f}, barrier);
    mbarrier_wait(barriers(), 0);
    result(y) = numbers()[thread_index() % 4];
}

FAULT(end_of_a_block) {
    float2* const s = reinterpret_cast<float2*>(numbers());
    s[thread_index()] = {1.0f, 2.0f};
    cluster_sync();
    float2 got;
    load_peer(got, peer_address(shared_address(s + thread_index()), 1 - cluster_rank()));
    if (block_index() == 0) result(y) = got.x;
    if (RIGHT) cluster_sync_relaxed();
}

// ---- wgmma: one block of 128 threads -----------------------------------------------------------

constexpr uint64 LAYOUT = matrix_layout<128>();

struct Products {
    half_t* a;  // 64 rows of 128 bytes
    half_t* b;  // 16 of them
    float d[8] = {};

    __device__ __forceinline__ Products()
        : a(reinterpret_cast<half_t*>(dynamic_shared<1024>())), b(a + 64 * 64) {
        for (int i = thread_index(); i < 80 * 64; i += 128) a[i] = {0x3c00};
    }
    __device__ __forceinline__ void start() {
        wgmma<half_t, 16>(d, matrix_descriptor(LAYOUT, shared_address(a)),
                          matrix_descriptor(LAYOUT, shared_address(b)), true);
        wgmma_commit();
    }
};

FAULT(accumulators) {
    Products p;
    fence_proxy_async();
    block_sync();
    wgmma_fence();
    p.start();
    if (RIGHT) wgmma_wait<0>();
    y[thread_index() % 32] = RIGHT ? 16.0f : p.d[0];
    wgmma_wait<0>();
}

FAULT(wgmma_fence) {
    Products p;
    fence_proxy_async();
    block_sync();
    wgmma_fence();
    p.start();
    wgmma_wait<0>();
    p.d[1] += 1.0f;
    if (RIGHT) flashcore::wgmma_fence();
    p.start();
    wgmma_wait<0>();
}

FAULT(first_fence) {
    Products p;
    fence_proxy_async();
    block_sync();
    if (RIGHT) flashcore::wgmma_fence();
    p.start();
    wgmma_wait<0>();
}

FAULT(operands) {
    Products p;
    fence_proxy_async();
    block_sync();
    flashcore::wgmma_fence();
    p.start();
    if (RIGHT) wgmma_wait<0>();
    if (RIGHT) block_sync();
    p.a[thread_index()] = {0};
    wgmma_wait<0>();
}

FAULT(operands_beyond) {
    Products p;
    if (!RIGHT) p.b += 56 * 64;  // 8 rows before the end
    for (int i = thread_index(); i < 8 * 64; i += 128) p.b[i] = {0x3c00};
    fence_proxy_async();
    block_sync();
    flashcore::wgmma_fence();
    p.start();
    wgmma_wait<0>();
}

// 384 threads of 168 registers each at first: 240 for two warpgroups leave 24 for the third.
FAULT(registers) {
    if (thread_index() < WARPGROUP_THREADS) {
        registers_dec<RIGHT ? 24 : 32>();
    } else {
        registers_inc<240>();
    }
    result(y) = 1.0f;
}

FAULT(proxies) {
    Products p;
    if (RIGHT) fence_proxy_async();
    block_sync();
    flashcore::wgmma_fence();
    p.start();
    wgmma_wait<0>();
}

// ---- TMA: one block of 32 threads. map: 32 rows of 32 floats, swizzled by 128 bytes ------------

#define TMA_FAULT(name)                                                                        \
    template <bool RIGHT>                                                                      \
    __device__ __forceinline__ void name(const TensorMap* map, float* y);                      \
    extern "C" __global__ void right_##name(const __grid_constant__ TensorMap map, float* y) { \
        name<true>(&map, y);                                                                   \
    }                                                                                          \
    extern "C" __global__ void wrong_##name(const __grid_constant__ TensorMap map, float* y) { \
        name<false>(&map, y);                                                                  \
    }                                                                                          \
    template <bool RIGHT>                                                                      \
    __device__ __forceinline__ void name([[maybe_unused]] const TensorMap* map,                \
                                         [[maybe_unused]] float* y)

constexpr int TILE = 32 * 32 * 4;  // bytes

__device__ __forceinline__ void load(const TensorMap* map, int bytes = TILE, int column = 0) {
    if (thread_index() == 0) {
        mbarrier_init(barriers(), 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(barriers(), uint32(bytes));
        tma_load_4d(numbers(), map, barriers(), column, 0, 0, 0);
    }
    block_sync();
}

TMA_FAULT(load_between_pieces) {
    load(map, TILE, RIGHT ? 4 : 5);
    mbarrier_wait(barriers(), 0);
}

TMA_FAULT(load_too_soon) {
    load(map);
    if (RIGHT) mbarrier_wait(barriers(), 0);
    result(y) = numbers()[thread_index()];
    mbarrier_wait(barriers(), 0);
}

TMA_FAULT(load_never_complete) {
    load(map, RIGHT ? TILE : TILE + 16);
    mbarrier_wait(barriers(), 0);
}

TMA_FAULT(load_outlives_block) {
    load(map);
    if (RIGHT) mbarrier_wait(barriers(), 0);
}

TMA_FAULT(load_over_readers) {
    load(map);
    mbarrier_wait(barriers(), 0);
    result(y) = numbers()[thread_index()];
    fence_proxy_async();
    if (RIGHT) block_sync();
    if (thread_index() == 0) {
        mbarrier_arrive_expect_tx(barriers(), TILE);
        tma_load_4d(numbers(), map, barriers(), 0, 0, 0, 0);
    }
    mbarrier_wait(barriers(), 1);
}

TMA_FAULT(new_barrier_unseen) {
    if (thread_index() == 0) {
        mbarrier_init(barriers(), 1);
        if (RIGHT) fence_mbarrier_init();
        mbarrier_arrive_expect_tx(barriers(), TILE);
        tma_load_4d(numbers(), map, barriers(), 0, 0, 0, 0);
        mbarrier_wait(barriers(), 0);
    }
}

// A lane's numbers go to shared memory; one lane has TMA store them all.
template <bool FENCE, bool SYNC, bool WAIT>
__device__ __forceinline__ void store(const TensorMap* map) {
    for (int row = 0; row < 32; ++row) numbers()[row * 32 + thread_index()] = 1.0f;
    if (FENCE) fence_proxy_async();
    if (SYNC) warp_sync();
    if (thread_index() > 0) return;
    tma_store_4d(map, numbers(), 0, 0, 0, 0, EVICT_FIRST);
    tma_store_commit();
    if (WAIT) tma_store_wait();
}
TMA_FAULT(store_unseen) { store<RIGHT, true, true>(map); }
TMA_FAULT(store_too_soon) { store<true, RIGHT, true>(map); }
TMA_FAULT(store_outlives_thread) { store<true, true, RIGHT>(map); }
