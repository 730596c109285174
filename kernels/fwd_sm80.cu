// fwd_sm80.cu - forward attention on mma.sync: scores, probabilities and O stay in registers.
//
//   O = softmax(rules(softmax_scale * Q K^T)) V,  LSE = log sum exp   (FlashAttention-2, Dao 2023)
//
// One thread block owns BLOCK_M rows of one head and walks over the keys, BLOCK_N at a time. A row
// is a query; with PACK_GQA the query heads that share a head of K and V are rows side by side.
//
//   S = Q K_j^T                       ldmatrix + mma, fp32 accumulators
//   S = rules(S), -inf where hidden   score.cuh, mask.cuh
//   m, l, p = exp2(S - m)             on the fragments: a row sits in four neighbouring lanes
//   O = O * exp2(m_old - m) + P V_j   the accumulator layout of S is the operand layout of P
//
// The warps of a block need not be at the same tile: whoever comes first to what is
// still being copied, or to a place that a slower warp still reads, waits there for that alone
// (mbarrier_pipeline.cuh).
// NUM_STAGES = 1: V_j is asked for before S = Q K_j^T, K_{j+1} before P V_j.
// NUM_STAGES = 2: K_{j+1} and V_{j+1}, before P V_j.
//
// Warps: WARPS_M along the rows, FRAGMENTS_M * 16 rows each. Those that share rows either
//   WARPS_N  own different keys of every tile and have m, l, O of their own, merged at the end: for
//            grids that do not fill the GPU with one warp per row; or
//   WARPS_D  share m and P, each with its part of O's columns: for O too wide for one warp.
// With SPLIT_KV several thread blocks share out the keys; the last one to finish merges.
//
// Shared memory (each tile as shared_layout.cuh has it)
//   | sQ, BLOCK_M rows | sK, NUM_STAGES x BLOCK_N rows | sV, NUM_STAGES x BLOCK_N rows | sP, sRow |
//   at the end: the other warps' m, l, O over sK and sV; then O, as T, over sQ
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/params.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/scheduler/schedule.cuh>
#include <flashcore/softmax/exact_row.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/softmax/row_sharing.cuh>
#include <flashcore/softmax/warp_rows.cuh>
#include <flashcore/tile/mma_sync_tile.cuh>
#include <flashcore/tile/mma_tf32_tile.cuh>
#include <flashcore/tile/tile_copy.cuh>

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
constexpr int QUAD = 4;                     // lanes that share a row
constexpr bool SHARES_ROWS = WARPS_D > 1;
// Few tiles per block: the first V is worth asking for before the first K is there.
constexpr bool EARLY_V = NUM_STAGES == 1 && SPLIT_KV;
// What a thread finds once and keeps from tile to tile: where its copies are, the edges of the
// mask, and the addresses of its operands. fp32 and blocks of 512 threads have no registers for it.
// With more than 256 threads per multiprocessor there are some for the copies from sm_90 on; with
// fewer, for all but the operands, and from sm_90 on for these, too.
constexpr bool HAS_ROOM = NUM_THREADS * MIN_BLOCKS <= 256;
constexpr bool KEEPS_WALK =
    sizeof(T) == 2 && NUM_THREADS <= 256 && (HAS_ROOM || CUDA_ARCH >= 900);
constexpr bool KEEPS_EDGES = KEEPS_WALK && HAS_ROOM;
constexpr bool KEEPS_OPERANDS = KEEPS_EDGES && CUDA_ARCH >= 900;
constexpr bool HIDES_KEYS = RowRules<T, RULES>::HIDES_KEYS;
// A gate asks for all scores, and warps that share rows do all tiles together.
constexpr bool SKIPS_TILES = HIDES_KEYS && GATE == GATE_NONE && !SHARES_ROWS;

