// wmma_fused.cu - FlashAttention (Dao et al. 2022, algorithm 1) on WMMA tensor-core fragments.
//
//   O = softmax(softmax_scale * Q K^T) V,  LSE = log sum exp
//
// in one pass over the keys, with nothing of size Sq x Skv in global memory. One thread block owns
// BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time:
//
//   K_j, V_j -> sK, sV              copied by all threads; or by cp.async while tile j-1 is used
//   S = Q K_j^T -> sS, fp32         fragments of 16 x 16, stored: their layout is not specified
//   p = exp(S - m) -> sP, 16 bit    online softmax on the rows of sS, with m and l
//   O = O * exp(m_old - m) + P V_j
//
// Five rungs of the ladder are this file, as rows of the table in select/table.py:
//   wmma_fused_32, _64   tiles of 32 or 64, block-wide softmax, O in shared memory
//   wmma_cp_async        two stages of K and V: the next tile is on its way while this one is used
//   wmma_warp_softmax    a warp owns its 16 rows from S to O: maxima and sums by shuffle, O in
//                        registers, and no block barrier but the one per tile that guards K and V
//   fp8_wmma             the same, with q, k, v as e4m3 (quantised by fp8_quantize.cu)
//
// Shared memory (LD = HEAD_DIM + 8, LD_S = BLOCK_N + 8; a row is a query or a key)
//
//   | sQ BLOCK_M x LD | sK NUM_STAGES x BLOCK_N x LD | sV the same | sS BLOCK_M x LD_S, fp32 |
//   block-wide:  | sO BLOCK_M x LD, fp32 | sPartial | sFactor |
//   warp-owned:  | sFactor |
//
// P lies over S: all of the block's (block-wide), or each warp's 16 rows (warp-owned), whose O
// leaves through the space of sK and sV.
//
// Limits: 16-bit inputs, D and Dv <= HEAD_DIM.
#include <config.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <ladder/block_wide.cuh>
#include <ladder/tile_coord.cuh>
#include <ladder/tile_load.cuh>
#include <ladder/warp_owned.cuh>
#include <ladder/wmma_context.cuh>
#include <ladder/wmma_tile.cuh>

namespace flashcore {

// ---- the main loop -----------------------------------------------------------------------------

template <typename Rows>
__device__ __forceinline__ void attend(const Context& c, float v_scale) {
    const AttentionParams& p = c.params;
    const int kv_end = c.mask.row_end(min(c.first_query + BLOCK_M, p.seqlen_q) - 1);
    const int num_tiles = div_up(kv_end, BLOCK_N);
    if (num_tiles > 0) {
        load_rows<BLOCK_M, DIM_QK>(c.smem.sQ, p.q, p.q_strides, c.tile.batch, c.tile.head,
                                   c.first_query, p.seqlen_q);
        if constexpr (NUM_STAGES == 2) load_kv(c, 0, 0);
    }
    Rows rows(c);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
        const int stage = tile % NUM_STAGES;
        if constexpr (NUM_STAGES == 1) {
            block_sync();  // all are done with the previous tile before it is overwritten
            load_kv(c, tile, stage);
        }
        if constexpr (CP_ASYNC) cp_async_wait<0>();
        // All threads' copies of this tile are there (the first time also those of Q). With two
        // stages all threads are done with the previous tile, too, which the next one overwrites.
        block_sync();
        if (NUM_STAGES == 2 && tile + 1 < num_tiles) load_kv(c, tile + 1, stage ^ 1);
        compute_scores(c, stage);
        rows.sync_rows();  // the row's scores are complete
        if (c.mask.needs_mask(c.first_query, c.first_query + BLOCK_M - 1, tile * BLOCK_N,
                              (tile + 1) * BLOCK_N)) {
            rows.template softmax<true>(c, tile);
        } else {
            rows.template softmax<false>(c, tile);
        }
        rows.sync_rows();  // the row's probabilities are complete, O is rescaled
        rows.accumulate(c, stage);
        // The next tile's scores take P's place after the block barrier above.
    }
    rows.finish(c, v_scale);
}

template <bool WARP>
struct RowsOf {
    using type = BlockWide<Context>;
};
template <>
struct RowsOf<true> {
    using type = WarpOwned<Context>;
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    wmma_fused(const __grid_constant__ AttentionParams params) {
    const TileCoord tile = tile_coord<BOUNDED_RIGHT>(params, BLOCK_M);
    const int warp = thread_index() / WARP_SIZE;
    float score_scale = 1.0f;
    float v_scale = 1.0f;
    if constexpr (FP8) {
        const int64 kv = int64(tile.batch) * params.heads_kv + kv_head(params, tile.head);
        score_scale = params.q_scale[head_index(params, tile)] * params.k_scale[kv];
        v_scale = params.v_scale[kv];
    }
    const Context context = {params,
                             *reinterpret_cast<SharedStorage*>(dynamic_shared<128>()),
                             tile,
                             PositionMask<BOUNDED_RIGHT>(params),
                             tile.m_block * BLOCK_M,
                             score_scale,
                             warp % WARPS_M,
                             warp / WARPS_M};
    attend<RowsOf<WARP_SOFTMAX>::type>(context, v_scale);
}

}  // namespace flashcore
