// bwd_sm80_bias.cu - the gradient of the bias, on mma.sync. Deterministic: no atomics.
//
//   dBias = the sum of dT over all axes along which the bias is broadcast
//   S = scale Q K^T, P = exp(rules(S) - LSE), dP = dO V^T, dT = P (dP - D)
//
// A CTA owns BLOCK_M queries by BLOCK_N keys of the bias, and walks over the batches and the heads
// that share them. Where the bias has one row, or one column, for all, it walks over all queries,
// or keys, too, and adds up rows or columns at the end. S and dP are computed again, as in
// bwd_sm80.cu, whose pages this kernel shares: the CTA's queries are its own rows. With a block
// mask it looks for each tile in the list of its queries, and passes over those not there.
#include <backward/differentiate.cuh>
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <sm80_backward/producer.cuh>
#include <sm80_backward/traits.cuh>

namespace flashcore {

static_assert(!OWNS_KEYS && NUM_STAGES == 1 && !VARLEN, "queries, and a tile of keys at a time");
// Of dT: which of its values a lane has is said in ptx/mma.cuh.
using BiasTile = AccumulatorTile<FRAGMENTS_M, TILES_N>;
using Bias = typename RowRules<T, RULES>::Bias;
using BiasGradient = typename BiasType<T, (FP32_GRADIENTS & 4) != 0 || sizeof(Bias) == 4>::type;

// A block of the bias's gradient, and what of it is summed: [begin, end) of batches, heads, blocks
// of queries, blocks of keys.
struct Span {
    int begin, end;
};
struct BiasBlock {
    Span batches, heads, queries, keys;
};

// The index-th of a span's parts, if it has `size` of them, or else all.
__device__ __forceinline__ Span take(int& index, bool is_own, int size) {
    if (!is_own) return {0, size};
    const int nth = index % size;
    index /= size;
    return {nth, nth + 1};
}

__device__ __forceinline__ BiasBlock find_block(const BackwardParams& p, int index) {
    BiasBlock b;
    b.keys = take(index, p.bias_columns > 1, div_up(p.seqlen_kv, BLOCK_N));
    b.queries = take(index, p.bias_rows > 1, div_up(p.seqlen_q, BLOCK_M));
    b.heads = take(index, p.bias_heads > 1, p.heads_q);
    b.batches = take(index, p.bias_batches > 1, p.batch);
    return b;
}

// ---- one tile of queries and keys ---------------------------------------------------------------

template <bool MASKED, bool LOOKED_UP>
__device__ __forceinline__ void differentiate_tile(const Context& c, BiasTile& rdT,
                                                   const WalkedTile& at, const Scores& rS,
                                                   const Scores& rdP,
                                                   const Statistics (&of)[FRAGMENTS_M][2]) {
    Visible<LOOKED_UP> visible;
    look_up_keys<MASKED>(c, at, visible);
    AllKept kept;
    look_up_kept(c, at, kept);
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Statistics both[2] = {of[m][half], of[m][half]};
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
                const float s[2] = {rS.x[m][n][2 * half], rS.x[m][n][2 * half + 1]};
                const float dp[2] = {rdP.x[m][n][2 * half], rdP.x[m][n][2 * half + 1]};
                int e = 0;  // of the element that `added` is called for
                const auto added = [&](const Meeting&, float dt) {
                    rdT.x[m][n][2 * half + e++] += dt;
                };
                differentiate<MASKED>(c, at, m, half, n, visible[m][half], kept[m][half], s, dp,
                                      both, added);
            }
        }
    }
}

// Adds the dT of a tile of keys. The CTA's queries are in shared memory.
__device__ __forceinline__ void add_tile(const Context& c, BiasTile& rdT, const WalkedTile& at,
                                         const Statistics (&of)[FRAGMENTS_M][2]) {
    const Work& w = c.work;
    block_sync();  // all warps have read the tile before
    copy_side<false, LayoutQK, LayoutVO>(c, c.smem.sQK[0], c.smem.sVO[0], w.head_kv,
                                         at.tile * BLOCK_N, {0, w.seqlen_kv});
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();  // all threads' copies are in shared memory
    const int state = state_met(c, at);
    if (state == 0) return;
    Scores rS, rdP;
    ProductsQK::scores(rS, ProductsQK::lane_q(c.smem.sOwnQK, c.first_row),
                       ProductsQK::lane_k(c.smem.sQK[0], 0));
    ProductsVO::scores(rdP, ProductsVO::lane_q(c.smem.sOwnVO, c.first_row),
                       ProductsVO::lane_k(c.smem.sVO[0], 0));
    if (needs_mask(c, at.tile)) {
        differentiate_tile<true, HIDES_KEYS>(c, rdT, at, rS, rdP, of);
    } else if (LISTED && state == BLOCK_FULL) {
        differentiate_tile<false, false>(c, rdT, at, rS, rdP, of);
    } else {
        differentiate_tile<false, HIDES_KEYS>(c, rdT, at, rS, rdP, of);
    }
}

// ---- all that a block sums over -----------------------------------------------------------------

