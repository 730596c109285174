// traits.cuh - the sizes of bwd_sm90.cu, its shared memory, and its threads.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/params_backward_hopper.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/rules/seen_keys.cuh>
#include <sm90_backward/tiles.cuh>

namespace flashcore {

// Without a rule that changes scores, P and dS are computed one after the other, each while
// products run. With one, both come from the rule's derivative.
constexpr bool SPLITS_STEP =
    !RowRules<T, RULES>::CHANGES_SCORES && !SUMS_DISTANCES && GATE == GATE_NONE;

// ADDS_DQ: dS of a tile, for dQ += dS K over the keys of all consumers. Its units are 64 queries
// by 64 columns: of heads of one unit, consumers take tiles by turns; of wider ones, each has a
// unit.
constexpr int DQ_UNITS = HEAD_DIM / 64, COLS_DQ = 64;

// Whether dQ += dS K multiplies a copy of the own keys in which what is not finite is 0: some of
// them may be hidden from all queries, or be a neighbour's in a packed batch. See unseen_rows.cuh.
constexpr bool COPIES_KEYS = ADDS_DQ && (HIDES_KEYS || VARLEN);

// Named barriers. 0 is block_sync's.
enum NamedBarrier : int {
    BARRIER_DS_WRITTEN = 1,  // all consumers have written their keys' dS
    BARRIER_SEEN = 2,        // all consumers know which rows of a tile they meet, or have cleared
};

// Heads of 64 columns leave room for a consumer's own rows as first operands of S and dP: half of
// what these products would read of shared memory, and a sixth of what a step does.
constexpr bool OWN_IN_REGISTERS = SPLITS_STEP && !HIDES_KEYS && HEAD_DIM <= 64 && HEAD_DIM_V <= 64;

// A multiprocessor has 64K registers, and setmaxnreg moves what the producer does not need to the
// consumers. With one consumer, every thread starts with 255 anyway, the most that it can have.
constexpr bool MOVES_REGISTERS = CONSUMERS > 1;
constexpr int START_REGISTERS = 65536 / CTA_THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
static_assert(!MOVES_REGISTERS || PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                                      (1 + CONSUMERS) * START_REGISTERS,
              "a warpgroup that asks for more waits for ever");

static_assert(BLOCK_M == ROWS * CONSUMERS && WARPS_M == CONSUMER_WARPS, "64 rows per consumer");
static_assert(WARPS_N == 1 && WARPS_D == 1 && !PACK_GQA && !SPLIT_KV && CLUSTER == 1,
              "a consumer has all of its rows' columns");
static_assert(!ADDS_DQ || (OWNS_KEYS && !SUMS_DISTANCES && NUM_STAGES > 1 && BLOCK_N == ROWS &&
                           HEAD_DIM % COLS_DQ == 0 && (DQ_UNITS == 1 || DQ_UNITS == CONSUMERS)),
              "blocks of keys add to the dQ of 64 queries, a unit per consumer");
static_assert(!ORDERED || ADDS_DQ, "an order of additions");
static_assert(!LISTED || (!ADDS_DQ && BLOCK_N == 64), "a consumer meets one block in each tile");
static_assert(GRADIENT_COLS >= HEAD_DIM && (!OWNS_KEYS || GRADIENT_COLS >= HEAD_DIM_V),
              "all columns in one block");

template <bool USED>
struct alignas(1024) SharedDS {
    T sDS[NUM_STAGES][LayoutDS::SIZE];  // BLOCK_N queries x BLOCK_M keys each
};
template <>
struct SharedDS<false> {};

template <bool USED>
struct alignas(1024) SharedKeys {
    T sKeys[LayoutOwnQK::SIZE];  // BLOCK_M x HEAD_DIM: K, where that is finite
};
template <>
struct SharedKeys<false> {};

// With a block mask the producer says which tile a stage holds; guarded as sQK is.
template <bool USED>
struct SharedWalk {
    WalkedTile walked[NUM_STAGES];
};
template <>
struct SharedWalk<false> {};

// Tiles are swizzled as shared_layout.cuh says, which is TMA's and wgmma's swizzle, too. It counts
// from multiples of 1024 bytes.
struct alignas(1024) SharedStorage : SharedDS<ADDS_DQ>, SharedKeys<COPIES_KEYS> {
    T sOwnQK[LayoutOwnQK::SIZE];        // BLOCK_M x HEAD_DIM: K, or Q
    T sOwnVO[LayoutOwnVO::SIZE];        // BLOCK_M x HEAD_DIM_V: V, or dO
    T sQK[NUM_STAGES][LayoutQK::SIZE];  // BLOCK_N x HEAD_DIM each: Q, or K
    T sVO[NUM_STAGES][LayoutVO::SIZE];  // BLOCK_N x HEAD_DIM_V each: dO, or V
    float sShift[NUM_STAGES][BLOCK_N];  // OWNS_KEYS: of the queries; guarded as sQK is
    float sDelta[NUM_STAGES][BLOCK_N];
    uint64 full_own;
    uint64 turn[TURNS], added[TURNS];  // ORDERED: see turns.cuh
    Pipeline<NUM_STAGES> qk, vo;
    // A double buffer: a warp may publish what it sees of one tile while another one still reads
    // what was published for the tile before.
    SeenKeys<HIDES_KEYS, CONSUMER_WARPS, BLOCK_N> seen[2];
    int block;  // ORDERED: which one the CTA has drawn
    Work work;  // of a CTA with masks, whose registers are short of a dozen
    SharedWalk<LISTED> list;
};
static_assert(sizeof(SharedStorage) + 1024 == SMEM_BYTES,
              "flashcore_cupy/select computes the same size, and 1 KiB to align it");
static_assert(sizeof(HopperBackwardParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

}  // namespace flashcore
