// places.cuh - places in shared memory that are filled and emptied in turn, each guarded by a
// barrier per direction (see ptx_mbarrier.cuh).
#pragma once
#include <flashcore/ptx_mbarrier.cuh>

namespace flashcore {

// Full: what was copied has arrived. Empty: every user has read it.
template <int COUNT>
struct Places {
    uint64 full[COUNT], empty[COUNT];

    // By one thread. fillers, users: how many arrive each time.
    __device__ __forceinline__ void init(int fillers, int users) {
        for (int i = 0; i < COUNT; ++i) {
            mbarrier_init(&full[i], fillers);
            mbarrier_init(&empty[i], users);
        }
    }
};

}  // namespace flashcore
