// traits.cuh - the sizes of fwd_sm80.cu, its shared memory, and what a thread keeps in registers.
#pragma once
#include <config.cuh>
#include <flashcore/params.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/dropout.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/rules/seen_keys.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/softmax/row_sharing.cuh>
#include <flashcore/softmax/score_tile.cuh>
#include <flashcore/softmax/warp_rows.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>
#include <flashcore/tile/mma_tf32_tile.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

using LayoutQ = SharedLayout<T, BLOCK_M, HEAD_DIM>;
using LayoutK = SharedLayout<T, BLOCK_N, HEAD_DIM>;
using LayoutV = SharedLayout<T, BLOCK_N, HEAD_DIM_V>;
using LayoutO = SharedLayout<T, BLOCK_M, HEAD_DIM_V>;
constexpr int ROWS_PER_WARP = BLOCK_M / WARPS_M;
constexpr int FRAGMENTS_M = ROWS_PER_WARP / 16;
constexpr int KEYS_PER_WARP = BLOCK_N / (WARPS_N * WARPS_D);
constexpr int TILES_N = KEYS_PER_WARP / 8;  // 8-key accumulator tiles of a warp's S
constexpr int COLS_PER_WARP = HEAD_DIM_V / WARPS_D;
constexpr int TILES_D = COLS_PER_WARP / 8;  // 8-column accumulator tiles of a warp's O
constexpr bool SHARES_ROWS = WARPS_D > 1;
// With two stages, K and V of a tile are copied together and share a stage's barriers.
constexpr bool KV_TOGETHER = NUM_STAGES == 2;
// A CTA with few tiles asks for its first V before its first K is there.
constexpr bool EARLY_V = !KV_TOGETHER && SPLIT_KV;
// What a thread computes once and keeps in registers from tile to tile, where there are enough: the
// addresses of its copies, the edges of the mask, the addresses of its operands. With up to 256
// threads per multiprocessor (HAS_ROOM) there are enough for the copies and the edges, and from
// sm_90 on for the operands, too. With more threads there are enough for the copies alone, from
// sm_90 on. fp32 and CTAs of 512 threads have none to spare.
constexpr bool HAS_ROOM = NUM_THREADS * MIN_BLOCKS <= 256;
constexpr bool LISTED = (RULES & RULE_BLOCKS) != 0;  // walks over a list: tiles are not neighbours
// A head's last blocks of rows first: they are the longest under a causal mask, often in lists.
constexpr bool LAST_FIRST = BOUNDED_RIGHT || LISTED;
constexpr bool KEEPS_COPIES =
    sizeof(T) == 2 && NUM_THREADS <= 256 && (HAS_ROOM || CUDA_ARCH >= 900) && !LISTED;
constexpr bool KEEPS_EDGES = KEEPS_COPIES && HAS_ROOM;
constexpr bool KEEPS_OPERANDS = KEEPS_EDGES && CUDA_ARCH >= 900;
constexpr bool HIDES_KEYS = RowRules<T, RULES>::HIDES_KEYS;
// Whether a warp skips tiles of which its rows see no key: not under a gate, which stores all
// scores, nor where warps share rows, which go through all tiles together.
constexpr bool SKIPS_TILES = HIDES_KEYS && GATE == GATE_NONE && !SHARES_ROWS;

// Named barriers. 0 is block_sync's.
enum NamedBarrier : int {
    BARRIER_ROWS = 1,  // the warps that share rows; one per warp along the rows
};

using Positions = PositionMask<BOUNDED_RIGHT, BOUNDED_LEFT>;
using Products = TileProducts<T, FRAGMENTS_M, TILES_N, TILES_D, LayoutQ, LayoutK, LayoutV>;
using Scores = Products::Scores;
using Probabilities = Products::Probabilities;
using Rows = WarpRows<FRAGMENTS_M, TILES_D>;
using Sharing = RowSharing<T, WARPS_D, BLOCK_M, BLOCK_N>;
// With masks: which of its keys each of a lane's rows sees. Of full tiles nothing is looked up.
template <bool LOOKED_UP>
using Bits = KeyBits<LOOKED_UP, TILES_N>;
template <bool LOOKED_UP>
using Visible = Bits<LOOKED_UP>[FRAGMENTS_M][2];
using Kept = KeptBits<RULES, TILES_N>[FRAGMENTS_M][2];  // with dropout: which probabilities
// Warps that share rows need all of V, but each looks up its own keys alone: they exchange them.
using Seen = SeenKeys<HIDES_KEYS && SHARES_ROWS, WARPS_M * WARPS_D, KEYS_PER_WARP>;

static_assert(!LISTED || !(PACK_GQA || SPLIT_KV || VARLEN),
              "a list is of one head's queries, of one length, and is walked over as a whole");
static_assert(!LISTED || 64 % ROWS_PER_WARP == 0, "a warp's rows are of one block of queries");
static_assert(!DROPS<RULES> || !PACK_GQA, "with dropout, a lane's rows are of one head");
static_assert(BLOCK_M % (16 * WARPS_M) == 0, "warps own whole 16-row fragments of the tile");
static_assert(BLOCK_N % (16 * WARPS_N * WARPS_D) == 0, "warps own whole 16-key steps of the tile");
static_assert(HEAD_DIM % 16 == 0 && COLS_PER_WARP % 16 == 0, "the head dims are whole steps");
static_assert(CP_ASYNC && !WARP_SOFTMAX && !FP8 && NUM_STAGES <= 2, "cp.async, up to two stages");
static_assert(!LayoutV::SWIZZLED || WARPS_D == 1 || COLS_PER_WARP % LayoutV::PANEL == 0,
              "a warp's columns begin with a panel: step_bytes relies on it");
