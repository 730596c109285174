// mbarrier_pipeline.cuh - stages in shared memory that producers fill and consumers use, each
// guarded by two mbarriers (ptx/mbarrier.cuh).
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// full: the stage holds its data. empty: every consumer has read it, so it may be overwritten.
template <int STAGES>
struct Pipeline {
    uint64 full[STAGES], empty[STAGES];

    // One thread does this. producers, consumers: how many arrive per phase.
    __device__ __forceinline__ void init(int producers, int consumers) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(&full[i], producers);
            mbarrier_init(&empty[i], consumers);
        }
    }
};

// The pipeline state of a producer or a consumer: its next stage, and the parity of its round over
// the stages (0 in the first round, 1 in the second, 0 in the third ...).
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
    // Each consuming warp calls it once all of its lanes have read the stage; one lane arrives.
    __device__ __forceinline__ void release(Pipeline<STAGES>& pipeline) const {
        if (elect_one()) mbarrier_arrive(&pipeline.empty[stage]);
    }
};

}  // namespace flashcore
