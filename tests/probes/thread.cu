// Probes of ptx/thread.cuh: blocks of 64 threads, 4 bytes of shared memory for each.
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>

using namespace flashcore;

// Its own numbers of each thread, the size of the grid and the target.
extern "C" __global__ void numbers(int* thread, int* anew, int* block, int* grid, int* arch) {
    const int i = block_index() * 64 + thread_index();
    thread[i] = thread_index();
    anew[i] = thread_index_volatile();
    block[i] = block_index();
    grid[i] = grid_size();
    arch[i] = CUDA_ARCH;
}

// A pointer that is kept is the same.
extern "C" __global__ void kept(int* x) {
    int* own = x + block_index() * 64 + thread_index();
    keep_register(own);
    *own = thread_index();
}

// Through the shared memory of the launch, backwards within the warp; and how far that begins from
// a multiple of 128 bytes.
extern "C" __global__ void through_shared(const int* x, int* y, int* misplaced) {
    int* const sX = reinterpret_cast<int*>(dynamic_shared<128>());
    const int thread = thread_index(), i = block_index() * 64 + thread;
    sX[thread] = x[i];
    warp_sync();
    y[i] = sX[thread ^ 31];
    misplaced[i] = shared_address(sX) % 128;
}
