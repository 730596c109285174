// bwd_heads.cu - the gradients that every query head has one number of: a sink's logit, an ALiBi
// slope. A CTA has a head, and adds up what its queries contribute, in an order that is the same
// each time.
//
//   dsink  = -sum of exp(sink - LSE) D      the sink's probability has no value: dP = 0
//   dslope = -sum of dT |position - key|    per query from bwd_sm80.cu, launched before
#include <backward/block_sum.cuh>
#include <config.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/scheduler/work.cuh>

namespace flashcore {

static_assert(sizeof(BackwardParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

__device__ __forceinline__ void store(float* to, float x) {
    if (thread_index() == 0) *to = ACCUMULATES ? *to + x : x;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    bwd_heads(const __grid_constant__ BackwardParams params) {
    SharedSums& smem = *reinterpret_cast<SharedSums*>(dynamic_shared<16>());
    const BackwardParams& p = params;
    const int head = block_index();
    const float sink = p.dsink != nullptr ? p.sink[head] * LOG2_E : 0.0f;
    const bool per_batch = p.dalibi_slopes_strides.batch != 0;
    float dsink = 0.0f, dslope = 0.0f;
    for (int batch = 0; batch < p.batch; ++batch) {
        int64 first = statistics_row(p, VARLEN ? 0 : batch, head);
        int rows = p.seqlen_q;
        if constexpr (VARLEN) {
            const PackedBatch q = {p.cu_seqlens_q, p.batch, p.seqlen_q, 1, 1};
            first += q.start(batch + 1);
            rows = q.length(batch + 1);
        }
        for (int row = thread_index(); row < rows; row += NUM_THREADS) {
            if (p.dsink != nullptr) {
                const float probability = exp2_approx(sink - p.shift[first + row]);
                if (probability != 0.0f) dsink += probability * p.delta[first + row];
            }
            if (p.dalibi_slopes != nullptr) dslope += p.distances[first + row];
        }
        if (p.dalibi_slopes != nullptr && per_batch) {
            store(p.dalibi_slopes + batch * p.dalibi_slopes_strides.batch +
                      head * p.dalibi_slopes_strides.head,
                  -block_sum(smem, dslope));
            dslope = 0.0f;
        }
    }
    if (p.dalibi_slopes != nullptr && !per_batch)
        store(p.dalibi_slopes + head * p.dalibi_slopes_strides.head, -block_sum(smem, dslope));
    if (p.dsink != nullptr) store(p.dsink + head, -block_sum(smem, dsink));
}

}  // namespace flashcore
