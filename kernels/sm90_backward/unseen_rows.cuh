// unseen_rows.cuh - what the consumers of bwd_sm90.cu do about rows that no row of the other side
// meets: their P and dS are 0, but 0 * NaN is not, so they must be zeros in shared memory before
// wgmma multiplies them. What positions hide from all, TMA has left out. These remain:
//
//   behind masks         rows of the tile: all consumers tell each other which ones they meet; with
//                        a block mask where the list says that some may be met by none
//   in packed batches    rows of the tile that are a neighbour's
//   of the own keys      for dQ += dS K both of these: it multiplies a copy without what is not
//                        finite. S needs such keys as they are, for whoever sees them; theirs is a
//                        dS that is NaN already.
#pragma once
#include <backward/context.cuh>
#include <backward/work.cuh>
#include <config.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <sm90_backward/traits.cuh>

namespace flashcore {

// Which of all consumers' threads this one is.
__device__ __forceinline__ int consumer_thread() { return thread_index() - WARPGROUP_THREADS; }

// All consumers have written what wgmma multiplies next.
__device__ __forceinline__ void finish_writing() {
    fence_proxy_async();                            // wgmma sees what this thread has written
    named_barrier_sync(BARRIER_SEEN, NUM_THREADS);  // all have written theirs
}

// ---- behind masks ------------------------------------------------------------------------------

// Looks up which rows of a tile each of this lane's two rows meets; in full blocks, by positions
// alone. As look_up_keys does, but a few at a time: the gradients leave no registers for more.
template <typename VisibleBits>
__device__ __forceinline__ void look_up_rows(const WarpContext& c, const WalkedTile& at,
                                             VisibleBits (&visible)[2]) {
    const bool masked = needs_mask(c, at.tile);
    const bool is_full = LISTED && state_met(c, at) == BLOCK_FULL;
#pragma unroll
    for (int i = 0; i < 2 * VisibleBits::WORDS; ++i) {
        const int half = i % 2, first = i / 2 * 16;
        uint32 word = 0;
#pragma unroll 2
        for (int n = first; n < min(first + 16, TILES_N); ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const Meeting x = c.meeting(at.tile, 0, half, n, e);
                bool seen = is_full || c.rules_for(at.head, x.query).sees_in_mixed(x.key);
                if (masked)
                    seen = seen && x.query < c.work.seqlen_q && c.mask().visible(x.query, x.key);
                if (seen) word |= 1u << VisibleBits::bit(n, e);
            }
        }
        visible[half].words[i / 2] = word;
    }
}

// Overwrites rows of a tile with zeros if no own row of any consumer meets them; the tile is the
// nth for which they do this. seen: those that this warp meets. S and dP have been computed. One
// barrier is enough where all rows are met, because there are two buffers: before a warp writes to
// a buffer again, it passes the next such tile's barrier, at which every warp has read this one.
template <typename Shared>
__device__ __forceinline__ void clear_hidden(const WarpContext& c, Shared& smem, int nth, int stage,
                                             const Bits& seen) {
    const int warp = c.first_row / 16;
    auto& buffer = smem.seen[nth % 2];
    buffer.publish(seen, warp);
    // All warps have published, and their S and dP no longer read the tile.
    named_barrier_sync(BARRIER_SEEN, NUM_THREADS);
    if (buffer.extent().all) return;
    buffer.template clear_unseen<LayoutQK, CONSUMER_WARPS>(smem.sQK[stage], warp);
    if constexpr (OWNS_KEYS)
        buffer.template clear_unseen<LayoutVO, CONSUMER_WARPS>(smem.sVO[stage], warp);
    finish_writing();
}

// ---- in packed batches -------------------------------------------------------------------------

// Overwrites rows of a tile outside [begin, end) with zeros, all consumers together.
template <typename Layout>
__device__ __forceinline__ void clear_outside(T* sTile, int begin, int end) {
    constexpr int CHUNKS = Layout::COLS / Layout::CHUNK;
    for (int i = consumer_thread(); i < Layout::ROWS * CHUNKS; i += NUM_THREADS) {
        const int row = i / CHUNKS;
        if (row >= begin && row < end) continue;
        T* const chunk = sTile + Layout::element(row, i % CHUNKS * Layout::CHUNK);
        *reinterpret_cast<Vector<16>*>(chunk) = Vector<16>();
    }
}

// Overwrites rows of a tile that meet no row of the sequence, its neighbours' among them. All
// consumers do this, before any of them multiplies the tile.
template <typename Shared, typename State>
__device__ __forceinline__ void clear_neighbours(Shared& smem, const State& state,
                                                 const RowRange& met, int tile) {
    const int begin = met.begin - tile * BLOCK_N, end = met.end - tile * BLOCK_N;
    if (begin <= 0 && end >= BLOCK_N) return;
    state.wait_full(smem.qk);
    clear_outside<LayoutQK>(smem.sQK[state.stage], begin, end);
    if constexpr (OWNS_KEYS) {
        state.wait_full(smem.vo);
        clear_outside<LayoutVO>(smem.sVO[state.stage], begin, end);
    }
    finish_writing();
}

// ---- the own keys ------------------------------------------------------------------------------

// Two neighbouring elements, with 0 in place of what is not finite.
__device__ __forceinline__ uint32 finite_or_zero(uint32 pair) {
    constexpr uint32 EXPONENT = IS_BFLOAT16<T> ? 0x7f80 : 0x7c00;
    const uint32 low = (pair & EXPONENT) == EXPONENT ? 0 : 0xffff;
    const uint32 high = (pair >> 16 & EXPONENT) == EXPONENT ? 0 : 0xffff0000;
    return pair & (low | high);
}

// Makes the copy of the own keys, in the same layout.
template <typename Shared>
__device__ __forceinline__ void copy_keys(Shared& smem) {
    const uint4* const from = reinterpret_cast<const uint4*>(smem.sOwnQK);
    uint4* const to = reinterpret_cast<uint4*>(smem.sKeys);
    for (int i = consumer_thread(); i < LayoutOwnQK::BYTES / 16; i += NUM_THREADS) {
        const uint4 x = from[i];
        to[i] = {finite_or_zero(x.x), finite_or_zero(x.y), finite_or_zero(x.z),
                 finite_or_zero(x.w)};
    }
    finish_writing();
}

// What dQ += dS K multiplies.
template <typename Shared>
__device__ __forceinline__ const T* keys_of_dq(const Shared& smem) {
    if constexpr (COPIES_KEYS) {
        return smem.sKeys;
    } else {
        return smem.sOwnQK;
    }
}

}  // namespace flashcore
