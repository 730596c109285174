// params_hopper.cuh - what the launcher hands to kernels that load by TMA.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/tma.cuh>

namespace flashcore {

struct alignas(64) HopperParams : AttentionParams {
    TensorMap q_map, k_map, v_map, o_map;  // v's begins at the first key that some query sees
};

}  // namespace flashcore
