// combine.cuh - how the warpgroups of a cluster combine their partials of the same rows.
//
// Each of them has m, l and all columns of O, over its own keys. In the end each stores its own
// columns, so it gives the others theirs, and is given its own by all of them:
//
//   tensor cores   |              | P V of the last tile        |
//   the warpgroup  | give m | exponentials | take m | give l    | give O | take l and O | store
//
// All scale l and O to the common maximum before they give them. So what they are given has only to
// be added up.
//
// Within the CTA a warp stores what it gives, and arrives at the taker's mbarrier. To the peer CTA
// go asynchronous stores, whose bytes count on the mbarrier there. (Plain stores to the peer,
// ordered by a cluster barrier, take three times as long.)
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

// The warpgroups of a CTA stand in a circle. What this one gives to the i-th behind it, here or in
// the peer (cta = 0 or 1), goes to place cta * WARPGROUPS + i - 1 of that one's inbox. So all give
// in the same way, whoever they are. `place` goes over all others; the peer's come last.
__device__ __forceinline__ int cta_of(int place) { return (place + 1) / WARPGROUPS; }
__device__ __forceinline__ int Warpgroup::neighbour(int place) const {
    const int w = index + (place + 1) % WARPGROUPS;
    return w < WARPGROUPS ? w : w - WARPGROUPS;
}

// Stores x here (cta = 0), or at the same place of the peer, where it counts on `full`.
__device__ __forceinline__ void Warpgroup::give(int cta, float4& place, const float4& x,
                                                uint64& full) {
    if (CLUSTER == 1 || cta == 0) {
        place = x;
    } else {
        store_peer_async(peer_address(shared_address(&place), rank ^ 1), x,
                         peer_address(shared_address(&full), rank ^ 1));
    }
}

// The warp has given all to the others of the CTA that they wait for.
__device__ __forceinline__ void Warpgroup::arrive(uint64 (&full)[WARPGROUPS]) {
    if (WARPGROUPS == 1) return;
    warp_sync();  // all lanes have stored
    if (lane() > 0) return;
#pragma unroll
    for (int place = 0; place < WARPGROUPS - 1; ++place) mbarrier_arrive(&full[neighbour(place)]);
}

// Gives a number of both rows to all others, first to the peer's: what they get is on its way
// longer.
__device__ __forceinline__ void Warpgroup::give_pair(InboxRows Inbox::* rows, float low, float high,
                                                     uint64 (&full)[WARPGROUPS]) {
    if (lane() % QUAD > 0) return;
#pragma unroll
    for (int place = SPLITS - 2; place >= 0; --place) {
        const int w = neighbour(place);
        give(cta_of(place), (smem.inbox[w].*rows)[place][thread() / QUAD], {low, high, 0, 0},
             full[w]);
    }
}

__device__ __forceinline__ void Warpgroup::give_maxima() {
    give_pair(&Inbox::max, state[0].max, state[1].max, smem.full_max);
    arrive(smem.full_max);
}

// Takes the others' maxima, and gives l at the common one.
__device__ __forceinline__ void Warpgroup::settle() {
    is_settled = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) state[r].sum = group_sum<QUAD>(state[r].sum);
    const Inbox& inbox = smem.inbox[index];
    float max[2] = {state[0].max, state[1].max};
    if (SPLITS > 1) mbarrier_wait(&smem.full_max[index], 0);
#pragma unroll
    for (int g = 0; g < SPLITS - 1; ++g) {
        const float4 theirs = inbox.max[g][thread() / QUAD];
        max[0] = fmaxf(max[0], theirs.x);
        max[1] = fmaxf(max[1], theirs.y);
    }
#pragma unroll
    for (int r = 0; SPLITS > 1 && r < 2; ++r) {
        to_common[r] = rescale_to(state[r].max, max[r], scale);
        state[r] = {max[r], state[r].sum * to_common[r]};
    }
    give_pair(&Inbox::sum, state[0].sum, state[1].sum, smem.full_o);
}

// Gives the others their columns of O, and keeps its own. Registers have no index, so this is built
// for each warpgroup of the cluster, and the warpgroup SPLIT runs its own.
template <int SPLIT>
__device__ __forceinline__ void Warpgroup::give_output(float (&own)[OWN_COLS / 2]) {
    if constexpr (SPLIT < SPLITS - 1) {
        if (split() != SPLIT) return give_output<SPLIT + 1>(own);
    }
    constexpr int RANK = SPLIT / WARPGROUPS, INDEX = SPLIT % WARPGROUPS;
#pragma unroll
    for (int place = SPLITS - 2; place >= 0; --place) {
        const int w = (INDEX + place + 1) % WARPGROUPS;
        const int to = (RANK ^ cta_of(place)) * WARPGROUPS + w;
        const float* const theirs = rO + to * (OWN_COLS / 2);
#pragma unroll
        for (int n = 0; n < OWN_COLS / 8; ++n)
            give(cta_of(place), smem.inbox[w].o[place][n][thread()],
                 {theirs[4 * n], theirs[4 * n + 1], theirs[4 * n + 2], theirs[4 * n + 3]},
                 smem.full_o[w]);
    }
#pragma unroll
    for (int e = 0; e < OWN_COLS / 2; ++e) own[e] = rO[SPLIT * (OWN_COLS / 2) + e];
}

// Gives O, and sets l and `own` to those of all keys: the columns that this warpgroup stores.
__device__ __forceinline__ void Warpgroup::exchange(float (&own)[OWN_COLS / 2]) {
#pragma unroll
    for (int e = 0; SPLITS > 1 && e < HEAD_DIM_V / 2; ++e) rO[e] *= to_common[e / 2 % 2];
    give_output<0>(own);
    arrive(smem.full_o);
    const Inbox& inbox = smem.inbox[index];
    if (SPLITS > 1) mbarrier_wait(&smem.full_o[index], 0);
#pragma unroll
    for (int g = 0; g < SPLITS - 1; ++g) {
        const float4 sums = inbox.sum[g][thread() / QUAD];
        state[0].sum += sums.x;
        state[1].sum += sums.y;
#pragma unroll
        for (int n = 0; n < OWN_COLS / 8; ++n) {
            const float4 x = inbox.o[g][n][thread()];
            own[4 * n] += x.x;
            own[4 * n + 1] += x.y;
            own[4 * n + 2] += x.z;
            own[4 * n + 3] += x.w;
        }
    }
}

__device__ __forceinline__ void Warpgroup::find_output() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const QueryRow q = query(r);
        output[r] =
            const_cast<T*>(head_row<T>(params.o, params.o_strides, work.batch, q.head, q.query)) +
            split() * OWN_COLS;
        keep_register(output[r]);
    }
}

// Writes this warpgroup's columns of O, normalised, and then both rows' LSE, which take longer.
__device__ __forceinline__ void Warpgroup::finish(const float (&own)[OWN_COLS / 2]) {
    const int valid_cols = DIM_V - split() * OWN_COLS;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        factor[r] = finish_state<RULES, GATE>(params, work, query(r), state[r]);
        // l is 0 or, as m is a key's score or the sink, about 1 and more.
        factor[r] *= state[r].sum == 0.0f ? 0.0f : reciprocal_approx(state[r].sum);
    }
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