using Products = TileProducts<T, FRAGMENTS_M, TILES_N, TILES_D, LayoutQ, LayoutK, LayoutV>;
using Scores = Products::Scores;
using Probabilities = Products::Probabilities;
using Rows = WarpRows<FRAGMENTS_M, TILES_D>;
using Sharing = RowSharing<T, WARPS_D, BLOCK_M, BLOCK_N>;
using Bits = KeyBits<HIDES_KEYS, TILES_N>;
using Seen = SeenTogether<HIDES_KEYS && SHARES_ROWS, WARPS_M, WARPS_D, TILES_N>;

static_assert(BLOCK_M % (16 * WARPS_M) == 0, "warps own whole 16-row fragments of the tile");
static_assert(BLOCK_N % (16 * WARPS_N * WARPS_D) == 0, "warps own whole 16-key steps of the tile");
static_assert(HEAD_DIM % 16 == 0 && COLS_PER_WARP % 16 == 0, "the head dims are whole steps");
static_assert(CP_ASYNC && !WARP_SOFTMAX && !FP8 && NUM_STAGES <= 2, "cp.async, up to two stages");
static_assert(!LayoutV::SWIZZLED || WARPS_D == 1 || COLS_PER_WARP % LayoutV::PANEL == 0,
              "a warp's columns begin with a panel: its addresses reckon with it");
constexpr int PANEL_P = Sharing::LayoutP::PANEL;
static_assert(!SHARES_ROWS || KEYS_PER_WARP % PANEL_P == 0 || PANEL_P % KEYS_PER_WARP == 0,
              "a warp's part of P: whole panels, or an equal part of one");
static_assert(!SHARES_ROWS || (WARPS_N == 1 && !SPLIT_KV && NUM_STAGES == 1),
              "warps that share rows have one stage, and nothing to merge");

struct Tiles {
    T sQ[LayoutQ::SIZE > LayoutO::SIZE ? LayoutQ::SIZE : LayoutO::SIZE];
    T sK[NUM_STAGES][LayoutK::SIZE];
    T sV[NUM_STAGES][LayoutV::SIZE];
};
// The block's work lies here rather than in each thread: the main loop needs every register.
struct alignas(128) SharedStorage : Tiles, Sharing, Seen {
    Pipeline<2> places;  // one stage: that of K and that of V; two stages, of K and V each
    Work work;
    int arrived;       // parts of a split row of blocks that have finished
    const T *gK, *gV;  // the sequence's first rows of the head
};
static_assert(sizeof(SharedStorage) == FC_SMEM_BYTES, "config.py computes the same size");
static_assert(sizeof(AttentionParams) == FC_PARAMS_BYTES, "launch.py packs the same struct");
static_assert((WARPS_N - 1) * WARPS_M * Rows::VALUES * WARP_SIZE * int(sizeof(float)) <=
                  int(sizeof(T)) * NUM_STAGES * (LayoutK::SIZE + LayoutV::SIZE),
              "the other warps' results fit over K and V");

// What a thread knows for the whole kernel.
struct Context {
    const AttentionParams& params;
    SharedStorage& smem;
    const Work& work;
    // Made anew wherever it is used: its members are seldom worth their registers.
    __device__ __forceinline__ Mask<CAUSAL, WINDOW> mask() const {
        return {params, work.seqlen_kv, work.diagonal};
    }
    int warp_m, warp_n, warp_d;
    int lane;

    __device__ __forceinline__ int first_row() const { return warp_m * ROWS_PER_WARP; }
    // Where the warps that share rows meet; 0 is block_sync's.
    __device__ __forceinline__ int rows_barrier() const { return 1 + warp_m; }
    // Row of the block's tile: row `half` (0 or 1) of fragment m.
    __device__ __forceinline__ int row(int m, int half) const {
        return first_row() + m * 16 + half * 8 + lane / QUAD;
    }
    __device__ __forceinline__ QueryRow query(int m, int half) const {
        return query_row<PACK_GQA>(work, row(m, half));
    }
    // Where row `row` of the tile lies in q or o.
    __device__ __forceinline__ const T* row_address(const void* base, const Strides& strides,
                                                    int row, bool& valid) const {
        const QueryRow q = query_row<PACK_GQA>(work, row);
        valid = q.valid;
        return head_row<T>(base, strides, work.batch, q.head, work.start_q + q.query);
    }
    // First of this lane's two keys of 8-key tile n of its S.
    __device__ __forceinline__ int key(int tile, int n) const {
        return tile * BLOCK_N + (warp_n + warp_d) * KEYS_PER_WARP + n * 8 +
               thread_index_anew() % QUAD * 2;
    }
    __device__ __forceinline__ GateRow<GATE> gate_row(const QueryRow& q) const {
        const int64 row = (int64(work.batch) * params.heads_q + q.head) * work.seqlen_q + q.query;
        return {params, row, q.valid, RULES & SCORE_RULES ? 1.0f : params.softmax_scale};
    }
};

