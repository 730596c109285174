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
constexpr int SPLITS = WARPGROUPS * CLUSTER;   // of the keys
constexpr int COLS = HEAD_DIM_V / WARPGROUPS;  // of O that a warpgroup combines
constexpr int OWN_COLS = COLS / CLUSTER;       // and of these, those that it stores
constexpr bool HIDES_KEYS = (RULES & HIDING_RULES) != 0;
// A tile's keys in two halves: the tensor cores work on one while the softmax works on the other.
// With masks the whole tile is looked up first.
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
static_assert(OWN_COLS % 8 == 0, "a warpgroup stores whole groups of columns");
static_assert(LayoutK::SWIZZLED && LayoutV::SWIZZLED, "head dims of whole panels");
static_assert(!(RULES & RULE_MASK) || RULES & RULE_MASK_CHUNKS,
              "masks that are read key by key are faster in fwd_sm80");

// Numbers that every thread of a warpgroup has for its own two rows, in the layout of O's
// accumulators. A thread of another warpgroup that has the same rows finds them at the same place.
template <int COLUMNS>
struct Partials {
    float4 o[COLUMNS / 8][WARPGROUP_THREADS];  // 8-column group n: both rows' two columns
    float4 state[WARPGROUP_THREADS / QUAD];    // m and l of both rows, of four lanes
};

using Given = Partials<(WARPGROUPS > 1 ? COLS : 8)>;  // a lone warpgroup is given nothing
using FromPeer = Partials<(CLUSTER > 1 ? OWN_COLS : 8)>;

struct alignas(1024) SharedStorage {
    T sQ[LayoutQ::SIZE];                          // BLOCK_M x HEAD_DIM
    T sK[WARPGROUPS][NUM_STAGES][LayoutK::SIZE];  // BLOCK_N x HEAD_DIM each
    T sV[WARPGROUPS][NUM_STAGES][LayoutV::SIZE];  // BLOCK_N x HEAD_DIM_V each
    // What warpgroup w is given: by the CTA's other warpgroups, and by its fellow of the peer CTA.
    Given given[WARPGROUPS][WARPGROUPS > 1 ? WARPGROUPS - 1 : 1];
    FromPeer peer[WARPGROUPS];
    uint64 full_q, full_peer;
    uint64 full_k[WARPGROUPS][NUM_STAGES], full_v[WARPGROUPS][NUM_STAGES];
    SeenKeys<HIDES_KEYS, WARPGROUP_WARPS, BLOCK_N> seen[WARPGROUPS];
};
static_assert(sizeof(SharedStorage) + 1024 == SMEM_BYTES,
              "flashcore_cupy/select computes the same size, and 1 KiB to align it");
static_assert(sizeof(HopperParams) == PARAMS_BYTES, "flashcore_cupy/select packs the same struct");

}  // namespace flashcore
