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
// Shared memory (SharedStorage in sm90_backward/traits.cuh):
//   | sDS | sOwnQK, sOwnVO | sQK, sVO, NUM_STAGES tiles each | sShift, sDelta | barriers |
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
#include <sm90_backward/producer.cuh>
#include <sm90_backward/store.cuh>
#include <sm90_backward/traits.cuh>
#include <sm90_backward/turns.cuh>

namespace flashcore {

// One of the warpgroups that compute. Of S and of gradients, element 4 n + 2 half + e is of the
// lane's row `half` (0 or 1) and of column 8 n + 2 (lane % 4) + e.
struct Consumer : WarpContext {
    const HopperBackwardParams& p;
    SharedStorage& smem;
    int index;  // of the warpgroup among the consumers
    State state;
    Statistics own[1][2];       // of the lane's queries, where the CTA owns queries
    float rQK[HEAD_DIM / 2];    // dK, or dQ
    float rVO[HEAD_DIM_V / 2];  // dV
    float distances[2];         // SUMS_DISTANCES: of the lane's rows

    // ---- the main loop: one tile of the other side ---------------------------------------------

    __device__ __forceinline__ void attend_tile(const WalkedTile& at, int nth) {
        const int stage = state.stage, first = index * ROWS;
        float rS[BLOCK_N / 2], rdP[BLOCK_N / 2];  // then P and dS
        uint32 rP[STEPS][4], rdS[STEPS][4];       // as T: first operands of 16 columns each
        state.wait_full(smem.qk);
        wgmma_qk<LayoutOwnQK, LayoutQK>(rS, smem.sOwnQK + LayoutOwnQK::step(0, first, 0),
                                        smem.sQK[stage]);
        state.wait_full(smem.vo);
        wgmma_qk<LayoutOwnVO, LayoutVO>(rdP, smem.sOwnVO + LayoutOwnVO::step(0, first, 0),
                                        smem.sVO[stage]);
        Kept kept[1][2];
        look_up_kept(*this, at, kept);
        const bool masked = needs_mask(*this, at.tile);
        if constexpr (SPLITS_STEP) {
            // The exponentials run during the product dP, what follows during dV.
            wgmma_wait<1>();
            fence_registers(rS);
            if (masked) {
                exponentiate<true>(at, rS);
            } else {
                exponentiate<false>(at, rS);
            }
        } else {
            wgmma_wait<0>();
            fence_registers(rS);
            fence_registers(rdP);
            if (masked) {
                differentiate_tile<true>(at, kept, rS, rdP);
            } else {
                differentiate_tile<false>(at, kept, rS, rdP);
            }
        }
        if constexpr (OWNS_KEYS) multiply_dv(stage, kept[0], rS, rP);
        if constexpr (SPLITS_STEP) {
            wgmma_wait<OWNS_KEYS ? 1 : 0>();
            fence_registers(rdP);
            if (masked) {
                multiply_p<true>(kept[0], rS, rdP);
            } else {
                multiply_p<false>(kept[0], rS, rdP);
            }
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
                wgmma_pv<LayoutQK>(rQK, rdS, smem.sQK[stage]);
                wgmma_wait<1>();
                fence_registers(rDQ);
                fence_registers(rVO);
                state.release(smem.vo);                    // dO
                add_dq(*this, smem, at, nth, index, rDQ);  // during dK's product
            }
        }
        if (!adds) wgmma_pv<LayoutQK>(rQK, rdS, smem.sQK[stage]);
        wgmma_wait<0>();
        if (!adds) {
            if constexpr (OWNS_KEYS) fence_registers(rVO);
            state.release(smem.vo);
        }
        fence_registers(rQK);
        if constexpr (OWNS_KEYS) warp_sync();  // all lanes have read the statistics
        state.release(smem.qk);
    }

    // dV += P^T dO starts, of the P that dropout has kept.
    __device__ __forceinline__ void multiply_dv(int stage, const Kept (&kept)[2],
                                                const float (&rS)[BLOCK_N / 2],
                                                uint32 (&rP)[STEPS][4]) {
        pack_p<T>(rP, rS);
#pragma unroll
        for (int i = 0; SPLITS_STEP && i < STEPS * 4; ++i)
            rP[i / 4][i % 4] = kept[i % 2].select(i / 2, rP[i / 4][i % 4]);
        wgmma_pv<LayoutVO>(rVO, rP, smem.sVO[stage]);
    }

    // P takes the place of S.
    template <bool MASKED>
    __device__ __forceinline__ void exponentiate(const WalkedTile& at, float (&rS)[BLOCK_N / 2]) {
        each_pair([&](int i, int n, int half, const Statistics(&of)[2]) {
#pragma unroll
            for (int e = 0; e < 2; ++e)
                rS[i + e] =
                    probability<MASKED>(*this, at, 0, half, n, e, Bits(), rS[i + e], of[e].shift);
        });
    }

