// ptx/launches.cuh - launches of a stream that overlap (sm_90 and later): where the host allows it,
// a grid starts before the grid before it has ended.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

// Waits until all earlier grids of the stream have ended; what they wrote is there then. Before it,
// a thread touches no global memory but the parameters, not even to write.
__device__ __forceinline__ void griddepcontrol_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next grid may start when all thread blocks of this one have come here or ended.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace flashcore
