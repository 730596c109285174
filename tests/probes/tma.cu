// Probes of ptx/tma.cuh: one block.
#include <flashcore/ptx/global.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

#if __CUDA_ARCH__ >= 900

constexpr int THREADS = 128;
constexpr int BYTES = 256 * 128;  // the largest box: 256 rows of 128 bytes
constexpr uint32 POISON = 0xabababab;

struct Shared {
    uint32 box[BYTES / 4];
    uint64 barrier;
};

// Boxes, the second `step` heads on and right after the first, to shared memory that was full of
// poison, which is then copied out as it is. hint: 0 none, 1 EVICT_FIRST, 2 EVICT_LAST. words:
// BYTES / 4; state: the place modulo 1024, and whether all bytes came; a wait without end would
// tell less.
extern "C" __global__ void load_boxes(const __grid_constant__ TensorMap map, int c0, int c1, int c2,
                                      int c3, int boxes, int step, int box_bytes, int hint,
                                      uint32* words, uint32* state) {
    Shared& s = *reinterpret_cast<Shared*>(dynamic_shared<1024>());
    const int thread = thread_index();
    if (thread == 0) {
        prefetch_tensormap(&map);
        mbarrier_init(&s.barrier, 1);
        fence_mbarrier_init();
    }
    for (int i = thread; i < BYTES / 4; i += THREADS) s.box[i] = POISON;
    fence_proxy_async();
    block_sync();
    if (thread / WARP_SIZE == 0 && elect_one()) {
        mbarrier_arrive_expect_tx(&s.barrier, boxes * box_bytes);
        for (int i = 0; i < boxes; ++i) {
            uint32* const place = s.box + i * box_bytes / 4;
            const int head = c2 + i * step;
            if (hint == 0) {
                tma_load_4d(place, &map, &s.barrier, c0, c1, head, c3);
            } else {
                const uint64 policy = hint == 1 ? EVICT_FIRST : EVICT_LAST;
                tma_load_4d(place, &map, &s.barrier, c0, c1, head, c3, policy);
            }
        }
    }
    bool done = false;
    for (int i = 0; i < 5000 && !done; ++i) done = mbarrier_try_wait(&s.barrier, 0);
    for (int i = thread; i < BYTES / 4; i += THREADS) words[i] = s.box[i];
    if (thread == 0) {
        state[0] = shared_address(s.box) % 1024;
        state[1] = done;
    }
}

// The other way: shared memory full of `words`, of which one box goes to the tensor.
extern "C" __global__ void store_box(const uint32* words, int c0, int c1, int c2, int c3,
                                     const __grid_constant__ TensorMap map) {
    Shared& s = *reinterpret_cast<Shared*>(dynamic_shared<1024>());
    const int thread = thread_index();
    for (int i = thread; i < BYTES / 4; i += THREADS) s.box[i] = words[i];
    fence_proxy_async();
    block_sync();
    if (thread / WARP_SIZE == 0 && elect_one()) {
        tma_store_4d(&map, s.box, c0, c1, c2, c3, EVICT_FIRST);
        tma_store_commit();
        tma_store_wait();
    }
    block_sync();
    for (int i = thread; i < BYTES / 4; i += THREADS) s.box[i] = POISON;  // it is free again
}

// One warp: registers (32, 4) to four blocks of 8 rows of 16 bytes, which are 32 bytes apart.
template <bool TRANSPOSED>
__device__ void store(const uint32* registers, uint32* blocks) {
    uint32* const sBlocks = reinterpret_cast<uint32*>(dynamic_shared<1024>());
    const int lane = thread_index();
    uint32 r[4];
    for (int i = 0; i < 4; ++i) r[i] = registers[lane * 4 + i];
    for (int i = 0; i < 8; ++i) sBlocks[lane * 8 + i] = POISON;
    warp_sync();
    if (TRANSPOSED) {
        stmatrix_x4_trans(shared_address(sBlocks + lane * 8), r);
    } else {
        stmatrix_x4(shared_address(sBlocks + lane * 8), r);
    }
    warp_sync();
    for (int i = 0; i < 8; ++i) blocks[lane * 8 + i] = sBlocks[lane * 8 + i];
}
extern "C" __global__ void store_matrices(const uint32* registers, uint32* blocks) {
    store<false>(registers, blocks);
}
extern "C" __global__ void store_transposed(const uint32* registers, uint32* blocks) {
    store<true>(registers, blocks);
}

// Any number of blocks of 32 threads, which all add to the same numbers, four a thread. x: (blocks,
// 128); sums: 128.
extern "C" __global__ void reductions(const float* x, float* sums) {
    const int first = thread_index() * 4;
    const float* const mine = x + block_index() * 128 + first;
    red_add(sums + first, float4{mine[0], mine[1], mine[2], mine[3]});
}

// 128 threads; elected: 128.
extern "C" __global__ void elections(int* elected) { elected[thread_index()] = elect_one(); }

#else
extern "C" __global__ void nothing() {}
#endif
