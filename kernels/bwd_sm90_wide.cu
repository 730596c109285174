// bwd_sm90_wide.cu - backward attention for Hopper, for heads of more than 128 columns: dK and dV
// of blocks of keys, which add to dQ. TMA brings the tiles, wgmma multiplies.
//
//   S = scale Q K^T, P = exp(S - LSE), dP = dO V^T, D = rowsum(dO * O) - dLSE
//   dV = P^T dO,  dS = P (dP - D),  dK = scale dS^T Q,  dQ = scale dS K
//
// A CTA owns 64 keys and walks over the queries that see them, 64 at a time, as in bwd_sm90.cu. One
// warpgroup has no registers for both dK and dV of 64 keys by 256 columns. So each gradient has a
// warpgroup of its own, with all columns, and they hand on what the next one needs:
//
//   warpgroup 0, LOADS    warp 0, the producer, starts the copies (sm90_backward/producer.cuh);
//                         warp 1 knows whose turn it is (sm90_backward/turns.cuh)
//   warpgroup 1, HAS_DV   S = K Q^T, P;  dV += P^T dO          P in registers
//                            | P, in fp32
//   warpgroup 2, HAS_DK   dP = V dO^T, dS;  dK += dS^T Q       dS in registers
//                            | dS, in 16 bits
//   warpgroup 3, HAS_DQ   dQ = dS K, added to fp32 sums in global memory
//
// What they hand on goes through shared memory, guarded by mbarriers: nobody waits for a warpgroup
// behind him but for room. So their products run beside each other, each of another step.
//
// CTAs add to a tile of queries by turns (ORDERED): the same bits each time. Or in any order.
// Without ADDS_DQ the last warpgroup has nothing to do.
//
// Keys that positions hide from all queries may hold NaN. Their dS is 0, but 0 * NaN is not: the
// map of K leaves them out, so that they come as zeros.
//
// Shared memory (SharedStorage in sm90_wide_backward/traits.cuh):
//   | sDS, NUM_STAGES | sOwnQK, sOwnVO | sQK, sVO, NUM_STAGES tiles each | sP | sShift, sDelta
//   | barriers |
#include <backward/differentiate.cuh>
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_backward/producer.cuh>
#include <sm90_backward/turns.cuh>
#include <sm90_wide_backward/consumer.cuh>
#include <sm90_wide_backward/dq.cuh>
#include <sm90_wide_backward/traits.cuh>

namespace flashcore {

// ---- dV ----------------------------------------------------------------------------------------

struct ConsumerDV : Consumer {
    float rDV[PARTS_V][COLS_V / 2];

    __device__ __forceinline__ void attend_tile(const WalkedTile& at, int nth) {
        const State state = state_of<NUM_STAGES>(nth);
        const int stage = state.stage;
        float rS[BLOCK_N / 2];  // then P
        uint32 rP[STEPS][4];    // as T: the first operand, of 16 queries each
        state.wait_full(smem.qk);
        wgmma_qk<LayoutOwnQK, LayoutQK>(rS, smem.sOwnQK, smem.sQK[stage]);
        Kept kept[1][2];
        look_up_kept(*this, at, kept);
        wgmma_wait<0>();
        fence_registers(rS);
        if (needs_mask(*this, at.tile)) {
            exponentiate<true>(at, stage, rS);
        } else {
            exponentiate<false>(at, stage, rS);
        }
        hand_on(nth, rS);
        pack_p<T>(rP, rS);
#pragma unroll
        for (int i = 0; i < STEPS * 4; ++i)
            rP[i / 4][i % 4] = kept[0][i % 2].select(i / 2, rP[i / 4][i % 4]);
        state.wait_full(smem.vo);
        multiply_columns<LayoutVO>(rDV, rP, smem.sVO[stage]);
        state.release(smem.vo);
    }

