// bwd_sm90.cu - backward attention for Hopper: dK and dV of blocks of keys, which add to dQ; or dQ
// of blocks of queries. TMA brings the tiles, wgmma multiplies. Nothing of size Sq x Skv is stored.
//
//   S = scale Q K^T, P = exp(rules(S) - LSE), dP = dO V^T, D = rowsum(dO * O) - dLSE
//   dV = P^T dO,  dS = P (dP - D) rules'(S),  dK = scale dS^T Q,  dQ = scale dS K
//   (FlashAttention-2, Dao 2023, algorithm 2; roles of warps: FlashAttention-3, Shah et al. 2024)
//
// With OWNS_KEYS a CTA owns BLOCK_M keys and walks over the queries that see them, and without the
// other way round, as in bwd_sm80.cu. Rows of S are the CTA's own, so P and dS stay in registers:
// the accumulator layout is the one of a first operand.
//
//   warpgroup 0    warp 0, the producer, starts the copies (sm90_backward/producer.cuh);
//                  warp 1 knows whose turn it is (sm90_backward/turns.cuh)
//   warpgroups 1.. the consumers: 64 own rows each, and their gradients in registers
//
// With ADDS_DQ the CTA that owns keys computes dQ += dS K as well, and adds it to fp32 sums in
// global memory. CTAs add to a tile of queries by turns (ORDERED): the same bits each time. Or in
// any order. Without ADDS_DQ the kernel is compiled twice, once for keys and once for queries, and
// takes 7 products, not 5.
//
// A consumer's step, while the copies of NUM_STAGES tiles are in flight:
//
//   S  = own rows of q or k times the tile's     wgmma, both operands in shared memory
//   dP = own rows of v or dO times the tile's    the same; P meanwhile (backward/differentiate.cuh)
//   dV += P^T dO                                 wgmma, P in registers; dS meanwhile, into sDS
//   dQ = dS K                                    wgmma, both operands in shared memory
//   dK += dS^T Q, or dQ += dS K                  wgmma, dS in registers; dQ into memory meanwhile
//
// With masks, and in packed batches, rows that no row of the other side meets become zeros before
// these products, for they may hold NaN (sm90_backward/unseen_rows.cuh).
//
// With a block mask there are two passes. The producer walks over lists of tiles, one for each head
// (backward/listed_walk.cuh), and says in shared memory which tile a stage holds. A consumer's rows
// are of one block: it computes nothing where that is empty, and asks no rule where it is full.
//
// Shared memory (SharedStorage in sm90_backward/traits.cuh):
//   | sDS, sKeys | sOwnQK, sOwnVO | sQK, sVO, NUM_STAGES tiles each | sShift, sDelta | barriers |
//   With a block mask, behind them: which tile each stage holds.
#include <backward/differentiate.cuh>
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_backward/dq.cuh>
#include <sm90_backward/epilogue.cuh>
#include <sm90_backward/own_rows.cuh>
#include <sm90_backward/producer.cuh>
#include <sm90_backward/tile_gradients.cuh>
#include <sm90_backward/traits.cuh>
#include <sm90_backward/turns.cuh>
#include <sm90_backward/unseen_rows.cuh>

namespace flashcore {

// One of the warpgroups that compute.
struct Consumer : TileGradients {
    const RangeWalk walk;
    int listed;  // LISTED: how many tiles there are
    int index;   // of the warpgroup among the consumers
    OwnRows<LayoutOwnQK, LayoutQK> own_qk;
    OwnRows<LayoutOwnVO, LayoutVO> own_vo;
    float rQK[HEAD_DIM / 2];    // dK, or dQ
    float rVO[HEAD_DIM_V / 2];  // dV
    bool has_begun = false;     // the gradients' sums, which hold nothing before
    int cleared = 0;  // LISTED: tiles of which all consumers have published what they meet

    // ---- the main loop: one tile of the other side ---------------------------------------------