constexpr int PANEL_P = Sharing::LayoutP::PANEL;
static_assert(!SHARES_ROWS || KEYS_PER_WARP % PANEL_P == 0 || PANEL_P % KEYS_PER_WARP == 0,
              "a warp's part of P: whole panels, or an equal part of one");
static_assert(!SHARES_ROWS || (WARPS_N == 1 && !SPLIT_KV && NUM_STAGES == 1),
              "warps that share rows have one stage, and nothing to combine");

struct Tiles {
    // BLOCK_M x HEAD_DIM; in the end O, BLOCK_M x HEAD_DIM_V.
    T sQ[LayoutQ::SIZE > LayoutO::SIZE ? LayoutQ::SIZE : LayoutO::SIZE];
    T sK[NUM_STAGES][LayoutK::SIZE];  // BLOCK_N x HEAD_DIM each
    T sV[NUM_STAGES][LayoutV::SIZE];  // BLOCK_N x HEAD_DIM_V each
};
// The CTA's work lies here rather than in each thread: the main loop needs every register. Tiles
// begin on multiples of 128 bytes, as SharedLayout::step_bytes requires.
struct alignas(128) SharedStorage : Tiles, Sharing, Seen {
    // A full and an empty barrier each. KV_TOGETHER: pair i guards K and V of stage i. Else pair 0
    // guards K, and pair 1 guards V.
    Pipeline<2> kv;
    Work work;
    int arrived;       // splits of the block's keys that have arrived
    const T *gK, *gV;  // the head's rows for the sequence's first key
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");
static_assert(sizeof(AttentionParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");
static_assert((WARPS_N - 1) * WARPS_M * Rows::VALUES * WARP_SIZE * int(sizeof(float)) <=
                  int(sizeof(T)) * NUM_STAGES * (LayoutK::SIZE + LayoutV::SIZE),
              "the other warps' partials fit over K and V");

// What a thread knows for the whole kernel.
struct Context {
    const AttentionParams& params;
    SharedStorage& smem;
    const Work& work;
    int warp_m, warp_n, warp_d;
    int lane;

    // Made where it is used: kept, its members would take registers that few loops can spare.
    __device__ __forceinline__ Positions mask() const {
        return {params, work.seqlen_kv, work.diagonal};
    }
    __device__ __forceinline__ int first_row() const { return warp_m * ROWS_PER_WARP; }
    __device__ __forceinline__ int rows_barrier() const { return BARRIER_ROWS + warp_m; }
    // Which row of the block is this lane's row `half` (0 or 1) of fragment m.
    __device__ __forceinline__ int row(int m, int half) const {
        return first_row() + m * 16 + half * 8 + lane / QUAD;
    }
    __device__ __forceinline__ QueryRow query(int m, int half) const {
        return query_row<PACK_GQA>(work, row(m, half));
    }
    // The address of row `row` of the block in q or o.
    __device__ __forceinline__ const T* row_address(const void* base, const Strides& strides,
                                                    int row, bool& valid) const {
        const QueryRow q = query_row<PACK_GQA>(work, row);
        valid = q.valid;
        return head_row<T>(base, strides, work.batch, q.head, work.start_q + q.query);
    }
    // The first of the keys of the tile that this lane has.
    __device__ __forceinline__ int first_key(int tile) const {
        return tile * BLOCK_N + (warp_n + warp_d) * KEYS_PER_WARP +
               thread_index_volatile() % QUAD * 2;
    }
    __device__ __forceinline__ GateRow<GATE> gate_row(const QueryRow& q) const {
        return gate_of<RULES, GATE>(params, work, q);
    }
    __device__ __forceinline__ RowRules<T, RULES> rules_for(const QueryRow& q) const {
        return rules_of<T, RULES>(params, work, q);
    }
};

// Reads the thread's number again, so that a context that is used after the main loop takes no
// register during it.
__device__ __forceinline__ Context make_context(const AttentionParams& params,
                                                SharedStorage& smem) {
    const int thread = thread_index_volatile();
    // The shuffle tells the compiler that a warp's lanes agree on the warp's number.
    const int warp = shfl(thread / WARP_SIZE, 0), column = warp / WARPS_M;
    return {params,
            smem,
            smem.work,
            warp % WARPS_M,
            SHARES_ROWS ? 0 : column,
            SHARES_ROWS ? column : 0,
            thread % WARP_SIZE};
}

// This lane's ldmatrix addresses of its warp's first operands, K's and V's in the first stage.
struct Operands {
    uint32 q, k, v, p;

    __device__ __forceinline__ explicit Operands(const Context& c)
        : q(Products::lane_q(c.smem.sQ, c.first_row())),
          k(Products::lane_k(c.smem.sK[0], (c.warp_n + c.warp_d) * KEYS_PER_WARP)),
          v(Products::lane_v(c.smem.sV[0], c.warp_n * KEYS_PER_WARP, c.warp_d * COLS_PER_WARP)),
          p(c.smem.operand(c.first_row())) {}
};

}  // namespace flashcore