    // dS takes the place of dP.
    template <bool MASKED>
    __device__ __forceinline__ void multiply_p(const Kept (&kept)[2],
                                               const float (&rP)[BLOCK_N / 2],
                                               float (&rdP)[BLOCK_N / 2]) {
        each_pair([&](int i, int n, int half, const Statistics(&of)[2]) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float dp = kept[half].select(n, e, rdP[i + e] * keep_scale<RULES>(p));
                rdP[i + e] = score_gradient<MASKED>(rP[i + e], dp, of[e].delta);
            }
        });
    }

    // Both, with a rule's derivative.
    template <bool MASKED>
    __device__ __forceinline__ void differentiate_tile(const WalkedTile& at,
                                                       const Kept (&kept)[1][2],
                                                       float (&rS)[BLOCK_N / 2],
                                                       float (&rdP)[BLOCK_N / 2]) {
        const Bits all;
        each_pair([&](int i, int n, int half, const Statistics(&of)[2]) {
            const float s[2] = {rS[i], rS[i + 1]}, dp[2] = {rdP[i], rdP[i + 1]};
            const auto added = [&](const Meeting& x, float dt) {
                if (SUMS_DISTANCES) distances[half] += dt * distance(x);
            };
            const PairOfGradients pair =
                differentiate<MASKED>(*this, at, 0, half, n, all, kept[0][half], s, dp, of, added);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                rS[i + e] = pair.p[e];
                rdP[i + e] = pair.ds[e];
            }
        });
    }

    // Calls visit(i, n, half, of) for each pair of a lane's neighbouring elements, i and i + 1, of
    // 8-column group n of its row `half`; of: the statistics of their queries.
    template <typename Visit>
    __device__ __forceinline__ void each_pair(Visit visit) const {
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            Statistics of[2];
            if constexpr (OWNS_KEYS) {
                const int query = n * 8 + lane % QUAD * 2;
                const float2 shift = load_pair(&smem.sShift[state.stage][query]);
                const float2 delta = load_pair(&smem.sDelta[state.stage][query]);
                of[0] = {shift.x, delta.x};
                of[1] = {shift.y, delta.y};
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if constexpr (!OWNS_KEYS) of[0] = of[1] = own[0][half];
                visit(4 * n + 2 * half, n, half, of);
            }
        }
    }

    __device__ __forceinline__ static float2 load_pair(const float* address) {
        return *reinterpret_cast<const float2*>(address);
    }

    // ---- a block of keys, or of queries --------------------------------------------------------

    // Whether some row of the consumer meets some row of the tile by position.
    __device__ __forceinline__ bool meets(int tile) const {
        const int first = work.first_row + index * ROWS;
        const int rows = OWNS_KEYS ? work.seqlen_kv : work.seqlen_q;
        const RowRange met = rows_met(work, mask(), first, min(first + ROWS, rows) - 1);
        return first < rows && tile * BLOCK_N < met.end && (tile + 1) * BLOCK_N > met.begin;
    }

    __device__ __forceinline__ void attend(const Walk& walk) {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) rQK[i] = 0.0f;
        if constexpr (OWNS_KEYS) {
#pragma unroll
            for (int i = 0; i < HEAD_DIM_V / 2; ++i) rVO[i] = 0.0f;
        }
        distances[0] = distances[1] = 0.0f;
        if (walk.count() == 0) return;
        if constexpr (!OWNS_KEYS) load_own_statistics(*this, own);
        mbarrier_wait(&smem.full_own, 0);
#pragma unroll 1
        for (int nth = 0; nth < walk.count(); ++nth) {
            const WalkedTile at = walk[nth];
            if (ADDS_DQ || meets(at.tile)) {
                attend_tile(at, nth);
            } else {  // a tile that only other consumers need
                state.wait_full(smem.qk);
                state.release(smem.qk);
                state.wait_full(smem.vo);
                state.release(smem.vo);
            }
            state.advance();
        }
    }

    // ---- the end -------------------------------------------------------------------------------

    __device__ __forceinline__ void finish() const {
        if constexpr (SUMS_DISTANCES) {
            const int64 first = statistics_row(p, work.batch, work.head);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = group_sum<QUAD>(distances[half]);
                const int query = work.first_row + row(0, half);
                if (lane % QUAD == 0 && query < work.seqlen_q) p.distances[first + query] = sum;
            }
        }
        if constexpr (OWNS_KEYS) {
            if (p.dv != nullptr)
                store_gradient<2, DIM_V>(*this, rVO, keep_scale<RULES>(p), p.dv, p.dv_strides);
        }
        void* const gradient = OWNS_KEYS ? p.dk : p.dq;
        if (gradient != nullptr)
            store_gradient<1, DIM_QK>(*this, rQK, p.softmax_scale, gradient,
                                      OWNS_KEYS ? p.dk_strides : p.dq_strides);
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
    }
    block_sync();  // all warps see the barriers
    const int warp = shfl(int(thread_index()) / WARP_SIZE, 0);
    const int lane = thread_index() % WARP_SIZE, first_row = (warp - WARPGROUP_WARPS) * 16;
    const WarpContext context = {params, work, first_row, lane};
    const Walk walk(context);
    if (warp < WARPGROUP_WARPS) {
        if constexpr (MOVES_REGISTERS) registers_dec<PRODUCER_REGISTERS>();
        if (warp == 0) run_producer(params, smem, work, walk);
        if (ORDERED && warp == 1) take_turns(context, smem, walk);
    } else {
        if constexpr (MOVES_REGISTERS) registers_inc<CONSUMER_REGISTERS>();
        Consumer consumer = {context, params, smem, warp / WARPGROUP_WARPS - 1};
        consumer.attend(walk);
        consumer.finish();
    }
}

}  // namespace flashcore