    __device__ __forceinline__ void attend_tile(const WalkedTile& at, int nth) {
        const int stage = state.stage;
        // LISTED: in full blocks all is seen, unless positions hide some.
        const bool is_full =
            LISTED && state_met(*this, at) == BLOCK_FULL && !needs_mask(*this, at.tile);
        if constexpr (LISTED)
            if (!is_full) look_up_rows(*this, at, visible[0]);
        float rS[BLOCK_N / 2], rdP[BLOCK_N / 2];  // then P and dS
        uint32 rP[STEPS][4], rdS[STEPS][4];       // as T: first operands of 16 columns each
        state.wait_full(smem.qk);
        own_qk.multiply(rS, smem.sOwnQK, index, smem.sQK[stage]);
        state.wait_full(smem.vo);
        own_vo.multiply(rdP, smem.sOwnVO, index, smem.sVO[stage]);
        Kept kept[1][2];
        look_up_kept(*this, at, kept);
        const Masking masking = {needs_mask(*this, at.tile), is_full};
        if constexpr (SPLITS_STEP) {
            // The exponentials run during the product dP, what follows during dV.
            wgmma_wait<1>();
            fence_registers(rS);
            exponentiate(at, masking, rS);
        } else {
            wgmma_wait<0>();
            fence_registers(rS);
            fence_registers(rdP);
            differentiate_tile(at, masking, kept[0], rS, rdP);
        }
        if (HIDES_KEYS && (!LISTED || at.has_unseen)) {
            wgmma_wait<0>();  // dP has read the tile, too
            fence_registers(rdP);
            clear_unseen(nth, stage, is_full);
        }
        if constexpr (OWNS_KEYS) multiply_dv(stage, kept[0], rS, rP);
        if constexpr (SPLITS_STEP) {
            wgmma_wait<OWNS_KEYS ? 1 : 0>();
            fence_registers(rdP);
            multiply_p(masking, kept[0], rS, rdP);
        }
        pack_p<T>(rdS, rdP);
        multiply_ds(at, nth, stage, rdS);
    }

    // dQ = dS K and dK += dS^T Q, or dQ += dS K, and the end of the step.
    __device__ __forceinline__ void multiply_ds(const WalkedTile& at, int nth, int stage,
                                                uint32 (&rdS)[STEPS][4]) {
        if constexpr (ADDS_DQ) share_ds(*this, smem, stage, rdS);
        const bool adds = ADDS_DQ && (DQ_UNITS > 1 || nth % CONSUMERS == index);
        if constexpr (ADDS_DQ) {
            if (adds) {
                float rDQ[COLS_DQ / 2];
                multiply_dq(smem, stage, index, rDQ);
                wgmma_pv<LayoutQK>(rQK, rdS, smem.sQK[stage], has_begun);
                wgmma_wait<1>();
                fence_registers(rDQ);
                fence_registers(rVO);
                state.release(smem.vo);                    // dO
                add_dq(*this, smem, at, nth, index, rDQ);  // during dK's product
            }
        }
        if (!adds) wgmma_pv<LayoutQK>(rQK, rdS, smem.sQK[stage], has_begun);
        look_up(nth + 1);
        wgmma_wait<0>();
        if (!adds) {
            if constexpr (OWNS_KEYS) fence_registers(rVO);
            state.release(smem.vo);
        }
        fence_registers(rQK);
        if constexpr (OWNS_KEYS) warp_sync();  // all lanes have read the statistics
        state.release(smem.qk);
    }

    // Looks up which rows of the nth tile the lane's own rows meet, while there are no scores: it
    // takes registers.
    __device__ __forceinline__ void look_up(int nth) {
        if constexpr (HIDES_KEYS) visible[0][0] = visible[0][1] = Bits();  // not kept meanwhile
        // What a list says of the next tile is not known before its stage is full.
        if constexpr (HIDES_KEYS && !LISTED)
            if (nth < walk.count()) look_up_rows(*this, walk[nth], visible[0]);
    }

    // Has the consumers overwrite what none of them meets of a tile.
    __device__ __forceinline__ void clear_unseen(int nth, int stage, bool is_full) {
        Bits seen;
        if (is_full) {
            seen.set_all();
        } else {
            seen = rows_seen(visible);
        }
        if constexpr (HIDES_KEYS) clear_hidden(*this, smem, LISTED ? cleared++ : nth, stage, seen);
    }

    // dV += P^T dO starts, of the P that dropout has kept.
    __device__ __forceinline__ void multiply_dv(int stage, const Kept (&kept)[2],
                                                const float (&rS)[BLOCK_N / 2],
                                                uint32 (&rP)[STEPS][4]) {
        pack_p<T>(rP, rS);
#pragma unroll
        for (int i = 0; SPLITS_STEP && i < STEPS * 4; ++i)
            rP[i / 4][i % 4] = kept[i % 2].select(i / 2, rP[i / 4][i % 4]);
        wgmma_pv<LayoutVO>(rVO, rP, smem.sVO[stage], has_begun);
    }

    // ---- a block of keys, or of queries --------------------------------------------------------

    // Whether some row of the consumer meets some row of the tile by position.
    __device__ __forceinline__ bool meets(int tile) const {
        const int first = work.first_row + index * ROWS;
        const int rows = OWNS_KEYS ? work.seqlen_kv : work.seqlen_q;
        const RowRange met = rows_met(work, mask(), first, min(first + ROWS, rows) - 1);
        return first < rows && tile * BLOCK_N < met.end && (tile + 1) * BLOCK_N > met.begin;
    }