// From the thread's number, read anew: who computes it after the loop keeps no register through it.
__device__ __forceinline__ Context context_anew(const AttentionParams& params,
                                                SharedStorage& smem) {
    const int thread = thread_index_anew();
    // Through a shuffle, which tells the compiler that a warp's lanes agree on it.
    const int warp = shfl(thread / WARP_SIZE, 0), column = warp / WARPS_M;
    return {params,
            smem,
            smem.work,
            warp % WARPS_M,
            SHARES_ROWS ? 0 : column,
            SHARES_ROWS ? column : 0,
            thread % WARP_SIZE};
}

// This lane's addresses of its warp's first operands; those of K and V in the first stage.
struct Operands {
    uint32 q, k, v, p;

    __device__ __forceinline__ explicit Operands(const Context& c)
        : q(Products::lane_q(c.smem.sQ, c.first_row())),
          k(Products::lane_k(c.smem.sK[0], (c.warp_n + c.warp_d) * KEYS_PER_WARP)),
          v(Products::lane_v(c.smem.sV[0], c.warp_n * KEYS_PER_WARP, c.warp_d * COLS_PER_WARP)),
          p(c.smem.operand(c.first_row())) {}
};

// ---- loads -------------------------------------------------------------------------------------

__device__ __forceinline__ void load_q(const Context& c) {
    const AttentionParams& p = c.params;
    if constexpr (PACK_GQA) {
        const auto row_of = [&](int row, bool& valid) {
            return c.row_address(p.q, p.q_strides, row, valid);
        };
        gather_rows<LayoutQ, DIM_QK, ALIGN_BYTES, NUM_THREADS>(c.smem.sQ, row_of);
    } else {
        TileCopy<LayoutQ, DIM_QK, ALIGN_BYTES, NUM_THREADS>::load(
            c.smem.sQ,
            head_row<T>(p.q, p.q_strides, c.work.batch, c.work.head,
                        c.work.start_q + c.work.first_row),
            p.q_strides.row, 0, c.work.seqlen_q - c.work.first_row);
    }
}

using CopyK = TileCopy<LayoutK, DIM_QK, ALIGN_BYTES, NUM_THREADS>;
using CopyV = TileCopy<LayoutV, DIM_V, ALIGN_BYTES, NUM_THREADS>;

// The walk over the keys: which tiles, and what this thread keeps from one to the next.
struct Walk {
    TileRange all;
    TileRange kept_whole;
    // Of the tiles that are asked for next, where this thread's first piece comes from; and where
    // it goes in K's first stage. It goes as far from V's start in V's.
    const T *next_k, *next_v;
    uint32 place;
    static_assert(!KEEPS_WALK || !CopyV::BY_PIECES ||
                      (LayoutK::PANEL == LayoutV::PANEL && LayoutK::LD == LayoutV::LD),
                  "K and V are copied alike");

    __device__ __forceinline__ Walk(const Context& c, const TileRange& all)
        : all(all),
          kept_whole(whole_of(c)),
          next_k(CopyK::first_piece(c.smem.gK, c.params.k_strides.row, all.begin * BLOCK_N)),
          next_v(CopyV::first_piece(c.smem.gV, c.params.v_strides.row, all.begin * BLOCK_N)),
          place(CopyK::first_place(c.smem.sK[0])) {}

