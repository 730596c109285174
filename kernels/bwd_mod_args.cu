// bwd_mod_args.cu - the gradient of an array of mod_args. A CTA has an element, and adds up what
// the heads that read it contribute, in an order that is the same each time.
//
//   dx = sum of dT dt/dx    per query head and some queries from bwd_sm80.cu, launched before
//
// A warp takes every NUM_WARPS-th head of all batches, and asks whether one of the indices in
// score_mod is the element there.
#include <backward/block_sum.cuh>
#include <config.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/rules/mod_elements.cuh>
#include <flashcore/scheduler/work.cuh>

namespace flashcore {

struct ModArgsParams : BackwardParams {
    void* mod_gradient;  // of the array's shape, T
    int first_sum;       // of the array's elements in `distances`
};
static_assert(sizeof(ModArgsParams) == PARAMS_BYTES, "flashcore_cupy/select packs the same struct");

// The tile is that of bwd_sm80.cu: so many rows have one sum.
constexpr int ROWS_PER_SUM = BLOCK_M / WARPS_M;

// A lane's part of the sums that a head of a batch has left.
__device__ __forceinline__ float lane_sum(const ModArgsParams& p, int number, int batch, int head) {
    int64 first = statistics_row(p, VARLEN ? 0 : batch, head);
    int rows = p.seqlen_q;
    if constexpr (VARLEN) {
        const PackedBatch q = {p.cu_seqlens_q, p.batch, p.seqlen_q, 1, 1};
        first += q.start(batch + 1);
        rows = q.length(batch + 1);
    }
    first += (p.first_sum + number) * statistics_row(p, VARLEN ? 1 : p.batch, 0);
    float sum = 0.0f;
    for (int n = thread_index() % WARP_SIZE; n * ROWS_PER_SUM < rows; n += WARP_SIZE)
        sum += p.distances[first + n * ROWS_PER_SUM];
    return sum;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    bwd_mod_args(const __grid_constant__ ModArgsParams params) {
    SharedSums& smem = *reinterpret_cast<SharedSums*>(dynamic_shared<16>());
    const int element = block_index(), heads = params.batch * params.heads_q;
    float sum = 0.0f;
    for (int n = thread_index() / WARP_SIZE; n < heads; n += NUM_WARPS) {
        const int batch = n / params.heads_q, head = n % params.heads_q;
        const int number = element_at(element, batch, head);
        if (number < MOD_ELEMENTS) sum += lane_sum(params, number, batch, head);
    }
    sum = block_sum(smem, sum);
    T* const to = static_cast<T*>(params.mod_gradient) + element;
    if (thread_index() == 0) *to = from_float<T>(ACCUMULATES ? to_float(*to) + sum : sum);
}

}  // namespace flashcore