    // What comes before the first tile.
    __device__ __forceinline__ void begin() {
        if constexpr (!OWNS_KEYS) load_own_statistics(*this, own);
        mbarrier_wait(&smem.full_own, 0);
        own_qk.load(*this, smem.sOwnQK);
        own_vo.load(*this, smem.sOwnVO);
        if constexpr (COPIES_KEYS) copy_keys(smem);
        look_up(0);
    }

    __device__ __forceinline__ void attend() {
        forget_registers(rQK);
        if constexpr (OWNS_KEYS) forget_registers(rVO);
        distances[0] = distances[1] = 0.0f;
        const int count = LISTED ? listed : walk.count();
        if (count > 0) begin();
#pragma unroll 1
        for (int nth = 0; nth < count; ++nth) {
            const WalkedTile at = tile_at(nth);
            if constexpr (VARLEN && !HIDES_KEYS) clear_neighbours(smem, state, walk.met, at.tile);
            if (LISTED ? state_met(*this, at) != 0 : ADDS_DQ || HIDES_KEYS || meets(at.tile)) {
                attend_tile(at, nth);
                has_begun = true;
            } else {
                skip_tile(at);
            }
            state.advance();
        }
        if (!has_begun) clear_sums();
    }

    __device__ __forceinline__ WalkedTile tile_at(int nth) {
        if constexpr (LISTED) return wait_walked(smem, state);
        return walk[nth];
    }

    // A tile that only other consumers need.
    __device__ __forceinline__ void skip_tile(const WalkedTile& at) {
        state.wait_full(smem.qk);
        if (!LISTED) state.release(smem.qk);
        state.wait_full(smem.vo);
        if constexpr (LISTED) {
            visible[0][0] = visible[0][1] = Bits();
            if (at.has_unseen) clear_unseen(0, state.stage, false);
            state.release(smem.qk);
        }
        state.release(smem.vo);
    }

    // Of rows that meet nothing.
    __device__ __forceinline__ void clear_sums() {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) rQK[i] = 0.0f;
        if constexpr (OWNS_KEYS) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM_V / 2; ++i) rVO[i] = 0.0f;
        }
    }
};

// ---- roles -------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 1)
    bwd_sm90(const __grid_constant__ HopperBackwardParams params) {
    // The swizzle of TMA and wgmma depends on the address modulo 1024, so tiles begin on multiples
    // of that. A launch promises less; SMEM_BYTES has 1 KiB to spare for it.
    char* const smem_raw = dynamic_shared<1>();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(
        smem_raw + (1024 - shared_address(smem_raw) % 1024) % 1024);
    Work work;
    const int block = ORDERED ? draw_block(params, smem) : int(block_index());
    if (!find_own_rows(params, block, work)) return;
    if (ORDERED && VARLEN && !has_all_blocks(params)) work.seqlen_q = 0;  // nobody waits
    if (thread_index() == 0) {
        mbarrier_init(&smem.full_own, 2);  // its two arrays
        if constexpr (ORDERED) {
            for (int i = 0; i < TURNS; ++i) {
                mbarrier_init(&smem.turn[i], 1);
                mbarrier_init(&smem.added[i], DQ_UNITS > 1 ? CONSUMER_WARPS : WARPGROUP_WARPS);
            }
        }
        // Where there are statistics every lane of the producer arrives with its copies of them.
        smem.qk.init(1 + (OWNS_KEYS ? WARP_SIZE : 0), CONSUMER_WARPS);
        smem.vo.init(1, CONSUMER_WARPS);
        fence_mbarrier_init();  // TMA sees the new barriers
        if constexpr (HIDES_KEYS) smem.work = work;
    }
    block_sync();  // all warps see the barriers
    const int warp = shfl(int(thread_index()) / WARP_SIZE, 0);
    const int lane = thread_index() % WARP_SIZE, first_row = (warp - WARPGROUP_WARPS) * 16;
    const WarpContext context = {params, HIDES_KEYS ? smem.work : work, first_row, lane};
    const RangeWalk walk(context);
    if (warp < WARPGROUP_WARPS) {
        if constexpr (MOVES_REGISTERS) registers_dec<PRODUCER_REGISTERS>();
        if (warp == 0) run_producer(params, smem, context, walk);
        if (ORDERED && warp == 1) take_turns(context, smem, walk);
    } else {
        if constexpr (MOVES_REGISTERS) registers_inc<CONSUMER_REGISTERS>();
        const int listed = LISTED ? count_listed(context) : 0;
        Consumer consumer = {{context, params, smem}, walk, listed, warp / WARPGROUP_WARPS - 1};
        consumer.attend();
        store_gradients(consumer, consumer.rQK, consumer.rVO, consumer.distances);
    }
}

}  // namespace flashcore