    // Tiles of which every row of the block sees every key.
    __device__ __forceinline__ TileRange whole(const Context& c) const {
        return KEEPS_EDGES ? kept_whole : whole_of(c);
    }
    __device__ static __forceinline__ TileRange whole_of(const Context& c) {
        return tiles_whole<BLOCK_N, PACK_GQA>(c.work, c.mask(), 0, BLOCK_M);
    }

    // Where K and V of a tile have their turn: in which stage, guarded as which places, in the
    // round of which parity.
    struct Turn {
        int stage, place_k, place_v;
        uint32 parity;
    };
    __device__ __forceinline__ Turn turn(int tile) const {
        const uint32 nth = tile - all.begin;
        const int stage = nth % NUM_STAGES;
        return {stage, stage, NUM_STAGES == 1 ? 1 : stage, nth / NUM_STAGES % 2};
    }

    // The last tile may have keys that do not exist or that no query sees, with a window on the
    // left the first one, too.
    __device__ __forceinline__ bool has_all_keys(int tile) const {
        return tile > all.begin && tile + 1 < all.end;
    }
};

__device__ __forceinline__ void load_k(const Context& c, Walk& walk, int tile, int stage) {
    const int64 row_stride = c.params.k_strides.row;
    const int first_key = tile * BLOCK_N;
    if (KEEPS_WALK && CopyK::BY_PIECES && walk.has_all_keys(tile)) {
        CopyK::load_all(walk.place + stage * LayoutK::BYTES, walk.next_k, row_stride);
    } else {
        CopyK::load(c.smem.sK[stage], c.smem.gK + first_key * row_stride, row_stride, 0,
                    c.mask().seqlen_kv - first_key);
    }
    walk.next_k += BLOCK_N * row_stride;
}

// Values that no query of the sequence sees become zeros: their probability is 0, but 0 * NaN is
// not.
__device__ __forceinline__ void load_v(const Context& c, Walk& walk, int tile, int stage) {
    const int64 row_stride = c.params.v_strides.row;
    const int first_key = tile * BLOCK_N;
    if (KEEPS_WALK && CopyV::BY_PIECES && walk.has_all_keys(tile)) {
        CopyV::load_all(walk.place + NUM_STAGES * LayoutK::BYTES + stage * LayoutV::BYTES,
                        walk.next_v, row_stride);
    } else {
        CopyV::load(c.smem.sV[stage], c.smem.gV + first_key * row_stride, row_stride,
                    c.mask().row_begin(0) - first_key,
                    c.mask().row_end(c.work.seqlen_q - 1) - first_key);
    }
    walk.next_v += BLOCK_N * row_stride;
}

// ---- who waits for what ------------------------------------------------------------------------
// Every thread fills its part of a place and every thread leaves it: that one lane does so for its
// warp is 1 % faster, but compute-sanitizer's racecheck cannot follow it.

__device__ __forceinline__ void await_full(const Context& c, const Walk::Turn& turn, int place) {
    mbarrier_wait(&c.smem.places.full[place], turn.parity);
}
// What this thread has asked for belongs to the place; others may read when all of it is there.
__device__ __forceinline__ void tell_filled(const Context& c, int place) {
    if (CopyK::ASYNC) {
        mbarrier_arrive_copied(&c.smem.places.full[place]);
    } else {
        mbarrier_arrive(&c.smem.places.full[place]);  // it has passed through registers
    }
}
__device__ __forceinline__ void await_empty(const Context& c, const Walk::Turn& turn, int place) {
    mbarrier_wait(&c.smem.places.empty[place], turn.parity ^ 1);
}
__device__ __forceinline__ void leave(const Context& c, int place) {
    mbarrier_arrive(&c.smem.places.empty[place]);
}