// Block masks: the states of a tile of keys in the list of the block of queries, 0 if it is not
// there.
__device__ __forceinline__ uint32 states_of(const Context& c, int tile) {
    return TileLists(c.params).find(list_of(c.params, c.work), tile).states;
}

// Adds the tiles of a block of queries of a head.
__device__ __forceinline__ void add_queries(const Context& c, BiasTile& rdT, const Span& keys) {
    const RangeWalk walk(c);  // the keys that these queries see by position
    const int end = min(keys.end, walk.tiles.end);
    int begin = max(keys.begin, walk.tiles.begin);
    // The copy of queries that no tile waits for would still run when the next ones are copied.
    if constexpr (LISTED)
        while (begin < end && states_of(c, begin) == 0) ++begin;
    if (begin >= end) return;
    block_sync();  // all warps have read the queries before
    load_own_rows(c);
    Statistics of[FRAGMENTS_M][2];
    load_own_statistics(c, of);
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
        const WalkedTile at = {c.work.head, tile, LISTED ? states_of(c, tile) : 0, false};
        if (!LISTED || at.states != 0) add_tile(c, rdT, at, of);
    }
}

// Adds up rows where the bias has one for all: what all warps have of a column comes to be in row 0
// of the tile.
__device__ __forceinline__ void add_rows(const Context& c, BiasTile& rdT) {
    float* const sums = reinterpret_cast<float*>(c.smem.sOwnQK);  // NUM_WARPS x BLOCK_N
    const int own_warp = c.first_row / ROWS_PER_WARP;
    block_sync();  // all warps have read the queries
#pragma unroll
    for (int n = 0; n < TILES_N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float sum = 0.0f;
#pragma unroll
            for (int m = 0; m < FRAGMENTS_M; ++m) sum += rdT.x[m][n][e] + rdT.x[m][n][2 + e];
#pragma unroll
            for (int mask = QUAD; mask < WARP_SIZE; mask *= 2) sum += shfl_xor(sum, mask);
            if (c.lane < QUAD) sums[own_warp * BLOCK_N + n * 8 + c.lane * 2 + e] = sum;
        }
    }
    block_sync();  // all warps have written their sums
    rdT.clear();
    if (c.first_row > 0 || c.lane >= QUAD) return;
#pragma unroll
    for (int n = 0; n < TILES_N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            for (int warp = 0; warp < NUM_WARPS; ++warp)
                rdT.x[0][n][e] += sums[warp * BLOCK_N + n * 8 + c.lane * 2 + e];
}
static_assert(NUM_WARPS * BLOCK_N * 4 <= LayoutOwnQK::BYTES, "the warps' sums fit over Q");

// Adds up columns where the bias has one for all: a row's sum comes to be in column 0.
__device__ __forceinline__ void add_columns(BiasTile& rdT) {
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < TILES_N; ++n)
                sum += rdT.x[m][n][2 * half] + rdT.x[m][n][2 * half + 1];
            rdT.x[m][0][2 * half] = group_sum<QUAD>(sum);
        }
    }
}

__device__ __forceinline__ void store_block(const Context& c, const BiasBlock& b,
                                            const BiasTile& rdT) {
    const BackwardParams& p = c.params;
    const BroadcastStrides& s = p.dbias_strides;
    BiasGradient* const to =
        static_cast<BiasGradient*>(p.dbias) + b.batches.begin * s.batch + b.heads.begin * s.head;
    const int first_query = b.queries.begin * BLOCK_M, first_key = b.keys.begin * BLOCK_N;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_query + c.row(m, half);
            if (row >= p.bias_rows) continue;
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = first_key + n * 8 + c.lane % QUAD * 2 + e;
                    if (column >= p.bias_columns) continue;
                    BiasGradient& x = to[row * s.row + column * s.column];
                    const float sum = rdT.x[m][n][2 * half + e];
                    x = from_float<BiasGradient>(ACCUMULATES ? to_float(x) + sum : sum);
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    bwd_sm80_bias(const __grid_constant__ BackwardParams params) {
    const BackwardParams& p = params;
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<128>());
    const BiasBlock block = find_block(p, block_index());
    BiasTile rdT;
    rdT.clear();
    Work work = {};
    work.group = 1;
    work.seqlen_q = p.seqlen_q;
    work.seqlen_kv = p.seqlen_kv;
    work.diagonal = p.causal_offset;
    const Context context(p, smem, work, 0);
#pragma unroll 1
    for (work.batch = block.batches.begin; work.batch < block.batches.end; ++work.batch) {
#pragma unroll 1
        for (work.head = block.heads.begin; work.head < block.heads.end; ++work.head) {
            work.head_kv = kv_head(p, work.head);
#pragma unroll 1
            for (int m_block = block.queries.begin; m_block < block.queries.end; ++m_block) {
                work.first_row = m_block * BLOCK_M;
                add_queries(context, rdT, block.keys);
            }
        }
    }
    if (p.bias_rows == 1) add_rows(context, rdT);
    if (p.bias_columns == 1) add_columns(rdT);
    store_block(context, block, rdT);
}

}  // namespace flashcore
