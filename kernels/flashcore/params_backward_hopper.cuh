// params_backward_hopper.cuh - what the launcher hands to backward kernels that load by TMA.
#pragma once
#include <flashcore/params_backward.cuh>
#include <flashcore/ptx/tma.cuh>

namespace flashcore {

// The maps of the side that is walked over begin at the first row that meets any of the other side,
// and end behind the last.
struct alignas(64) HopperBackwardParams : BackwardParams {
    TensorMap q_map, k_map, v_map, dout_map;
};

}  // namespace flashcore