// Asks for K of a tile; with two stages for V, too, which shares its places.
__device__ __forceinline__ void fill_k(const Context& c, Walk& walk, int tile) {
    const Walk::Turn turn = walk.turn(tile);
    await_empty(c, turn, turn.place_k);
    load_k(c, walk, tile, turn.stage);
    if (NUM_STAGES == 2) load_v(c, walk, tile, turn.stage);
    tell_filled(c, turn.place_k);
}
__device__ __forceinline__ void fill_v(const Context& c, Walk& walk, int tile) {
    const Walk::Turn turn = walk.turn(tile);
    await_empty(c, turn, turn.place_v);
    load_v(c, walk, tile, turn.stage);
    tell_filled(c, turn.place_v);
}

// ---- softmax -----------------------------------------------------------------------------------

__device__ __forceinline__ RowRules<T, RULES> rules_for(const Context& c, const QueryRow& q) {
    return {c.params,        c.work.batch,     q.head,         q.query,
            c.work.seqlen_q, c.work.seqlen_kv, c.work.diagonal};
}

// Which keys masks leave to this lane's rows; where MASKED, positions, too.
using Visible = Bits[FRAGMENTS_M][2];
template <bool MASKED>
__device__ __forceinline__ void look_up_keys(const Context& c, int tile, Visible& visible) {
    if constexpr (HIDES_KEYS) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                visible[m][half] =
                    rules_for(c, c.query(m, half))
                        .template visible<MASKED, TILES_N, TILES_N>(c.mask(), c.key(tile, 0));
    }
}

// Those of the warp's rows together.
__device__ __forceinline__ Bits seen_keys(const Context& c, const Visible& visible) {
    Bits seen;
    if constexpr (HIDES_KEYS) {
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (c.query(m, half).valid) seen.add(visible[m][half]);
        seen.add_rows();
    }
    return seen;
}

// Applies the rules, hides what is hidden, and raises both rows' maxima of fragment m, as far as
// this lane's quad has their keys.
template <bool MASKED>
__device__ __forceinline__ void find_max(const Context& c, const Rows& rows, Scores& rS, int tile,
                                         int m, const Visible& visible, float (&max)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const QueryRow q = c.query(m, half);
        const GateRow<GATE> gate = c.gate_row(q);
        const RowRules<T, RULES> rules = rules_for(c, q);
        // Relative to this lane's first key, so that each comparison is with a constant.
        const int first_key = c.key(tile, 0);
        const int begin = c.mask().row_begin(q.query) - first_key;
        const int end = c.mask().row_end(q.query) - first_key;
        float chain[2] = {rows.state[m][half].max, NEG_INFINITY};
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            float s[2] = {rS.x[m][n][2 * half], rS.x[m][n][2 * half + 1]};
            if constexpr (rules.CHANGES_SCORES) rules.template change<MASKED>(s, first_key + n * 8);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int key = n * 8 + e;
                bool seen = visible[m][half].has(n, e);
                if (MASKED && !HIDES_KEYS) seen = key < end && (!WINDOW || key >= begin);
                gate.score(first_key + key, s[e], seen);
                s[e] = seen ? gate.raw_score(s[e]) : NEG_INFINITY;
                chain[e] = fmaxf(chain[e], s[e]);
            }
            rS.set_pair(m, n, half, s[0], s[1]);
        }
        max[half] = group_max<QUAD>(fmaxf(chain[0], chain[1]));
    }
}

// The same for all fragments.
template <bool MASKED>
__device__ __forceinline__ void find_maxima(const Context& c, const Rows& rows, Scores& rS,
                                            int tile, const Visible& visible,
                                            float (&max)[FRAGMENTS_M][2]) {
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) find_max<MASKED>(c, rows, rS, tile, m, visible, max[m]);
}

// Given the new maxima: O is rescaled where they are not the old ones. max becomes what the
// exponents subtract.
__device__ __forceinline__ void raise_maxima(const Context& c, Rows& rows, int tile,
                                             float (&max)[FRAGMENTS_M][2]) {
    const float scale = exponent_scale<RULES>(c.params);
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            RowState& state = rows.state[m][half];
            const float shift = shift_of(max[m][half], scale);
            factor[half] = raise_max(state, max[m][half], shift, scale);
            max[m][half] = shift;
            c.gate_row(c.query(m, half))
                .tile_max(tile * WARPS_N + c.warp_n, state.max * natural_scale<RULES>(c.params));
        }
        if (warp_any(factor[0] != 1.0f || factor[1] != 1.0f)) rows.scale_output(m, factor);
    }
}