    // P takes the place of S.
    template <bool MASKED>
    __device__ __forceinline__ void exponentiate(const WalkedTile& at, int stage,
                                                 float (&rS)[BLOCK_N / 2]) {
        each_pair(smem.sShift[stage], lane, [&](int i, int n, int half, const float* shift) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float t = rS[i + e];
                if constexpr (RULES & RULE_SCALE_FIRST) t *= p.softmax_scale;
                rS[i + e] = probability<MASKED>(*this, at, 0, half, n, e, Bits(), t, shift[e]);
            }
        });
    }

    __device__ __forceinline__ void hand_on(int nth, const float (&rP)[BLOCK_N / 2]) {
        const PipelineState<1> handing = state_of<1>(nth);
        handing.wait_empty(smem.p);
#pragma unroll
        for (int n = 0; n < TILES_N; ++n)
            handed(n) = {rP[4 * n], rP[4 * n + 1], rP[4 * n + 2], rP[4 * n + 3]};
        warp_sync();  // all lanes have written
        if (elect_one()) mbarrier_arrive(&smem.p.full[handing.stage]);
    }

    __device__ __forceinline__ void run(const Walk& walk) {
        if (walk.count() > 0) mbarrier_wait(&smem.full_own, 0);
#pragma unroll 1
        for (int nth = 0; nth < walk.count(); ++nth) attend_tile(walk[nth], nth);
        if (p.dv != nullptr) store_columns<2, DIM_V>(rDV, keep_scale<RULES>(p), p.dv, p.dv_strides);
    }
};

// ---- dK ----------------------------------------------------------------------------------------

struct ConsumerDK : Consumer {
    float rDK[PARTS][COLS / 2];

    __device__ __forceinline__ void attend_tile(const WalkedTile& at, int nth) {
        const State state = state_of<NUM_STAGES>(nth);
        const int stage = state.stage;
        float rdP[BLOCK_N / 2];  // then dS
        uint32 rdS[STEPS][4];    // as T: the first operand, of 16 queries each
        state.wait_full(smem.vo);
        wgmma_qk<LayoutOwnVO, LayoutVO>(rdP, smem.sOwnVO, smem.sVO[stage]);
        Kept kept[1][2];
        look_up_kept(*this, at, kept);
        wgmma_wait<0>();
        fence_registers(rdP);
        state.release(smem.vo);
        state.wait_full(smem.qk);  // and the statistics
        const PipelineState<1> handing = state_of<1>(nth);
        handing.wait_full(smem.p);
        multiply_p(at, stage, kept[0], rdP);
        warp_sync();  // all lanes have read P and the statistics
        handing.release(smem.p);
        pack_p<T>(rdS, rdP);
        if constexpr (ADDS_DQ) hand_on(state, rdS);
        multiply_columns<LayoutQK>(rDK, rdS, smem.sQK[stage]);
        state.release(smem.qk);
    }

    // dS takes the place of dP. Where P = 0, as of hidden scores, dP may be NaN.
    __device__ __forceinline__ void multiply_p(const WalkedTile& at, int stage,
                                               const Kept (&kept)[2], float (&rdP)[BLOCK_N / 2]) {
        float4 four;
        each_pair(smem.sDelta[stage], lane, [&](int i, int n, int half, const float* delta) {
            if (half == 0) four = handed(n);
            const float pair[2] = {half == 0 ? four.x : four.z, half == 0 ? four.y : four.w};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float dp = rdP[i + e];
                const float dp_kept = kept[half].select(n, e, dp * keep_scale<RULES>(p));
                rdP[i + e] = score_gradient<true>(pair[e], dp_kept, delta[e]);
                if (GATE != GATE_NONE && counts<true>(*this, at, 0, half, n, e, Bits())) {
                    const Meeting x = meeting(at.tile, 0, half, n, e);
                    const int64 row = statistics_row(p, work.batch, at.head) + x.query;
                    gate_gradient<GATE>(p, row, x.key, dp, rdP[i + e]);
                }
            }
        });
    }

    // Writes dS^T into shared memory, with queries as rows.
    __device__ __forceinline__ void hand_on(const State& state, const uint32 (&rdS)[STEPS][4]) {
        // Of four 8 x 8 blocks, a lane points to a row of their transposes.
        const int query = lane / 16 * 8 + lane % 8, key = first_row + lane / 8 % 2 * 8;
        state.wait_empty(smem.ds);
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            stmatrix_x4_trans(
                shared_address(smem.sDS[state.stage] + LayoutDS::element(step * 16 + query, key)),
                rdS[step]);
        fence_proxy_async();  // wgmma sees this thread's dS
        warp_sync();          // all lanes have written
        if (elect_one()) mbarrier_arrive(&smem.ds.full[state.stage]);
    }

    __device__ __forceinline__ void run(const Walk& walk) {
        if (walk.count() > 0) mbarrier_wait(&smem.full_own, 0);
#pragma unroll 1
        for (int nth = 0; nth < walk.count(); ++nth) attend_tile(walk[nth], nth);
        if (p.dk != nullptr) store_columns<1, DIM_QK>(rDK, p.softmax_scale, p.dk, p.dk_strides);
    }
};

