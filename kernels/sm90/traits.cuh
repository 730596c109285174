// traits.cuh - the sizes of fwd_sm90.cu, its shared memory, and its threads.
#pragma once
#include <config.cuh>
#include <flashcore/output/split_combine.cuh>
#include <flashcore/params_hopper.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/rules/dropout.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/rules/seen_keys.cuh>
#include <flashcore/scheduler/tile_scheduler.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

using LayoutQ = SharedLayout<T, BLOCK_M, HEAD_DIM>;
using LayoutK = SharedLayout<T, BLOCK_N, HEAD_DIM>;
using LayoutV = SharedLayout<T, BLOCK_N, HEAD_DIM_V>;
// A warp's rows of O on their way out. The warp does not wait until they are stored: all CTAs end a
// block at about the same time, and together they write more than L2 takes at once.
using LayoutO = SharedLayout<T, 16, STAGED_COLS>;
using Positions = PositionMask<BOUNDED_RIGHT, BOUNDED_LEFT>;

constexpr int CONSUMER_WARPS = NUM_WARPS;  // the table's warps: those that compute
constexpr int CONSUMER_THREADS = NUM_THREADS;
constexpr int CONSUMERS = CONSUMER_WARPS / WARPGROUP_WARPS;
constexpr int CTA_THREADS = CONSUMER_THREADS + WARPGROUP_THREADS;
constexpr int ROWS = 64;              // of a consumer: wgmma's M
constexpr int TILES_N = BLOCK_N / 8;  // 8-key column groups of S
constexpr int STEPS = BLOCK_N / 16;   // 16-key steps of P V

// Named barriers. 0 is block_sync's.
enum NamedBarrier : int {
    BARRIER_CONSUMER = 1,                              // one consumer's warps; one per consumer
    BARRIER_TURN = BARRIER_CONSUMER + CONSUMERS,       // a consumer and the one before it; one each
    BARRIER_ALL_CONSUMERS = BARRIER_TURN + CONSUMERS,  // all consumers' warps
};

// A multiprocessor has 64K registers, and setmaxnreg moves what the producer does not need to the
// consumers. With one consumer and CTA, every thread starts with 255 anyway, the most that it can
// have.
constexpr bool MOVES_REGISTERS = CONSUMERS > 1 || MIN_BLOCKS > 1;
constexpr int LAUNCH_REGISTERS = 65536 / (MIN_BLOCKS * CTA_THREADS) / 8 * 8;
constexpr bool LISTED = (RULES & RULE_BLOCKS) != 0;  // walks over lists of tiles
// A head's last blocks of rows first: under a causal mask, and often in lists, they are longest.
constexpr bool LAST_FIRST = BOUNDED_RIGHT || LISTED;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 || MIN_BLOCKS > 1 ? 32
                                   : VARLEN || LISTED               ? 40
                                                                    : 24;
constexpr int SHARE_REGISTERS =
    (LAUNCH_REGISTERS * CTA_THREADS - PRODUCER_REGISTERS * WARPGROUP_THREADS) / CONSUMER_THREADS /
    8 * 8;
constexpr int CONSUMER_REGISTERS = SHARE_REGISTERS < 240 ? SHARE_REGISTERS : 240;
constexpr bool HIDES_KEYS = (RULES & HIDING_RULES) != 0;
// How many steps of 16 keys are looked up in masks at a time: all of them where registers allow.
[[maybe_unused]] constexpr int LOOKUPS =
    HEAD_DIM_V > 192                                               ? 1
    : HEAD_DIM_V > 128 || (HEAD_DIM_V > 64 && RULES & SCORE_RULES) ? 2
                                                                   : STEPS;
using Bits = KeyBits<HIDES_KEYS, TILES_N>;
// Other blocks need K and V too, unless all heads that share them are packed into this one.
constexpr uint64 POLICY_KV = PACK_GQA ? EVICT_FIRST : EVICT_LAST;
// Ping-pong: consumers take turns at starting products, so that the softmax of one runs during the
// products of another. Heads wider than 128 have enough products to hide the softmax without turns.
// With masks all consumers synchronise at every tile, which leaves no room for turns. With lists
// two consumers are up to 12 % faster without, and three that look up nothing 9 %. In a short
// causal block three consumers have different numbers of tiles, and turns would delay them: blocks
// of up to SHORT_BLOCK tiles go without.
constexpr bool HAS_TURNS =
    CONSUMERS > 1 && HEAD_DIM <= 128 &&
    (LISTED ? CONSUMERS == 3 && (RULES & (RULE_MASK | RULE_MASK_MOD)) != 0 : !HIDES_KEYS);
constexpr int SHORT_BLOCK = BOUNDED_RIGHT && CONSUMERS == 3 ? 4 : 0;

