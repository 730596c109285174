// fwd_sm80.cu - forward attention on mma.sync: scores, probabilities and O stay in registers.
//
//   O = softmax(rules(softmax_scale * Q K^T)) V,  LSE = log sum exp   (FlashAttention-2, Dao 2023)
//
// A CTA owns BLOCK_M rows of one head and walks over the keys, BLOCK_N at a time. A row is a query;
// with PACK_GQA the query heads that share a head of K and V are rows side by side.
//
//   S = Q K_j^T                       ldmatrix + mma, fp32 accumulators
//   S = rules(S), -inf where hidden   flashcore/rules/score.cuh, position_mask.cuh
//   m, l, p = exp2(S - m)             on the fragments: a row lies in four neighbouring lanes
//   O = O * exp2(m_old - m) + P V_j   the accumulator layout of S is the operand layout of P
//
// Every warp copies its part of every tile, and computes. The warps of a CTA need not be at the
// same tile: a warp waits only for the copies that it needs next, or for slower warps that still
// read the stage that it fills next (sm80/producer.cuh).
//
//   NUM_STAGES = 1: K and V have barriers of their own
//     copies      | V_j           | K_{j+1}      | V_{j+1} ...
//     this warp   | S = Q K_j^T   | O += P V_j   | S = Q K_{j+1}^T ...
//   NUM_STAGES = 2: K and V of a stage share barriers (KV_TOGETHER)
//     copies      |               | K_{j+1}, V_{j+1} |
//     this warp   | S = Q K_j^T   | O += P V_j       | S = Q K_{j+1}^T ...
//
// Warps: WARPS_M along the rows, FRAGMENTS_M * 16 rows each. Warps that share rows either
//   WARPS_N  own different keys of every tile and have m, l, O of their own, combined at the end:
//            for grids that do not fill the GPU with one warp per row; or
//   WARPS_D  share m and P, each with its part of O's columns: for O too wide for one warp.
// With SPLIT_KV the keys of a block of rows are split over several CTAs; the last one to arrive
// combines their partials (RowCombine in flashcore/softmax/warp_rows.cuh).
//
// Shared memory (SharedStorage in sm80/traits.cuh)
//   | sQ, BLOCK_M rows | sK, NUM_STAGES x BLOCK_N rows | sV, NUM_STAGES x BLOCK_N rows | sP, sRow |
//   at the end: the other warps' m, l, O over sK and sV; then O, as T, over sQ
#include <config.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/row_sharing.cuh>
#include <flashcore/softmax/warp_rows.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>
#include <flashcore/tile/mma_tf32_tile.cuh>
#include <sm80/epilogue.cuh>
#include <sm80/producer.cuh>
#include <sm80/softmax.cuh>
#include <sm80/traits.cuh>