// ---- roles -------------------------------------------------------------------------------------

__device__ __forceinline__ void init_barriers(SharedStorage& smem) {
    mbarrier_init(&smem.full_own, 2);  // its two arrays
    if constexpr (ORDERED) {
        for (int i = 0; i < TURNS; ++i) {
            mbarrier_init(&smem.turn[i], 1);
            mbarrier_init(&smem.added[i], WARPGROUP_WARPS);
        }
    }
    // Every lane of the producer arrives with its copies of the statistics. Two warpgroups read
    // each of Q and dO. The first has read Q when it hands on P, so the second alone releases Q.
    smem.qk.init(1 + WARP_SIZE, WARPGROUP_WARPS);
    smem.vo.init(1, 2 * WARPGROUP_WARPS);
    smem.p.init(WARPGROUP_WARPS, WARPGROUP_WARPS);
    smem.ds.init(WARPGROUP_WARPS, WARPGROUP_WARPS);
    fence_mbarrier_init();  // TMA sees the new barriers
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS, 1)
    bwd_sm90_wide(const __grid_constant__ HopperBackwardParams params) {
    // The swizzle of TMA and wgmma depends on the address modulo 1024, so tiles begin on multiples
    // of that. A launch promises less; SMEM_BYTES has 1 KiB to spare for it.
    char* const smem_raw = dynamic_shared<1>();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(
        smem_raw + (1024 - shared_address(smem_raw) % 1024) % 1024);
    Work work;
    const int block = ORDERED ? draw_block(params, smem) : int(block_index());
    if (!find_own_rows(params, block, work)) return;
    if (thread_index() == 0) init_barriers(smem);
    block_sync();  // all warps see the barriers
    const int warp = shfl(int(thread_index()) / WARP_SIZE, 0), role = warp / WARPGROUP_WARPS;
    const int lane = thread_index() % WARP_SIZE, first_row = warp % WARPGROUP_WARPS * 16;
    const WarpContext context = {params, work, first_row, lane};
    const Walk walk(context);
    if (role == LOADS) {
        registers_dec<LOAD_REGISTERS>();
        if (warp == 0) run_producer(params, smem, context, walk);
        if (ORDERED && warp == 1) take_turns(context, smem, walk);
    } else if (role == HAS_DV) {
        registers_inc<DV_REGISTERS>();
        ConsumerDV{{context, params, smem}}.run(walk);
    } else if (role == HAS_DK) {
        registers_inc<DK_REGISTERS>();
        ConsumerDK{{context, params, smem}}.run(walk);
    } else {
        if constexpr (DQ_REGISTERS < 128) registers_dec<DQ_REGISTERS>();
        if constexpr (DQ_REGISTERS > 128) registers_inc<DQ_REGISTERS>();
        if constexpr (ADDS_DQ) ConsumerDQ{{context, params, smem}}.run(walk);
    }
}

}  // namespace flashcore
