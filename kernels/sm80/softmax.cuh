// softmax.cuh - a warp's softmax in fwd_sm80.cu, on the accumulators of S. A row whose scores are
// too far from 0 for the main loop is computed again (online_softmax.cuh says when, exact_row.cuh
// how).
#pragma once
#include <config.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/exact_row.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/softmax/score_tile.cuh>
#include <sm80/traits.cuh>

namespace flashcore {

// Looks up which of its keys of a tile this lane's rows see by `mask` and mask_mod; with a list,
// also by the states of `blocks`. MASKED: by their positions, too.
template <bool MASKED, bool LOOKED_UP>
__device__ __forceinline__ void look_up_keys(
    const Context& c, const BlocksOfRow& blocks, int tile,
    KeyBits<LOOKED_UP, TILES_N> (&visible)[FRAGMENTS_M][2]) {
    if constexpr (LOOKED_UP) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const RowRules<T, RULES> rules = c.rules_for(c.query(m, half));
                const int key = c.first_key(tile);
                if constexpr (LISTED) {
                    visible[m][half] =
                        rules.template visible_in<MASKED, TILES_N, TILES_N>(blocks, c.mask(), key);
                } else {
                    visible[m][half] =
                        rules.template visible<MASKED, TILES_N, TILES_N>(c.mask(), key);
                }
            }
    }
}

// Returns which keys some row of the warp sees.
template <bool LOOKED_UP>
__device__ __forceinline__ KeyBits<LOOKED_UP, TILES_N> seen_keys(
    const Context& c, const KeyBits<LOOKED_UP, TILES_N> (&visible)[FRAGMENTS_M][2]) {
    KeyBits<LOOKED_UP, TILES_N> seen;
    if constexpr (LOOKED_UP) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (c.query(m, half).valid) seen.add(visible[m][half]);
        seen.add_rows();
    }
    return seen;
}

// Looks up which probabilities of a tile dropout keeps.
__device__ __forceinline__ void look_up_kept(const Context& c, int tile, Kept& kept) {
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m)
        look_up_kept<RULES>(c.params, c.work, c.query(m, 0), c.first_key(tile), kept[m]);
}

// Applies the rules, sets hidden scores to -inf, and finds the rows' new maxima over the keys that
// this warp has.
template <bool MASKED, bool LOOKED_UP>
__device__ __forceinline__ void find_maxima(
    const Context& c, const Rows& rows, Scores& rS, int tile,
    const KeyBits<LOOKED_UP, TILES_N> (&visible)[FRAGMENTS_M][2], float (&max)[FRAGMENTS_M][2]) {
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow q = c.query(m, half);
            const GateRow<GATE> gate = c.gate_row(q);
            const RowRules<T, RULES> rules = c.rules_for(q);
            const int first_key = c.first_key(tile);
            const auto row = [&](int n, int e) -> float& { return rS.x[m][n][2 * half + e]; };
            max[m][half] = apply_rules_and_find_max<MASKED>(row, rules, gate, c.mask(), q.query,
                                                            visible[m][half], first_key,
                                                            rows.state[m][half].max);
        }
    }
}

// Rescales l and O where the maxima have risen. Sets shift to what the exponents subtract.
__device__ __forceinline__ void raise_maxima(const Context& c, Rows& rows, int tile,
                                             const float (&max)[FRAGMENTS_M][2],
                                             float (&shift)[FRAGMENTS_M][2]) {
    const float scale = exponent_scale<RULES>(c.params);
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            RowState& state = rows.state[m][half];
            // A gate shows maxima as they are.
            const float reached = max[m][half];
            const float held = GATE == GATE_NONE ? held_max(state.max, reached, scale) : reached;
            shift[m][half] = shift_of(held, scale);
            factor[half] = raise_max(state, held, shift[m][half], scale);
            c.gate_row(c.query(m, half))
                .quad_tile_max(tile * WARPS_N + c.warp_n,
                               state.max * natural_scale<RULES>(c.params));
        }
        if (warp_any(factor[0] != 1.0f || factor[1] != 1.0f)) rows.scale_output(m, factor);
    }
}

// Computes the probabilities of step `step` of P V, adds them to l, and drops some.
__device__ __forceinline__ void exponentiate(const Context& c, Rows& rows, const Scores& rS,
                                             Probabilities& rP, int tile, int step,
                                             const float (&shift)[FRAGMENTS_M][2],
                                             const Kept& kept) {
#pragma unroll
    for (int i = 0; i < Products::STEP_TILES; ++i) {
        const int n = step * Products::STEP_TILES + i;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const auto row = [&](int n, int e) { return rS.x[m][n][2 * half + e]; };
                float p[2];
                exponentiate_pair<T>(
                    row, n, exponent_scale<RULES>(c.params), shift[m][half],
                    c.gate_row(c.query(m, half)), [&] { return c.first_key(tile); },
                    [&](int e, float x) { p[e] = x; });
                rows.state[m][half].sum += p[0] + p[1];
                const KeptBits<RULES, TILES_N>& drawn = kept[m][half];
                rP.set_pair(m, i, half, drawn.select(n, 0, p[0]), drawn.select(n, 1, p[1]));
            }
        }
    }
}

// Whether some row of the warp has to be computed again. Warps that share rows agree on it, for
// their maxima are the same, to the bit.
__device__ __forceinline__ bool has_far_rows(const Context& c, const Rows& rows) {
    bool is_any = false;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            is_any |= is_far(rows.state[m][half].max, exponent_scale<RULES>(c.params));
    return warp_any(is_any);
}

// Computes those rows again, without tensor cores.
__device__ __forceinline__ void attend_exactly(const Context& c, Rows& rows) {
    const Positions mask = c.mask();
    const TileRange all =
        visible_tiles<BLOCK_N, PACK_GQA>(c.work, mask, 0, BLOCK_M, SPLIT_KV ? c.params.splits : 1);
    const KeySpan keys = {all.begin * BLOCK_N, min(all.end * BLOCK_N, c.work.seqlen_kv)};
    // A warp has the same keys of every tile. Warps that share rows need all keys for O.
    const auto is_own = [&](int key) {
        return key % BLOCK_N / KEYS_PER_WARP == c.warp_n + c.warp_d;
    };
    const auto has = [&](int key) { return SHARES_ROWS || is_own(key); };
    const int first_col = c.warp_d * COLS_PER_WARP;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow q = c.query(m, half);
            const ExactRow<T, RULES, GATE, DIM_QK, Positions> exact = {
                c.params, c.work, mask, q, c.rules_for(q), c.gate_row(q)};
            RowState& state = rows.state[m][half];
            const bool again = exact.template attend<COLS_PER_WARP>(
                state, keys, first_col, DIM_V - first_col, has, is_own,
                [&](int d, int e) -> float& { return rows.rO.x[m][d][2 * half + e]; });
            for (int tile = all.begin; again && tile < all.end; ++tile)
                exact.gate.quad_tile_max(tile * WARPS_N + c.warp_n,
                                         state.max * natural_scale<RULES>(c.params));
        }
    }
}

}  // namespace flashcore