namespace flashcore {

// ---- the main loop: one tile of keys -----------------------------------------------------------

__device__ __forceinline__ void skip_tile(const Context& c, Walk& walk, const TileStage& at,
                                          int place);
template <typename Seen>
__device__ __forceinline__ void multiply_values(const Context& c, Rows& rows, const Scores& rS,
                                                int tile, const float (&shift)[FRAGMENTS_M][2],
                                                const Seen& seen, const Kept& kept, uint32 p,
                                                uint32 v);

// LOOKED_UP: whether masks are looked up, of the tile at `place`.
template <bool LOOKED_UP>
__device__ __forceinline__ void attend_tile(const Context& c, Rows& rows, Walk& walk,
                                            const Operands& first, const BlocksOfRow& blocks,
                                            const TileStage& at, int place) {
    const int tile = walk.tile(place);
    // Masks are looked up before there are scores: both together do not fit the registers.
    const bool needs_mask = walk.needs_mask(c, tile);
    Visible<LOOKED_UP> visible;
    if (needs_mask) {
        look_up_keys<true>(c, blocks, tile, visible);
    } else {
        look_up_keys<false>(c, blocks, tile, visible);
    }
    const Bits<LOOKED_UP> seen = seen_keys(c, visible);
    if (SKIPS_TILES && !seen.any_in_warp()) return skip_tile(c, walk, at, place);

    Kept kept;
    look_up_kept(c, tile, kept);

    Scores rS;
    wait_full(c, at, at.barriers_k);
    Products::scores(rS, first.q, first.k + at.stage * LayoutK::BYTES);
    if (!KV_TOGETHER) release(c, at.barriers_k);

    float max[FRAGMENTS_M][2];    // of each of the lane's rows
    float shift[FRAGMENTS_M][2];  // what its exponents subtract
    // With masks, look_up_keys has left out keys by their positions already; only rules that look
    // up arrays still have to know that keys may lie behind the sequence.
    if (needs_mask && (!LOOKED_UP || RULES & SCORE_RULES)) {
        find_maxima<true>(c, rows, rS, tile, visible, max);
    } else {
        find_maxima<false>(c, rows, rS, tile, visible, max);
    }
    c.smem.all_reduce(max, c.first_row(), c.warp_d, c.rows_barrier(), fmaxf);
    if (!KV_TOGETHER) wait_full(c, at, at.barriers_v);
    raise_maxima(c, rows, tile, max, shift);
    // The next copy is asked for this late because slower warps still read the stage that it
    // overwrites. Right after S the kernel would be up to 8 % slower.
    if (place + 1 < walk.all.end) fill_tile(c, walk, place + 1, walk.next_tile(place));
    multiply_values(c, rows, rS, tile, shift, seen, kept, first.p,
                    first.v + at.stage * LayoutV::BYTES);
    release(c, at.barriers_v);  // V, and K with it where they share barriers
}

// The same, at the next place of the walk: waits for nothing yet, and finds out what to look up.
__device__ __forceinline__ void attend_place(const Context& c, Rows& rows, Walk& walk,
                                             const Operands& operands, int place) {
    const Operands first = KEEPS_OPERANDS ? operands : Operands(c);
    const TileStage at = walk.stage_of(place);
    const bool has_v = EARLY_V && place == walk.all.begin;
    if (!KV_TOGETHER && !has_v) fill_v(c, walk, place, walk.tile(place));
    if constexpr (LISTED && !SHARES_ROWS) {
        const BlocksOfRow blocks = walk.blocks_in(c);
        const bool hidden = (BOUNDED_RIGHT || BOUNDED_LEFT) && walk.needs_mask(c, walk.tile(place));
        if (blocks.are_empty()) {
            skip_tile(c, walk, at, place);
        } else if (blocks.are_full() && !hidden) {
            attend_tile<false>(c, rows, walk, first, blocks, at, place);
        } else {
            attend_tile<true>(c, rows, walk, first, blocks, at, place);
        }
    } else {
        const BlocksOfRow blocks = LISTED ? walk.blocks_in(c) : BlocksOfRow();
        attend_tile<HIDES_KEYS>(c, rows, walk, first, blocks, at, place);
    }
}

// O += P V, in steps of keys: the exponentials of a step are computed while the tensor cores
// multiply the step before. Warps that share rows first exchange P through shared memory.
template <typename Seen>
__device__ __forceinline__ void multiply_values(const Context& c, Rows& rows, const Scores& rS,
                                                int tile, const float (&shift)[FRAGMENTS_M][2],
                                                const Seen& seen, const Kept& kept, uint32 p,
                                                uint32 v) {
    const int first_pair = Sharing::first_pair(c.first_row(), c.warp_d * KEYS_PER_WARP);
#pragma unroll
    for (int step = 0; step < Products::STEPS; ++step) {
        Probabilities rP;
        exponentiate(c, rows, rS, rP, tile, step, shift, kept);
        if constexpr (SHARES_ROWS) {
            c.smem.store_p(rP, first_pair, step);
        } else {
            Products::output(rows.rO, rP, v, step, seen);
        }
    }
    if constexpr (SHARES_ROWS) {
        c.smem.publish(seen, c.warp_m * WARPS_D + c.warp_d);
        c.smem.sync(c.rows_barrier());  // P is complete, and the keys that each warp sees are known
        const SeenOfAll<HIDES_KEYS && SHARES_ROWS, WARPS_D, TILES_N> all(c.smem,
                                                                         c.warp_m * WARPS_D);
        multiply_shared_pv<T, LayoutV, Sharing::LayoutP>(rows.rO, p, v, all);
    }
}

// A warp whose rows see no key of the tile copies its part of the tiles, and computes nothing.
__device__ __forceinline__ void skip_tile(const Context& c, Walk& walk, const TileStage& at,
                                          int place) {
    wait_full(c, at, at.barriers_k);
    if (!KV_TOGETHER) release(c, at.barriers_k);
    if (place + 1 < walk.all.end) fill_tile(c, walk, place + 1, walk.next_tile(place));
    if (!KV_TOGETHER) wait_full(c, at, at.barriers_v);
    release(c, at.barriers_v);  // V, and K with it where they share barriers
}

// ---- a block of rows ---------------------------------------------------------------------------

__device__ __forceinline__ void attend(const Context& c, Rows& rows) {
    const TileRange all = LISTED
                              ? TileRange{0, TileLists(c.params).count(list_of(c.params, c.work))}
                              : visible_tiles<BLOCK_N, PACK_GQA>(c.work, c.mask(), 0, BLOCK_M,
                                                                 SPLIT_KV ? c.params.splits : 1);
    if (all.begin >= all.end) return;
    Walk walk(c, all);
    load_q(c);  // has no barrier of its own: that of the first K waits for it, too
    fill_tile(c, walk, all.begin, walk.tile(all.begin));
    if (EARLY_V) fill_v(c, walk, all.begin, walk.tile(all.begin));
    const Operands first(c);
#pragma unroll 1
    for (int place = all.begin; place < all.end; ++place) {
        attend_place(c, rows, walk, first, place);
        walk.advance(place);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    fwd_sm80(const __grid_constant__ AttentionParams params) {
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<128>());
    Work work;
    const BlockSplit which = SPLIT_KV ? block_split(block_index(), grid_size() / params.splits)
                                      : BlockSplit{int(block_index()), 0};
    if (!find_work<LAST_FIRST, VARLEN, PACK_GQA>(params, BLOCK_M, work, which)) return;
    if (thread_index() == 0) {
        smem.kv.init(NUM_THREADS, NUM_THREADS);
        smem.work = work;
        smem.gK = head_row<T>(params.k, params.k_strides, work.batch, work.head_kv, work.start_kv);
        smem.gV = head_row<T>(params.v, params.v_strides, work.batch, work.head_kv, work.start_kv);
    }
    block_sync();  // all threads see the work and the barriers
    const Context context = make_context(params, smem);
    Rows rows;
    rows.rO.clear();
    attend(context, rows);
    if (has_far_rows(context, rows)) attend_exactly(make_context(params, smem), rows);
    if constexpr (WARPS_N > 1 || SPLIT_KV) {
        // With a few queries, as in decoding, most rows of the tile do not exist: leave them out.
        const int end = smem.work.seqlen_q * smem.work.group - smem.work.first_row;
        const RowCombine<WARPS_M, WARPS_N> combine = {
            reinterpret_cast<float*>(smem.sK[0]), context.warp_m, context.warp_n,
            end - context.first_row(), exponent_scale<RULES>(params)};
        combine.warps(rows);
        if constexpr (SPLIT_KV) {
            if (params.splits > 1 && !combine.splits(params, smem.work.split, smem.arrived, rows))
                return;
        }
        if (context.warp_n > 0) return;
    }
    finish(context, rows);
}

}  // namespace flashcore