// The probabilities of step `step` of P V.
__device__ __forceinline__ void exponentiate(const Context& c, Rows& rows, const Scores& rS,
                                             Probabilities& rP, int tile, int step,
                                             const float (&max)[FRAGMENTS_M][2]) {
#pragma unroll
    for (int i = 0; i < Products::STEP_TILES; ++i) {
        const int n = step * Products::STEP_TILES + i;
#pragma unroll
        for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float p[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float s = rS.x[m][n][2 * half + e];
                    p[e] = exp2_approx(s * exponent_scale<RULES>(c.params) - max[m][half]);
                    c.gate_row(c.query(m, half))
                        .probability(c.key(tile, n) + e, to_float(from_float<T>(p[e])));
                }
                rows.state[m][half].sum += p[0] + p[1];
                rP.set_pair(m, i, half, p[0], p[1]);
            }
        }
    }
}

// O += P V, a step of keys at a time: while the tensor cores multiply one, the next one's
// exponentials are found.
__device__ __forceinline__ void multiply_values(const Context& c, Rows& rows, const Scores& rS,
                                                int tile, const float (&max)[FRAGMENTS_M][2],
                                                const Bits& seen, uint32 v) {
#pragma unroll
    for (int step = 0; step < Products::STEPS; ++step) {
        Probabilities rP;
        exponentiate(c, rows, rS, rP, tile, step, max);
        Products::output(rows.rO, rP, v, step, seen);
    }
}

// The same where the warps that share rows first put P together.
__device__ __forceinline__ void multiply_values_shared(const Context& c, Rows& rows,
                                                       const Scores& rS, int tile,
                                                       const float (&max)[FRAGMENTS_M][2],
                                                       const Bits& seen, uint32 p, uint32 v) {
    const int first_pair = Sharing::first_pair(c.first_row(), c.warp_d * KEYS_PER_WARP);
#pragma unroll
    for (int step = 0; step < Products::STEPS; ++step) {
        Probabilities rP;
        exponentiate(c, rows, rS, rP, tile, step, max);
        c.smem.put(rP, first_pair, step);
    }
    c.smem.tell(seen, c.warp_m, c.warp_d);
    c.smem.meet(c.rows_barrier());
    multiply_shared_pv<T, LayoutV, Sharing::LayoutP>(rows.rO, p, v, c.smem.all(c.warp_m));
}

// ---- the walk over the keys --------------------------------------------------------------------

// A warp whose rows see no key of the tile takes its part in the copies alone.
__device__ __forceinline__ void pass_tile(const Context& c, Walk& walk, const Walk::Turn& turn,
                                          int tile) {
    await_full(c, turn, turn.place_k);
    if (NUM_STAGES == 1) leave(c, turn.place_k);
    if (tile + 1 < walk.all.end) fill_k(c, walk, tile + 1);
    if (NUM_STAGES == 1) await_full(c, turn, turn.place_v);
    leave(c, turn.place_v);
}

