// bwd_sm80.cu - backward attention on mma.sync: dK and dV of blocks of keys, or dQ of blocks of
// queries. Deterministic: no atomics, and nothing of size Sq x Skv is stored.
//
//   S = scale Q K^T, P = exp(rules(S) - LSE), dP = dO V^T, D = rowsum(dO * O) - dLSE
//   dV = P^T dO,  dS = P (dP - D) rules'(S),  dK = scale dS^T Q,  dQ = scale dS K
//   (FlashAttention-2, Dao 2023, algorithm 2)
//
// It is compiled twice. With OWNS_KEYS a CTA owns BLOCK_M keys and walks over the queries that see
// them: dK, dV. Without, it owns BLOCK_M queries and walks over the keys that they see: dQ. So S
// and dP are computed twice, which makes 7 products instead of 5. In one pass every block of keys
// would have to add to dQ, in an order that is the same each time. D and the LSE come from
// bwd_rows.cu, which is launched before.
//
// Rows of S are the CTA's own: with OWNS_KEYS it is S^T. So P and dS, or P^T and dS^T, lie in
// registers as the first operands of what follows.
//
//   S, dP = own rows times the tile's   ldmatrix + mma, fp32 accumulators
//   P, dS                               on the fragments (backward/differentiate.cuh)
//   dV += P^T dO, dK += dS^T Q          the accumulator layout of S is the operand layout of P
//   or dQ += dS K
//
// Every warp owns 16 FRAGMENTS_M rows, copies its part of every tile, and computes. With
// NUM_STAGES = 2 the next tile is copied while this one is used.
//
// The CTA that owns keys walks over the query heads that share them, one after the other. With a
// block mask a CTA walks over a list of tiles for each head (backward/listed_walk.cuh). Wide heads:
// a CTA has GRADIENT_COLS columns of the gradients.
//
// Shared memory (SharedStorage in sm80_backward/traits.cuh)
//   | sOwnQK, sOwnVO, BLOCK_M rows | sQK, sVO, NUM_STAGES x BLOCK_N rows | sShift, sDelta |
//   at the end: the gradients, as T, over sOwnQK and sOwnVO
#include <backward/differentiate.cuh>
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <sm80_backward/epilogue.cuh>
#include <sm80_backward/producer.cuh>
#include <sm80_backward/traits.cuh>

namespace flashcore {

// ---- the main loop: one tile of the other side --------------------------------------------------

template <bool MASKED, bool LOOKED_UP, typename StatisticsOf>
__device__ __forceinline__ void add_gradients(const Context& c, Gradients& rows,
                                              const WalkedTile& at, int stage, const Scores& rS,
                                              const Scores& rdP, StatisticsOf statistics);

// Computes a tile that is in shared memory. Block masks: where a warp meets an empty block it
// computes nothing, and where it meets a full one it looks up nothing, unless positions hide some.
template <typename StatisticsOf>
__device__ __forceinline__ void compute_tile(const Context& c, Gradients& rows,
                                             const WalkedTile& at, int stage,
                                             StatisticsOf statistics) {
    const int state = state_met(c, at);
    if (state == 0) return;
    Scores rS, rdP;
    ProductsQK::scores(rS, ProductsQK::lane_q(c.smem.sOwnQK, c.first_row),
                       ProductsQK::lane_k(c.smem.sQK[stage], 0));
    ProductsVO::scores(rdP, ProductsVO::lane_q(c.smem.sOwnVO, c.first_row),
                       ProductsVO::lane_k(c.smem.sVO[stage], 0));
    if (needs_mask(c, at.tile)) {
        add_gradients<true, HIDES_KEYS>(c, rows, at, stage, rS, rdP, statistics);
    } else if (LISTED && state == BLOCK_FULL) {
        add_gradients<false, false>(c, rows, at, stage, rS, rdP, statistics);
    } else {
        add_gradients<false, HIDES_KEYS>(c, rows, at, stage, rS, rdP, statistics);
    }
}

template <typename StatisticsOf>
__device__ __forceinline__ void attend_tile(const Context& c, Gradients& rows, const Walk& walk,
                                            int nth, StatisticsOf statistics) {
    const WalkedTile at = walk.at(nth);
    if (NUM_STAGES > 1 && walk.has_next(nth)) fill(c, walk, nth + 1);
    wait_full(c, nth);
    compute_tile(c, rows, at, nth % NUM_STAGES, statistics);
    release(c, nth);
    if (NUM_STAGES == 1 && walk.has_next(nth)) fill(c, walk, nth + 1);
}

// P and dS of a step of the products that follow.
template <bool MASKED, bool LOOKED_UP, typename StatisticsOf>
__device__ __forceinline__ void differentiate_step(const Context& c, Gradients& rows,
                                                   const WalkedTile& at, int step,
                                                   const Visible<LOOKED_UP>& visible,
                                                   const AllKept& kept, const Scores& rS,
                                                   const Scores& rdP, StatisticsOf statistics,
                                                   Probabilities& rP, Probabilities& rdS) {
#pragma unroll
    for (int i = 0; i < STEP_TILES; ++i) {
        const int n = step * STEP_TILES + i;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float s[2] = {rS.x[m][n][2 * half], rS.x[m][n][2 * half + 1]};
                const float dp[2] = {rdP.x[m][n][2 * half], rdP.x[m][n][2 * half + 1]};
                const Statistics of[2] = {statistics(m, half, n, 0), statistics(m, half, n, 1)};
                const auto added = [&](const Meeting& x, float dt) {
                    if (SUMS_DISTANCES) rows.distances[m][half] += dt * c.distance(x);
                };
                const PairOfGradients pair = differentiate<MASKED>(
                    c, at, m, half, n, visible[m][half], kept[m][half], s, dp, of, added);
#pragma unroll
                for (int number = 0; number < MOD_ELEMENTS; ++number)
                    rows.elements.x[number] += pair.elements.x[number];
                rP.set_pair(m, i, half, pair.p[0], pair.p[1]);
                rdS.set_pair(m, i, half, pair.ds[0], pair.ds[1]);
            }
        }
    }
}

