// softmax.cuh - a warpgroup's softmax over a tile of keys, half by half, and the keys that masks
// hide. A row whose scores are too far from 0 for the main loop is computed again
// (online_softmax.cuh says when, exact_row.cuh how).
#pragma once
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/exact_row.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/softmax/score_tile.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_cluster/warpgroup.cuh>

namespace flashcore {

// Looks up which keys of a tile this lane's rows see by `mask` and mask_mod, and returns how much
// of it the warpgroup sees. (Keys are hidden key by key only where HALVES = 1.)
__device__ __forceinline__ SeenExtent Warpgroup::look_up_keys(int tile, Bits (&visible)[2]) const {
    if constexpr (!HIDES_KEYS) return {true, true};
    Bits seen;
    const bool masked = needs_mask(tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const QueryRow q = query(r);
        if (masked) {
            visible[r] =
                rules_for(q).template visible<true, PAIRS, LOOKUPS>(mask(), first_key(tile, 0));
        } else {
            visible[r] =
                rules_for(q).template visible<false, PAIRS, LOOKUPS>(mask(), first_key(tile, 0));
        }
        if (q.valid) seen.add(visible[r]);
    }
    seen.add_rows();
    sync();  // all warps have read what was published for the tile before
    smem.seen[index].publish(seen, thread() / WARP_SIZE);
    sync();  // all warps have published
    return smem.seen[index].extent();
}

// Applies the rules to a half, sets hidden scores to -inf, and raises max, this lane's own.
template <bool MASKED>
__device__ __forceinline__ void Warpgroup::raise_by_half(int tile, int half,
                                                         const Bits (&visible)[2],
                                                         float (&max)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const QueryRow q = query(r);
        float chain[2] = {max[r], NEG_INFINITY};  // of even and odd keys: two independent chains
        apply_rules<MASKED, PAIRS>(
            [&](int n, int e) -> float& { return rS[half][4 * n + 2 * r + e]; }, rules_for(q),
            gate_row(q), mask(), q.query, visible[r], first_key(tile, half),
            [&](int e, float s) { chain[e] = fmaxf(chain[e], s); });
        max[r] = fmaxf(chain[0], chain[1]);
    }
}

// Waits for the scores, half by half, and finds both rows' new maxima.
__device__ __forceinline__ void Warpgroup::find_maxima(int tile, const Bits (&visible)[2],
                                                       float (&max)[2]) {
    const bool masked = (!HIDES_KEYS || RULES & SCORE_RULES) && needs_mask(tile);
    max[0] = state[0].max;
    max[1] = state[1].max;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
        if (half + 1 < HALVES) {
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        fence_registers(rS[half]);
        if (masked) {
            raise_by_half<true>(tile, half, visible, max);
        } else {
            raise_by_half<false>(tile, half, visible, max);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) max[r] = group_max<QUAD>(max[r]);
}

// Turns a half's scores into probabilities, adds them to l, drops some, and packs them for P V.
__device__ __forceinline__ void Warpgroup::exponentiate(int tile, int half,
                                                        const float (&shift)[2]) {
    KeptBits<RULES, PAIRS> kept[2];
    look_up_kept<RULES>(params, work, query(0), first_key(tile, half), kept);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const GateRow<GATE> gate = gate_row(query(r));
        const auto row = [&](int n, int e) -> float& { return rS[half][4 * n + 2 * r + e]; };
        float sum[2] = {};
#pragma unroll
        for (int n = 0; n < PAIRS; ++n) {
            exponentiate_pair<T>(
                row, n, scale, shift[r], gate, [&] { return first_key(tile, half); },
                [&](int e, float p) {
                    row(n, e) = kept[r].select(n, e, p);
                    sum[e] += p;
                });
        }
        state[r].sum += sum[0] + sum[1];
    }
    pack_p<T>(rP[half], rS[half]);
}

// Whether some row of the warp has to be computed again.
__device__ __forceinline__ bool Warpgroup::has_far_rows() const {
    bool is_any = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) is_any |= is_far(state[r].max, scale) && query(r).valid;
    return warp_any(is_any);
}

// Computes those rows again over this warpgroup's keys, without tensor cores.
__device__ __forceinline__ void Warpgroup::attend_exactly() {
    const Positions positions = mask();
    const KeySpan keys = {tiles.begin * BLOCK_N, min(tiles.end * BLOCK_N, work.seqlen_kv)};
    const auto is_own = [&](int key) { return (key / BLOCK_N - tiles.begin) % SPLITS == split(); };
    const auto all = [](int) { return true; };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const QueryRow q = query(r);
        const ExactRow<T, RULES, GATE, DIM_QK, Positions> exact = {
            params, work, positions, q, rules_for(q), gate_row(q)};
        const bool again = exact.template attend<HEAD_DIM_V>(
            state[r], keys, 0, DIM_V, is_own, all,
            [&](int n, int e) -> float& { return rO[4 * n + 2 * r + e]; });
        for (int nth = 0; again && has(nth); ++nth)
            exact.gate.quad_tile_max(tile(nth), state[r].max * natural_scale<RULES>(params));
    }
}

}  // namespace flashcore
