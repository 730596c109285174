// Probes of ptx/tma.cuh: one block.
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

#if __CUDA_ARCH__ >= 900

constexpr int BYTES = 256 * 128;  // the largest box: 256 rows of 128 bytes
constexpr uint32 POISON = 0xabababab;

// One box of box_bytes to shared memory that was full of poison, which is then copied out as it is.
// hint: 0 none, 1 EVICT_FIRST, 2 EVICT_LAST. words: BYTES / 4; state: the place modulo 1024, and
// whether all bytes came; a wait without end would tell less.
extern "C" __global__ void load_box(const __grid_constant__ TensorMap map, int c0, int c1, int c2,
                                    int c3, int box_bytes, int hint, uint32* words, uint32* state) {
    __shared__ __align__(1024) uint32 sBox[BYTES / 4];
    __shared__ uint64 barrier;
    const int thread = threadIdx.x;
    if (thread == 0) {
        prefetch_tensormap(&map);
        mbarrier_init(&barrier, 1);
        fence_mbarrier_init();
    }
    for (int i = thread; i < BYTES / 4; i += blockDim.x) sBox[i] = POISON;
    fence_proxy_async();
    block_sync();
    if (thread / WARP_SIZE == 0 && elect_one()) {
        mbarrier_arrive_expect_tx(&barrier, box_bytes);
        if (hint == 0) {
            tma_load_4d(sBox, &map, &barrier, c0, c1, c2, c3);
        } else {
            tma_load_4d(sBox, &map, &barrier, c0, c1, c2, c3, hint == 1 ? EVICT_FIRST : EVICT_LAST);
        }
    }
    bool done = false;
    for (int i = 0; i < 5000 && !done; ++i) done = mbarrier_try_wait(&barrier, 0);
    for (int i = thread; i < BYTES / 4; i += blockDim.x) words[i] = sBox[i];
    if (thread == 0) {
        state[0] = shared_address(sBox) % 1024;
        state[1] = done;
    }
}

// The other way: shared memory full of `words`, of which one box goes to the tensor.
extern "C" __global__ void store_box(const __grid_constant__ TensorMap map, int c0, int c1, int c2,
                                     int c3, const uint32* words) {
    __shared__ __align__(1024) uint32 sBox[BYTES / 4];
    const int thread = threadIdx.x;
    for (int i = thread; i < BYTES / 4; i += blockDim.x) sBox[i] = words[i];
    fence_proxy_async();
    block_sync();
    if (thread / WARP_SIZE == 0 && elect_one()) {
        tma_store_4d(&map, sBox, c0, c1, c2, c3, EVICT_FIRST);
        tma_store_commit();
        tma_store_wait();
    }
    block_sync();
    for (int i = thread; i < BYTES / 4; i += blockDim.x) sBox[i] = POISON;  // it is free again
}

// One warp: registers (32, 4) to four blocks of 8 rows of 16 bytes, which are 32 bytes apart.
extern "C" __global__ void store_matrices(const uint32* registers, uint32* blocks) {
    __shared__ __align__(16) uint32 sBlocks[32 * 8];
    const int lane = threadIdx.x;
    uint32 r[4];
    for (int i = 0; i < 4; ++i) r[i] = registers[lane * 4 + i];
    for (int i = 0; i < 8; ++i) sBlocks[lane * 8 + i] = POISON;
    warp_sync();
    stmatrix_x4(shared_address(sBlocks + lane * 8), r);
    warp_sync();
    for (int i = 0; i < 8; ++i) blocks[lane * 8 + i] = sBlocks[lane * 8 + i];
}

// 128 threads; elected: 128.
extern "C" __global__ void elections(int* elected) { elected[threadIdx.x] = elect_one(); }

#else
extern "C" __global__ void nothing() {}
#endif
