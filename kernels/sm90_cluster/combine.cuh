// combine.cuh - how the warpgroups of a cluster combine what they have found for the same rows.
//
// Each of them has m, l and all columns of O, over its own keys. In the end each stores its own
// part of the columns. So it gives away the others' columns and is given its own ones: first within
// the CTA, through shared memory; then, half of those, to its fellow in the peer CTA, which writes
// nothing but waits for bytes on an mbarrier. (Stores to the peer and a cluster barrier, which
// orders them, take three times as long.)
#pragma once
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/ptx/cluster.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <sm90_cluster/warpgroup.cuh>

namespace flashcore {

// Combines two partials of a thread's rows. o(n): 8-column group n of this thread, of the first
// row's two columns and of the second row's.
template <int COLUMNS, typename Group>
__device__ __forceinline__ void combine(RowState (&state)[2], const Partials<COLUMNS>& other,
                                        float scale, Group o) {
    const int thread = thread_index() % WARPGROUP_THREADS;
    const float4 theirs = other.state[thread / QUAD];
    const CombineFactors first(state[0].max, theirs.x, scale);
    const CombineFactors second(state[1].max, theirs.z, scale);
    state[0] = {first.max, state[0].sum * first.a + theirs.y * first.b};
    state[1] = {second.max, state[1].sum * second.a + theirs.w * second.b};
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n) {
        const float4 x = other.o[n][thread];
        float* const mine = o(n);
        mine[0] = mine[0] * first.a + x.x * first.b;
        mine[1] = mine[1] * first.a + x.y * first.b;
        mine[2] = mine[2] * second.a + x.z * second.b;
        mine[3] = mine[3] * second.a + x.w * second.b;
    }
}

__device__ __forceinline__ float4 both_states(const RowState (&state)[2]) {
    return {state[0].max, state[0].sum, state[1].max, state[1].sum};
}

// Sets o to this warpgroup's columns, over all keys of the CTA.
__device__ __forceinline__ void Warpgroup::combine_in_cta(float (&o)[COLS / 2]) {
#pragma unroll
    for (int w = 0; w < WARPGROUPS; ++w) {
        const float* const theirs = rO + w * (COLS / 2);
        if (w == index) {
#pragma unroll
            for (int e = 0; e < COLS / 2; ++e) o[e] = theirs[e];
            continue;
        }
        Given& given = smem.given[w][index - (index > w)];
#pragma unroll
        for (int n = 0; n < COLS / 8; ++n)
            given.o[n][thread()] = {theirs[4 * n], theirs[4 * n + 1], theirs[4 * n + 2],
                                    theirs[4 * n + 3]};
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) state[r].sum = group_sum<QUAD>(state[r].sum);
#pragma unroll
    for (int w = 0; w < WARPGROUPS; ++w)
        if (w != index && lane() % QUAD == 0)
            smem.given[w][index - (index > w)].state[thread() / QUAD] = both_states(state);
    if (WARPGROUPS == 1) return;
    block_sync();  // all warpgroups have given
#pragma unroll
    for (int other = 0; other < WARPGROUPS - 1; ++other)
        combine(state, smem.given[index][other], exponent_scale<RULES>(params),
                [&](int n) { return o + 4 * n; });
}

// Sets `own` to those of the columns that this warpgroup stores, over all keys.
__device__ __forceinline__ void Warpgroup::combine_in_cluster(float (&o)[COLS / 2],
                                                              float (&own)[OWN_COLS / 2]) {
    if constexpr (CLUSTER == 1) {
#pragma unroll
        for (int e = 0; e < OWN_COLS / 2; ++e) own[e] = o[e];
        return;
    }
    cluster_wait();  // the peer has made its barrier
    const int peer = rank ^ 1;
    const uint32 barrier = peer_address(shared_address(&smem.full_peer), peer);
#pragma unroll
    for (int n = 0; n < OWN_COLS / 8; ++n) {
        float give[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // no array is indexed by the rank: it would leave registers
            const float low = o[4 * n + e], high = o[OWN_COLS / 2 + 4 * n + e];
            give[e] = rank == 0 ? high : low;
            own[4 * n + e] = rank == 0 ? low : high;
        }
        store_peer_async(peer_address(shared_address(&smem.peer[index].o[n][thread()]), peer),
                         {give[0], give[1], give[2], give[3]}, barrier);
    }
    if (lane() % QUAD == 0)
        store_peer_async(
            peer_address(shared_address(&smem.peer[index].state[thread() / QUAD]), peer),
            both_states(state), barrier);
    mbarrier_wait(&smem.full_peer, 0);
    combine(state, smem.peer[index], exponent_scale<RULES>(params),
            [&](int n) { return own + 4 * n; });
}

// The columns that this warpgroup stores.
__device__ __forceinline__ int first_own_col(int index, int rank) {
    return index * COLS + rank * OWN_COLS;
}

__device__ __forceinline__ void Warpgroup::find_output() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const QueryRow q = query(r);
        output[r] =
            const_cast<T*>(head_row<T>(params.o, params.o_strides, work.batch, q.head, q.query)) +
            first_own_col(index, rank);
        keep_register(output[r]);
    }
}

// Writes this warpgroup's columns of O, normalised, and then both rows' LSE, which take longer.
__device__ __forceinline__ void Warpgroup::finish(const float (&own)[OWN_COLS / 2]) {
    const int valid_cols = DIM_V - first_own_col(index, rank);
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
        factor[r] =
            finish_state<RULES, GATE>(params, work, query(r), state[r]) * inverse_sum(state[r].sum);
#pragma unroll
    for (int r = 0; WRITES_OUTPUT<GATE> && r < 2; ++r) {
        const bool valid = query(r).valid;
        const auto pair = [&](int n) {
            return pack2<T>(scaled_output(own[4 * n + 2 * r], factor[r]),
                            scaled_output(own[4 * n + 2 * r + 1], factor[r]));
        };
        if constexpr (OWN_COLS % 32 == 0) {
            store_quad_row<OWN_COLS, ALIGN_BYTES>(output[r], valid, valid_cols, pair);
        } else {
            store_quad_pairs<OWN_COLS, ALIGN_BYTES>(output[r], valid, valid_cols, pair);
        }
    }
    if (split() > 0 || lane() % QUAD > 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) write_lse(params, work, query(r), gate_row(query(r)), state[r]);
}

}  // namespace flashcore
