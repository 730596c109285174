// traits.cuh - the sizes of fwd_sm90_cluster.cu, its shared memory, and its threads.
#pragma once
#include <config.cuh>
#include <flashcore/params_hopper.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/rules/seen_keys.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/softmax/score_tile.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

using LayoutQ = SharedLayout<T, BLOCK_M, HEAD_DIM>;
using LayoutK = SharedLayout<T, BLOCK_N, HEAD_DIM>;
using LayoutV = SharedLayout<T, BLOCK_N, HEAD_DIM_V>;
using Positions = PositionMask<BOUNDED_RIGHT, BOUNDED_LEFT>;

constexpr int WARPGROUPS = WARPS_N;            // of a CTA; each has tiles of keys of its own
constexpr int SPLITS = WARPGROUPS * CLUSTER;   // of the keys: the cluster's warpgroups
constexpr int OWN_COLS = HEAD_DIM_V / SPLITS;  // of O that a warpgroup combines and stores
constexpr bool HIDES_KEYS = (RULES & HIDING_RULES) != 0;
// A tile's keys in two halves: the tensor cores work on one while the other is on its way, or while
// the softmax works on it. With masks the whole tile is looked up first.
constexpr int HALVES = HIDES_KEYS || BLOCK_N % 32 != 0 ? 1 : 2;
constexpr int KEYS = BLOCK_N / HALVES;
constexpr int PAIRS = KEYS / 8;   // 8-key column groups of S
constexpr int STEPS = KEYS / 16;  // 16-key steps of P V
// How many steps of 16 keys are looked up in masks at a time.
[[maybe_unused]] constexpr int LOOKUPS = RULES & SCORE_RULES ? 2 : STEPS;
using Bits = KeyBits<HIDES_KEYS, PAIRS>;

// Named barriers. 0 is block_sync's.
enum NamedBarrier : int {
    BARRIER_WARPGROUP = 1,  // one warpgroup's warps; one per warpgroup
};

static_assert(BLOCK_M == 64 && WARPS_M == WARPGROUP_WARPS, "a tile of wgmma's 64 rows");
static_assert(WARPS_D == 1 && !PACK_GQA && !SPLIT_KV && !VARLEN, "one head of one sequence");
static_assert(CLUSTER <= 2, "a CTA has one peer");
static_assert(!ONE_TILE || NUM_STAGES == 1, "one tile is loaded once");
static_assert(OWN_COLS % 8 == 0, "a warpgroup stores whole groups of columns");
static_assert(LayoutK::SWIZZLED && LayoutV::SWIZZLED, "head dims of whole panels");
static_assert(!(RULES & RULE_MASK) || RULES & RULE_MASK_CHUNKS,
              "masks that are read key by key are faster in fwd_sm80");

// What the other warpgroups of the cluster give to one: its own columns of O, over their keys, in
// the accumulators' layout, and m and l. A thread finds what a thread with the same rows has given.
// Who gives to whom in which place: see Warpgroup::neighbour.
constexpr int GIVERS = SPLITS > 1 ? SPLITS - 1 : 1;  // a lone warpgroup is given nothing
constexpr int GROUPS = SPLITS > 1 ? OWN_COLS / 8 : 1;
using InboxRows = float4[GIVERS][WARPGROUP_THREADS / QUAD];  // both rows' number, for four lanes
struct Inbox {
    float4 o[GIVERS][GROUPS][WARPGROUP_THREADS];  // 8 columns: both rows' two
    InboxRows max, sum;                           // m; l at the common m
};

// Who arrives at full_max and at full_o: the CTA's other warps, and who expects the peer's bytes.
constexpr int GIVING_ARRIVALS = (WARPGROUPS - 1) * WARPGROUP_WARPS + (CLUSTER - 1);
constexpr int PEER_MAX_BYTES = (CLUSTER - 1) * WARPGROUPS * int(sizeof(Inbox::max[0]));
constexpr int PEER_O_BYTES =
    (CLUSTER - 1) * WARPGROUPS * int(sizeof(Inbox::o[0]) + sizeof(Inbox::sum[0]));

struct alignas(1024) SharedStorage {
    T sQ[LayoutQ::SIZE];                          // BLOCK_M x HEAD_DIM
    T sK[WARPGROUPS][NUM_STAGES][LayoutK::SIZE];  // BLOCK_N x HEAD_DIM each
    T sV[WARPGROUPS][NUM_STAGES][LayoutV::SIZE];  // BLOCK_N x HEAD_DIM_V each
    Inbox inbox[WARPGROUPS];
    uint64 full_q;
    uint64 full_k[WARPGROUPS][NUM_STAGES][HALVES], full_v[WARPGROUPS][NUM_STAGES];
    uint64 full_max[WARPGROUPS], full_o[WARPGROUPS];  // of the inboxes: m; l and O
    SeenKeys<HIDES_KEYS, WARPGROUP_WARPS, BLOCK_N> seen[WARPGROUPS];
};
static_assert(ALONE ? sizeof(SharedStorage) <= SMEM_BYTES : sizeof(SharedStorage) == SMEM_BYTES,
              "flashcore_cupy/select computes the same size, or more to have a CTA alone");
static_assert(sizeof(HopperParams) == PARAMS_BYTES, "flashcore_cupy/select packs the same struct");

}  // namespace flashcore
