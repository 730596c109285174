// mbarrier_pipeline.cuh - stages in shared memory that producers fill and consumers use, each
// guarded by two mbarriers (ptx/mbarrier.cuh).
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// full: what was copied to the stage has arrived. empty: every consumer has read it.
template <int STAGES>
struct Pipeline {
    uint64 full[STAGES], empty[STAGES];

    // One thread does this. producers, consumers: how many arrive each time.
    __device__ __forceinline__ void init(int producers, int consumers) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(&full[i], producers);
            mbarrier_init(&empty[i], consumers);
        }
    }
};

// The stage that a producer or a consumer comes to next. It has come to stage 0 as often as it has
// come to all of them; `parity` says whether that number is odd.
template <int STAGES>
struct PipelineState {
    int stage = 0;
    uint32 parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ void wait_full(Pipeline<STAGES>& pipeline) const {
        mbarrier_wait(&pipeline.full[stage], parity);
    }
    __device__ __forceinline__ void wait_empty(Pipeline<STAGES>& pipeline) const {
        mbarrier_wait(&pipeline.empty[stage], parity ^ 1);
    }
    // Every consuming warp does this when all of its lanes have read the stage.
    __device__ __forceinline__ void release(Pipeline<STAGES>& pipeline) const {
        if (elect_one()) mbarrier_arrive(&pipeline.empty[stage]);
    }
};

}  // namespace flashcore