__device__ __forceinline__ void attend_tile(const Context& c, Rows& rows, Walk& walk,
                                            const Operands& kept, int tile) {
    const Operands at = KEEPS_OPERANDS ? kept : Operands(c);
    const Walk::Turn turn = walk.turn(tile);
    const bool has_v = EARLY_V && tile == walk.all.begin;
    if (NUM_STAGES == 1 && !has_v) fill_v(c, walk, tile);

    // Before the scores: all that it takes to look keys up, and they, do not fit the registers.
    const TileRange whole = walk.whole(c);
    const bool cut = tile >= whole.end || (WINDOW && tile < whole.begin);
    Visible visible;
    if (cut) {
        look_up_keys<true>(c, tile, visible);
    } else {
        look_up_keys<false>(c, tile, visible);
    }
    const Bits seen = seen_keys(c, visible);
    if (SKIPS_TILES && !seen.any_in_warp()) return pass_tile(c, walk, turn, tile);

    Scores rS;
    await_full(c, turn, turn.place_k);
    Products::scores(rS, at.q, at.k + turn.stage * LayoutK::BYTES);
    if (NUM_STAGES == 1) leave(c, turn.place_k);

    float max[FRAGMENTS_M][2];
    if (cut && (!HIDES_KEYS || RULES & SCORE_RULES)) {
        find_maxima<true>(c, rows, rS, tile, visible, max);
    } else {
        find_maxima<false>(c, rows, rS, tile, visible, max);
    }
    c.smem.combine(max, c.first_row(), c.warp_d, c.rows_barrier(), fmaxf);
    if (NUM_STAGES == 1) await_full(c, turn, turn.place_v);
    raise_maxima(c, rows, tile, max);
    // Not sooner: slower warps still read what this overwrites (right after S: up to 8 % slower).
    if (tile + 1 < walk.all.end) fill_k(c, walk, tile + 1);
    const uint32 v = at.v + turn.stage * LayoutV::BYTES;
    if constexpr (SHARES_ROWS) {
        multiply_values_shared(c, rows, rS, tile, max, seen, at.p, v);
    } else {
        multiply_values(c, rows, rS, tile, max, seen, v);
    }
    leave(c, turn.place_v);
}

// Whether the loop cannot be trusted with some row of the warp's: see online_softmax.cuh. Warps that share
// rows agree on it, for they have to subtract the same.
__device__ __forceinline__ bool has_far_rows(const Context& c, const Rows& rows) {
    bool is_any = false;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            is_any |= is_far(rows.state[m][half].max, exponent_scale<RULES>(c.params));
    return c.smem.meet_any(c.rows_barrier(), warp_any(is_any));
}

// The warp's rows again, without tensor cores (exact_row.cuh).
__device__ __forceinline__ void attend_exactly(const Context& c, Rows& rows) {
    const Mask<CAUSAL, WINDOW> mask = c.mask();
    const TileRange all =
        tiles_seen<BLOCK_N, PACK_GQA>(c.work, mask, 0, BLOCK_M, SPLIT_KV ? c.params.splits : 1);
    const KeySpan keys = {all.begin * BLOCK_N, min(all.end * BLOCK_N, c.work.seqlen_kv)};
    // This warp's keys of every tile. Those that share rows need all of them for O.
    const auto is_own = [&](int key) {
        return key % BLOCK_N / KEYS_PER_WARP == c.warp_n + c.warp_d;
    };
    const auto has = [&](int key) { return SHARES_ROWS || is_own(key); };
    const int first_col = c.warp_d * COLS_PER_WARP;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow q = c.query(m, half);
            const ExactRow<T, RULES, GATE, DIM_QK, Mask<CAUSAL, WINDOW>> exact = {
                c.params, c.work, mask, q, rules_for(c, q), c.gate_row(q)};
            RowState& state = rows.state[m][half];
            const bool again = exact.template attend<COLS_PER_WARP>(
                state, keys, first_col, DIM_V - first_col, has, is_own,
                [&](int d, int e) -> float& { return rows.rO.x[m][d][2 * half + e]; });
            for (int tile = all.begin; again && tile < all.end; ++tile)
                exact.gate.tile_max(tile * WARPS_N + c.warp_n,
                                    state.max * natural_scale<RULES>(c.params));
        }
    }
}

__device__ __forceinline__ void attend(const Context& c, Rows& rows) {
    const TileRange all =
        tiles_seen<BLOCK_N, PACK_GQA>(c.work, c.mask(), 0, BLOCK_M, SPLIT_KV ? c.params.splits : 1);
    if (all.begin >= all.end) return;
    Walk walk(c, all);
    load_q(c);
    fill_k(c, walk, all.begin);
    if (EARLY_V) fill_v(c, walk, all.begin);
    const Operands at(c);
#pragma unroll 1
    for (int tile = all.begin; tile < all.end; ++tile) attend_tile(c, rows, walk, at, tile);
}

