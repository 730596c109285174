// Probe of ptx/launches.cuh: a launch that may overlap with the one before it. Blocks of 64 threads.
#include <flashcore/ptx/launches.cuh>
#include <flashcore/ptx/thread.cuh>

using namespace flashcore;

#if __CUDA_ARCH__ >= 900

// y = x + 1, late in its life: a launch behind it that does not wait reads what was there before.
extern "C" __global__ void add_one(const float* x, float* y) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const int i = block_index() * 64 + thread_index();
    const float value = x[i];
    __nanosleep(20000);
    y[i] = value + 1.0f;
}

#else
extern "C" __global__ void nothing() {}
#endif
