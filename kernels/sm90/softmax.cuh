// softmax.cuh - a consumer's softmax, on the accumulators of S. A row whose scores are too far from
// 0 for the main loop is computed again (online_softmax.cuh says when, exact_row.cuh how).
#pragma once
#include <config.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/exact_row.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/softmax/score_tile.cuh>
#include <sm90/consumer.cuh>
#include <sm90/traits.cuh>

namespace flashcore {

// Looks up which probabilities of a tile dropout keeps, while the products that are in flight run.
__device__ __forceinline__ void Consumer::look_up_kept(int tile) {
    flashcore::look_up_kept<RULES>(params, work_tile(), query(0), first_key(tile), kept);
}

// Applies the rules, sets hidden scores to -inf, and finds both rows' new maxima. LOOKED_UP: hidden
// are the keys that are not in `visible`.
template <bool MASKED, bool LOOKED_UP>
__device__ __forceinline__ void Consumer::find_maxima(int tile, float (&max)[2]) {
    const int first_key = this->first_key(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const QueryRow q = query(half);
        const GateRow<GATE> gate = gate_row(q);
        const RowRules<T, RULES> rules = rules_for(q);
        const auto row = [&](int n, int e) -> float& { return rS[4 * n + 2 * half + e]; };
        KeyBits<LOOKED_UP, TILES_N> keys;
        if constexpr (LOOKED_UP) keys = visible[half];
        max[half] = apply_rules_and_find_max<MASKED>(row, rules, gate, mask(), q.query, keys,
                                                     first_key, state[half].max);
    }
}

// Turns scores into probabilities, in place, given the new maxima, and drops some. Sets factor to
// what O has to be multiplied by.
__device__ __forceinline__ void Consumer::exponentiate(int tile, const float (&max)[2],
                                                       float (&factor)[2]) {
    const float scale = exponent_scale<RULES>(params);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const GateRow<GATE> gate = gate_row(query(half));
        // A gate shows maxima as they are.
        const float m = GATE == GATE_NONE ? held_max(state[half].max, max[half], scale) : max[half];
        const float shift = shift_of(m, scale);
        factor[half] = raise_max(state[half], m, shift, scale);
        gate.quad_tile_max(tile, max[half] * natural_scale<RULES>(params));
        const auto row = [&](int n, int e) -> float& { return rS[4 * n + 2 * half + e]; };
        float sum[2] = {};
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            exponentiate_pair<T>(
                row, n, scale, shift, gate, [&] { return first_key(tile); },
                [&](int e, float p) {
                    row(n, e) = kept[half].select(n, e, p);
                    sum[e] += p;
                });
        }
        state[half].sum += sum[0] + sum[1];
    }
}

__device__ __forceinline__ void Consumer::softmax_of(int tile, float (&factor)[2]) {
    float max[2];
    // With masks, look_up_keys has left out keys by their positions already; only rules that look
    // up arrays still have to know that keys may lie behind the sequence.
    if ((!HIDES_KEYS || RULES & SCORE_RULES) && needs_mask(tile)) {
        find_maxima<true, HIDES_KEYS>(tile, max);
        exponentiate(tile, max, factor);
    } else {
        find_maxima<false, HIDES_KEYS>(tile, max);
        exponentiate(tile, max, factor);
    }
}

__device__ __forceinline__ void Consumer::scale_output(const float (&factor)[2]) {
    if (!warp_any(factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int e = 0; e < HEAD_DIM_V / 2; ++e) rO[e] *= factor[e / 2 % 2];
}

// Whether some row of the warp has to be computed again.
__device__ __forceinline__ bool Consumer::has_far_rows() const {
    bool is_any = false;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        is_any |= is_far(state[half].max, exponent_scale<RULES>(params)) && query(half).valid;
    return warp_any(is_any);
}

// Computes those rows again, without tensor cores.
__device__ __forceinline__ void Consumer::attend_exactly() {
    const Positions positions = mask();
    // A list has places, not tiles; keys that are not listed are left out one by one.
    const TileRange tiles =
        LISTED ? visible_tiles<BLOCK_N, PACK_GQA>(work_tile(), positions, 0, BLOCK_M, 1)
               : tiles_of(params, work_tile(), index);
    const KeySpan keys = {tiles.begin * BLOCK_N, min(tiles.end * BLOCK_N, work_tile().seqlen_kv)};
    const auto all = [](int) { return true; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const QueryRow q = query(half);
        const ExactRow<T, RULES, GATE, DIM_QK, Positions> exact = {
            params, work_tile(), positions, q, rules_for(q), gate_row(q)};
        const bool again = exact.template attend<HEAD_DIM_V>(
            state[half], keys, 0, DIM_V, all, all,
            [&](int n, int e) -> float& { return rO[4 * n + 2 * half + e]; });
        for (int tile = tiles.begin; again && tile < tiles.end; ++tile)
            exact.gate.quad_tile_max(tile, state[half].max * natural_scale<RULES>(params));
    }
}

}  // namespace flashcore