// dV += P^T dO and dK += dS^T Q, or dQ += dS K, in steps of rows of the tile.
template <bool MASKED, bool LOOKED_UP, typename StatisticsOf>
__device__ __forceinline__ void add_gradients(const Context& c, Gradients& rows,
                                              const WalkedTile& at, int stage, const Scores& rS,
                                              const Scores& rdP, StatisticsOf statistics) {
    Visible<LOOKED_UP> visible;
    look_up_keys<MASKED>(c, at, visible);
    const KeyBits<LOOKED_UP, TILES_N> seen = rows_seen(visible);
    AllKept kept;
    look_up_kept(c, at, kept);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        Probabilities rP, rdS;
        differentiate_step<MASKED, LOOKED_UP>(c, rows, at, step, visible, kept, rS, rdP, statistics,
                                              rP, rdS);
        if (OWNS_KEYS && c.has_columns(HEAD_DIM_V))
            ProductsVO::output(rows.rVO, rP, ProductsVO::lane_v(c.smem.sVO[stage], 0, c.first_col),
                               step, seen);
        if (c.has_columns(HEAD_DIM))
            ProductsQK::output(rows.rQK, rdS, ProductsQK::lane_v(c.smem.sQK[stage], 0, c.first_col),
                               step, seen);
    }
}

// ---- a block of keys, or of queries -------------------------------------------------------------

__device__ __forceinline__ void attend(const Context& c, Gradients& rows, Walk& walk) {
    if constexpr (OWNS_KEYS) {
#pragma unroll 1
        for (int nth = 0; walk.has(nth); ++nth) {
            const int stage = nth % NUM_STAGES;
            const auto statistics = [&](int, int, int n, int e) {
                const int query = n * 8 + c.lane % QUAD * 2 + e;
                return Statistics{c.smem.sShift[stage][query], c.smem.sDelta[stage][query]};
            };
            attend_tile(c, rows, walk, nth, statistics);
            walk.advance();
        }
    } else {
        Statistics of[FRAGMENTS_M][2];  // of the lane's rows
        load_own_statistics(c, of);
        const auto statistics = [&](int m, int half, int, int) { return of[m][half]; };
#pragma unroll 1
        for (int nth = 0; walk.has(nth); ++nth) {
            attend_tile(c, rows, walk, nth, statistics);
            walk.advance();
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    bwd_sm80(const __grid_constant__ BackwardParams params) {
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<128>());
    Work work;
    if (!find_own_rows(params, block_index() / COLUMN_BLOCKS, work)) return;
    if (thread_index() == 0) {
        smem.tiles.init(NUM_THREADS, NUM_THREADS);
        smem.work = work;
    }
    block_sync();  // all threads see the work and the barriers
    const int first_col = block_index() % COLUMN_BLOCKS * GRADIENT_COLS;
    const Context context(params, smem, smem.work, first_col);
    Gradients rows;
    rows.clear();
    Walk walk(context);
    if (!walk.is_empty()) {
        load_own_rows(context);  // no barrier of their own: the first tile's waits for them, too
        fill(context, walk, 0);
        attend(context, rows, walk);
    }
    store_gradients(context, rows);
}

}  // namespace flashcore
