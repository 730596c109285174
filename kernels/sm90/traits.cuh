// traits.cuh - the sizes of fwd_sm90.cu, its shared memory, and which of its threads do what.
#pragma once
#include <config.cuh>
#include <flashcore/output/split_combine.cuh>
#include <flashcore/params.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/rules/seen_keys.cuh>
#include <flashcore/scheduler/schedule.cuh>
#include <flashcore/scheduler/tile_scheduler.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

struct alignas(64) HopperParams : AttentionParams {
    TensorMap q_map, k_map, v_map, o_map;  // of the arrays; v from its first seen key on
};

using LayoutQ = SharedLayout<T, BLOCK_M, HEAD_DIM>;
using LayoutK = SharedLayout<T, BLOCK_N, HEAD_DIM>;
using LayoutV = SharedLayout<T, BLOCK_N, HEAD_DIM_V>;
// What a warp stores through shared memory and does not wait for: all multiprocessors end a block
// at about the same time, and together they write more than L2 takes at once.
using LayoutO = SharedLayout<T, 16, STAGED_COLS>;
using PositionMask = Mask<CAUSAL, WINDOW>;

constexpr int WARPGROUP = 128;  // threads
constexpr int CONSUMERS = NUM_THREADS / WARPGROUP;
constexpr int ROWS = 64;  // of a consumer
constexpr int TILES_N = BLOCK_N / 8;
constexpr int STEPS = BLOCK_N / 16;

// 0 is block_sync's.
enum NamedBarrier : int {
    BARRIER_CONSUMER = 1,                         // a consumer's warps; one per consumer
    BARRIER_TURN = BARRIER_CONSUMER + CONSUMERS,  // a consumer and the one before it
    BARRIER_ALL_CONSUMERS = BARRIER_TURN + CONSUMERS,
};

// A multiprocessor has 64K registers: what the producer does not need goes to the consumers. A lone
// consumer has as many as a thread can have anyway.
constexpr bool MOVES_REGISTERS = CONSUMERS > 1;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
constexpr bool HIDES_KEYS = (RULES & HIDING_RULES) != 0;
// How many steps of 16 keys a mask_mod looks up at a time: all of them, if there are registers.
[[maybe_unused]] constexpr int LOOKUPS =
    HEAD_DIM_V > 192                                               ? 1
    : HEAD_DIM_V > 128 || (HEAD_DIM_V > 64 && RULES & SCORE_RULES) ? 2
                                                                   : STEPS;
using Bits = KeyBits<HIDES_KEYS, TILES_N>;
// Other blocks need K and V too, unless all heads that share them are packed into this one.
constexpr uint64 POLICY_KV = PACK_GQA ? EVICT_FIRST : EVICT_LAST;
// Warpgroups take turns at the tensor cores, so that the softmax of one meets the products of the
// others. They do not take turns in wider heads, which have enough products to hide the softmax,
// nor where they meet for every tile anyway to tell which keys they see. In a short causal block
// three warpgroups have different numbers of tiles, and turns would hold them up.
constexpr bool HAS_TURNS = CONSUMERS > 1 && HEAD_DIM <= 128 && !HIDES_KEYS;
constexpr int SHORT = CAUSAL && CONSUMERS == 3 ? 4 : 0;  // tiles

static_assert(BLOCK_M == ROWS * CONSUMERS && WARPS_M == 4 * CONSUMERS, "64 rows per warpgroup");
static_assert(WARPS_N == 1 && WARPS_D == 1, "warps do not share rows");
static_assert(STAGED_COLS == 0 || !(VARLEN || PACK_GQA) && ALIGN_BYTES == 16 && WRITES_OUTPUT<GATE>,
              "boxes of O are rows side by side, of one head and sequence");
static_assert(CONSUMERS == 1 || !(PACK_GQA || SPLIT_KV), "for a few rows, which one consumer has");
static_assert(LayoutK::SWIZZLED && LayoutV::SWIZZLED, "head dims of whole panels");
static_assert(!(RULES & RULE_MASK) || RULES & RULE_MASK_CHUNKS,
              "others are slower than fwd_sm80's");

using StateQ = PipelineState<Q_STAGES>;
using StateKV = PipelineState<NUM_STAGES>;
using Scheduler =
    TileScheduler<BLOCK_M, BLOCK_N, PositionMask, CAUSAL, VARLEN, PACK_GQA, SPLIT_KV, CLUSTER>;
using Parts = SplitRows<BLOCK_M, HEAD_DIM_V, CLUSTER>;

// A double buffer: a warp may publish what it sees of one tile before another warp has read what
// was published of the tile before.
struct alignas(HIDES_KEYS ? 1024 : 4) SeenKeysOfTiles {
    SeenKeys<HIDES_KEYS, CONSUMERS * 4, BLOCK_N> of[2];
};

// Tiles lie as shared_layout.cuh says, which is TMA's and wgmma's swizzle.
struct alignas(1024) SharedStorage {
    T sQ[Q_STAGES][LayoutQ::SIZE];                             // BLOCK_M x HEAD_DIM each
    T sK[NUM_STAGES][LayoutK::SIZE];                           // BLOCK_N x HEAD_DIM each
    T sV[NUM_STAGES][LayoutV::SIZE];                           // BLOCK_N x HEAD_DIM_V each
    T sO[CONSUMERS * 4][STAGED_COLS > 0 ? LayoutO::SIZE : 1];  // 16 x STAGED_COLS for each warp
    Pipeline<Q_STAGES> q;
    Pipeline<NUM_STAGES> k, v;
    WorkQueue work;  // in registers a work tile would take a dozen of every thread
    int is_last;     // whether this CTA is the last one of split rows
    SeenKeysOfTiles seen;
};
static_assert(Parts::SMEM_BYTES <= sizeof(SharedStorage::sK), "a part takes the place of K");
static_assert(sizeof(SharedStorage) + 1024 == SMEM_BYTES,
              "flashcore_cupy/select computes the same size");
static_assert(sizeof(HopperParams) == PARAMS_BYTES, "flashcore_cupy/select packs the same struct");

__device__ __forceinline__ PositionMask mask_of(const AttentionParams& p, const Work& w) {
    return {p, w.seqlen_kv, w.diagonal};
}

__device__ __forceinline__ int rows_of(const Work& w) {
    return PACK_GQA ? w.seqlen_q * w.group : w.seqlen_q;
}

// The tiles of keys, among the block's, that some row of a consumer sees. Where consumers meet for
// every tile all of them walk over all tiles.
__device__ __forceinline__ TileRange tiles_of(const AttentionParams& p, const WorkTile& w,
                                              int consumer) {
    if (CONSUMERS == 1 || HIDES_KEYS) return w.tiles;
    const int first_row = consumer * ROWS;
    if (w.first_row + first_row >= rows_of(w)) return {0, 0};
    return tiles_seen<BLOCK_N, PACK_GQA>(w, mask_of(p, w), first_row, first_row + ROWS, 1);
}

}  // namespace flashcore