// ---- the end -----------------------------------------------------------------------------------

// Normalises, writes the LSE, and sends O through the warp's own rows of sQ out to memory.
__device__ __forceinline__ void finish(const Context& c, Rows& rows) {
    const AttentionParams& p = c.params;
    float sum[FRAGMENTS_M][2];
    rows.quad_sums(sum);
    c.smem.combine(sum, c.first_row(), c.warp_d, c.rows_barrier(),
                   [](float a, float b) { return a + b; });
    rows.set_sums(sum);
    // A warp's rows of O lie over its own rows of Q; otherwise no warp may read Q any more.
    if (LayoutO::PANEL != LayoutQ::PANEL || LayoutO::LD != LayoutQ::LD) block_sync();
    const int first_col = c.warp_d * COLS_PER_WARP;
#pragma unroll
    for (int m = 0; m < FRAGMENTS_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            RowState& state = rows.state[m][half];
            const QueryRow q = c.query(m, half);
            const GateRow<GATE> gate = c.gate_row(q);
            const float factor =
                finish_row<RULES>(p, c.work, q, gate, state, c.lane % QUAD == 0 && c.warp_d == 0);
            const int element = LayoutO::element(c.row(m, half), first_col);
#pragma unroll
            for (int d = 0; d < TILES_D; ++d) {
                const float (&o)[4] = rows.rO.x[m][d];
                store_pair(c.smem.sQ + LayoutO::step(element, 0, d * 8) + c.lane % QUAD * 2,
                           scaled_output(o[2 * half], factor),
                           scaled_output(o[2 * half + 1], factor));
            }
        }
    }
    warp_sync();  // the warp's part of its rows is complete
    if constexpr (WRITES_OUTPUT<GATE>) {
        const auto row_of = [&](int row, bool& valid) {
            const T* gO = c.row_address(p.o, p.o_strides, c.first_row() + row, valid);
            return const_cast<T*>(gO) + first_col;
        };
        scatter_rows<LayoutO, ROWS_PER_WARP, COLS_PER_WARP, ALIGN_BYTES>(
            c.smem.sQ, c.first_row(), first_col, row_of, min(DIM_V - first_col, COLS_PER_WARP),
            c.lane);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    fwd_sm80(const __grid_constant__ AttentionParams params) {
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<128>());
    Work work;
    const BlockPart part = SPLIT_KV ? block_part(block_index(), grid_size() / params.splits)
                                    : BlockPart{int(block_index()), 0};
    if (!find_work<CAUSAL, VARLEN, PACK_GQA>(params, BLOCK_M, work, part)) return;
    if (thread_index() == 0) {
        smem.places.init(NUM_THREADS, NUM_THREADS);
        smem.work = work;
        smem.gK = head_row<T>(params.k, params.k_strides, work.batch, work.head_kv, work.start_kv);
        smem.gV = head_row<T>(params.v, params.v_strides, work.batch, work.head_kv, work.start_kv);
    }
    block_sync();  // the work and the barriers are there
    const Context context = context_anew(params, smem);
    Rows rows;
    rows.rO.clear();
    attend(context, rows);
    if (has_far_rows(context, rows)) attend_exactly(context_anew(params, smem), rows);
    if constexpr (WARPS_N > 1 || SPLIT_KV) {
        // Rows that do not exist, most of a tile of a few decoded queries, have nothing to tell.
        const int end = smem.work.seqlen_q * smem.work.group - smem.work.first_row;
        const RowMerge<WARPS_M, WARPS_N> merge = {
            reinterpret_cast<float*>(smem.sK[0]), context.warp_m, context.warp_n,
            end - context.first_row(), exponent_scale<RULES>(params)};
        merge.warps(rows);
        if constexpr (SPLIT_KV) {
            if (params.splits > 1 && !merge.splits(params, smem.work.split, smem.arrived, rows))
                return;
        }
        if (context.warp_n > 0) return;
    }
    finish(context, rows);
}

}  // namespace flashcore