static_assert(BLOCK_M == ROWS * CONSUMERS && WARPS_M == CONSUMER_WARPS, "64 rows per consumer");
static_assert(WARPS_N == 1 && WARPS_D == 1, "warps do not share rows");
static_assert(STAGED_COLS == 0 || !PACK_GQA && ALIGN_BYTES == 16 && WRITES_OUTPUT<GATE>,
              "boxes of O are rows side by side, of one head and sequence");
static_assert(!DROPS<RULES> || !PACK_GQA, "with dropout, a lane's rows are of one head");
static_assert(CONSUMERS == 1 || !(PACK_GQA || SPLIT_KV), "for few rows: one consumer has them all");
static_assert(LayoutK::SWIZZLED && LayoutV::SWIZZLED, "head dims of whole panels");
static_assert(!LISTED || !(PACK_GQA || SPLIT_KV || VARLEN),
              "a list is of one head's queries, of one length, and is walked over as a whole");
static_assert(!(RULES & RULE_MASK) || RULES & RULE_MASK_CHUNKS,
              "masks that are read key by key are faster in fwd_sm80");

using StateQ = PipelineState<Q_STAGES>;
using StateKV = PipelineState<NUM_STAGES>;
using Scheduler = TileScheduler<BLOCK_M, BLOCK_N, Positions, LAST_FIRST, VARLEN, PACK_GQA, SPLIT_KV,
                                CLUSTER, LISTED>;
using Splits = SplitRows<BLOCK_M, HEAD_DIM_V, CLUSTER>;

// A double buffer: a warp may publish the keys that it sees of one tile while another warp still
// reads what was published for the tile before.
struct alignas(HIDES_KEYS ? 1024 : 4) SeenKeysBuffers {
    SeenKeys<HIDES_KEYS, CONSUMER_WARPS, BLOCK_N> buffer[2];
};

// With lists: which tile a stage holds; and for each buffer of SeenKeysBuffers a barrier, whose
// phase is over when all consumers' warps have published.
struct ListedStages {
    ListedTile tile[NUM_STAGES];
    uint64 published[2];
};

// Tiles are swizzled as shared_layout.cuh says, which is TMA's and wgmma's swizzle, too. It counts
// from multiples of 1024 bytes.
struct alignas(1024) SharedStorage {
    T sQ[Q_STAGES][LayoutQ::SIZE];                              // BLOCK_M x HEAD_DIM each
    T sK[NUM_STAGES][LayoutK::SIZE];                            // BLOCK_N x HEAD_DIM each
    T sV[NUM_STAGES][LayoutV::SIZE];                            // BLOCK_N x HEAD_DIM_V each
    T sO[CONSUMER_WARPS][STAGED_COLS > 0 ? LayoutO::SIZE : 1];  // 16 x STAGED_COLS for each warp
    Pipeline<Q_STAGES> q;
    // K and V have barriers of their own: K is free a whole softmax before V.
    Pipeline<NUM_STAGES> k, v;
    WorkQueue work;  // in registers, a work tile would take a dozen of every thread
    int is_last;     // whether this CTA is the last one to arrive with a split of its rows
    ListedStages listed;
    SeenKeysBuffers seen;
};
static_assert(Splits::SMEM_BYTES <= sizeof(SharedStorage::sK), "a split's partials fit over K");
static_assert(sizeof(SharedStorage) + 1024 == SMEM_BYTES,
              "flashcore_cupy/select computes the same size, and 1 KiB to align it");
static_assert(sizeof(HopperParams) == PARAMS_BYTES, "flashcore_cupy/select packs the same struct");

__device__ __forceinline__ Positions mask_of(const AttentionParams& p, const Work& w) {
    return {p, w.seqlen_kv, w.diagonal};
}

// One past the last key that some query of the sequence sees.
__device__ __forceinline__ int seen_end(const AttentionParams& p, const Work& w) {
    return mask_of(p, w).row_end(w.seqlen_q - 1);
}

__device__ __forceinline__ int rows_of(const Work& w) {
    return PACK_GQA ? w.seqlen_q * w.group : w.seqlen_q;
}

// The tiles of keys, among the block's, that some row of a consumer sees. Where consumers
// synchronise at every tile, and with lists, all of them walk over all tiles.
__device__ __forceinline__ TileRange tiles_of(const AttentionParams& p, const WorkTile& w,
                                              int consumer) {
    if (CONSUMERS == 1 || HIDES_KEYS) return w.tiles;
    const int first_row = consumer * ROWS;
    if (w.first_row + first_row >= rows_of(w)) return {0, 0};
    return visible_tiles<BLOCK_N, PACK_GQA>(w, mask_of(p, w), first_row, first_row + ROWS, 1);
}

}  // namespace flashcore
