// fwd_sm90.cu - forward attention for Hopper: TMA brings the tiles, wgmma multiplies them, and a
// warpgroup's softmax runs while its tensor cores work (FlashAttention-3, Shah et al. 2024).
//
//   O = softmax(rules(softmax_scale * Q K^T)) V,  LSE = log sum exp
//
// A thread block owns BLOCK_M rows of queries of one head at a time and walks over the keys from
// the last visible ones to the first, BLOCK_N at a time. Its warpgroups have roles:
//
//   warpgroup 0    one warp finds the blocks' work; one starts the copies of Q, K_j, V_j, as places
//                  become free
//   warpgroups 1.. the consumers: 64 rows each; m, l, O and the scores stay in their registers
//
// A consumer's step j, with K and V of NUM_STAGES tiles in flight:
//
//   S_j = Q K_j^T            wgmma, both operands in shared memory; starts
//   O  += P_{j-1} V_{j-1}    wgmma, P from registers; starts
//   wait for S_j             rules, mask, m, p = exp2(S_j - m): while P V is still running
//   wait for O               O *= exp2(m_old - m), P_j takes the place of P_{j-1}
//
// There are as many thread blocks as multiprocessors; each takes blocks of rows, the longest first,
// until none is left, and loads for the next one while it finishes the last. A row is a query; with
// PACK_GQA the query heads that share a head of K and V are rows side by side. With SPLIT_KV the
// keys of a block of rows are in parts, each taken by itself; see split_combine.cuh. (With CLUSTER
// there is a thread block for every part, and those of a block of rows come and go together.)
//
// Shared memory, tiles as shared_layout.cuh has them, which is TMA's and wgmma's swizzle:
//   | sQ, one or two | sK, NUM_STAGES tiles | sV, NUM_STAGES tiles | sO, or none | barriers, work |
#include <config.cuh>
#include <flashcore/debug.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/output/split_combine.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/rules/seen_keys.cuh>
#include <flashcore/scheduler/schedule.cuh>
#include <flashcore/scheduler/tile_scheduler.cuh>
#include <flashcore/softmax/exact_row.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/online_softmax.cuh>
#include <flashcore/tile/shared_layout.cuh>
#include <flashcore/tile/tma_tile.cuh>
#include <flashcore/tile/wgmma_tile.cuh>

namespace flashcore {

struct alignas(64) HopperParams : AttentionParams {
    TensorMap q_map, k_map, v_map, o_map;  // of the arrays; v from its first seen key on
};

using LayoutQ = SharedLayout<T, BLOCK_M, HEAD_DIM>;
using LayoutK = SharedLayout<T, BLOCK_N, HEAD_DIM>;
using LayoutV = SharedLayout<T, BLOCK_N, HEAD_DIM_V>;
// What a warp stores through shared memory, and does not wait for: all multiprocessors end a block
// at about the same time, and together write more than L2 takes at once.
using LayoutO = SharedLayout<T, 16, STAGED_COLS>;
using PositionMask = Mask<CAUSAL, WINDOW>;

constexpr int WARPGROUP = 128;  // threads
constexpr int CONSUMERS = NUM_THREADS / WARPGROUP;
constexpr int ROWS = 64;  // of a consumer
constexpr int TILES_N = BLOCK_N / 8;
constexpr int STEPS = BLOCK_N / 16;
constexpr int QUAD = 4;  // lanes that share a row
// Named barriers: one per consumer, one per turn, one for all consumers.
constexpr int TURN = 1 + CONSUMERS, MEETING = TURN + CONSUMERS;
// All 64K registers of a multiprocessor: what the producer does not need goes to the consumers. One
// has as many as a thread can have anyway.
constexpr bool MOVES_REGISTERS = CONSUMERS > 1;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
constexpr bool HIDES_KEYS = (RULES & HIDING_RULES) != 0;
// Steps of 16 keys that a mask_mod looks up at a time: all, where there are registers for it.
[[maybe_unused]] constexpr int LOOKUPS =
    HEAD_DIM_V > 192                                               ? 1
    : HEAD_DIM_V > 128 || (HEAD_DIM_V > 64 && RULES & SCORE_RULES) ? 2
                                                                   : STEPS;
using Bits = KeyBits<HIDES_KEYS, TILES_N>;
// Other blocks need K and V, too; of a packed group none does.
constexpr uint64 POLICY_KV = PACK_GQA ? EVICT_FIRST : EVICT_LAST;
// Where there is room, the next block's Q comes while this one's is used.
constexpr int SMEM_LIMIT = 227 * 1024;
constexpr int Q_STAGES =
    (2 * LayoutQ::SIZE + NUM_STAGES * (LayoutK::SIZE + LayoutV::SIZE)) * int(sizeof(T)) + 2048 +
                HIDES_KEYS * 1024 <=
            SMEM_LIMIT
        ? 2
        : 1;
// Warpgroups take turns at the tensor cores, so that the softmax of one meets the products of the
// others. Wider heads have enough products to hide it; in a short causal block three of them, which
// have different numbers of tiles, hold each other up; and where they meet for every tile anyway,
// to tell which keys they see, turns would be a second order to keep.
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

using StagesQ = PipelineState<Q_STAGES>;
using Stages = PipelineState<NUM_STAGES>;
using Dispatch =
    Dispatcher<BLOCK_M, BLOCK_N, PositionMask, CAUSAL, VARLEN, PACK_GQA, SPLIT_KV, CLUSTER>;
using Parts = SplitRows<BLOCK_M, HEAD_DIM_V, CLUSTER>;

// Of two tiles, for a warp may tell what it sees of one before another has read it of the other.
struct alignas(HIDES_KEYS ? 1024 : 4) SeenInTurn {
    SeenKeys<HIDES_KEYS, CONSUMERS * 4, BLOCK_N> of[2];
};

struct alignas(1024) SharedStorage {
    T sQ[Q_STAGES][LayoutQ::SIZE];
    T sK[NUM_STAGES][LayoutK::SIZE];
    T sV[NUM_STAGES][LayoutV::SIZE];
    T sO[CONSUMERS * 4][STAGED_COLS > 0 ? LayoutO::SIZE : 1];  // a tile per warp
    Pipeline<Q_STAGES> q;
    Pipeline<NUM_STAGES> k, v;
    WorkQueue queue;  // the work lies here, too: in registers it would be a dozen in every thread
    int is_last;      // of the parts of split rows
    SeenInTurn seen;
};
static_assert(Parts::SMEM_BYTES <= sizeof(SharedStorage::sK), "a part takes the place of K");
static_assert(sizeof(SharedStorage) + 1024 == FC_SMEM_BYTES, "config.py computes the same size");
static_assert(sizeof(HopperParams) == FC_PARAMS_BYTES, "launch.py packs the same struct");

__device__ __forceinline__ PositionMask mask_of(const AttentionParams& p, const Work& w) {
    return {p, w.seqlen_kv, w.diagonal};
}

__device__ __forceinline__ int rows_of(const Work& w) {
    return PACK_GQA ? w.seqlen_q * w.group : w.seqlen_q;
}

// Of the block's tiles of keys those that some row of a consumer's sees. Where consumers meet for
// every tile all of them walk over all tiles.
__device__ __forceinline__ TileRange tiles_of(const AttentionParams& p, const Item& w, int index) {
    if (CONSUMERS == 1 || HIDES_KEYS) return w.tiles;
    const int first_row = index * ROWS;
    if (w.first_row + first_row >= rows_of(w)) return {0, 0};
    return tiles_seen<BLOCK_N, PACK_GQA>(w, mask_of(p, w), first_row, first_row + ROWS, 1);
}

// ---- the producers -----------------------------------------------------------------------------

// Which boxes of q, k, v some work needs, in the coordinates of their maps.
struct Boxes {
    const HopperParams& p;
    const Item& w;
    int batch, first_value;

    __device__ __forceinline__ Boxes(const HopperParams& p, const Item& w)
        : p(p),
          w(w),
          batch(VARLEN ? 0 : w.batch),
          first_value(VARLEN ? 0 : mask_of(p, w).row_begin(0)) {}  // row 0 of v_map
    __device__ __forceinline__ TileBox q() const {
        const int query = w.start_q + w.first_query;
        // Of a packed group all rows of a query come one after the other: heads before queries.
        if (PACK_GQA) return {&p.q_map, w.head * w.group, query, batch};
        return {&p.q_map, query, w.head, batch};
    }
    __device__ __forceinline__ TileBox k(int tile) const {
        return {&p.k_map, w.start_kv + tile * BLOCK_N, w.head_kv, batch};
    }
    __device__ __forceinline__ TileBox v(int tile) const {
        return {&p.v_map, w.start_kv + tile * BLOCK_N - first_value, w.head_kv, batch};
    }
};

__device__ __forceinline__ void load_block(const HopperParams& p, SharedStorage& smem,
                                           const Item& w, StagesQ& q, Stages& at) {
    const TileRange tiles = w.tiles;
    const Boxes boxes(p, w);
#pragma unroll 1
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
        const int stage = at.stage;
        at.wait_empty(smem.k);
        load_tile_tma<LayoutK, BLOCK_N>(smem.sK[stage], &smem.k.full[stage], boxes.k(tile),
                                        POLICY_KV);
        if (tile == tiles.end - 1) {
            q.wait_empty(smem.q);
            load_tile_tma<LayoutQ, ROWS>(smem.sQ[q.stage], &smem.q.full[q.stage], boxes.q(),
                                         EVICT_FIRST);
            q.advance();
        }
        at.wait_empty(smem.v);
        load_tile_tma<LayoutV, BLOCK_N>(smem.sV[stage], &smem.v.full[stage], boxes.v(tile),
                                        POLICY_KV);
        at.advance();
    }
}

// One warp starts the copies of Q, K_j, V_j, as places become free.
__device__ __forceinline__ void load(const HopperParams& p, SharedStorage& smem) {
    Stages at;
    StagesQ q;
    WorkRing queue;
    ClaimRing claims;
#pragma unroll 1
    while (true) {
        const Item& w = smem.queue.item[queue.stage];
        if (is_end(w)) return;
        load_block(p, smem, w, q, at);
        claims.release(smem.queue.claims);
        claims.advance();
        warp_sync();  // all lanes have read the work
        queue.release(smem.queue.places);
        queue.advance();
        queue.wait_full(smem.queue.places);
    }
}

// ---- a consumer --------------------------------------------------------------------------------

struct Consumer {
    const HopperParams& params;
    SharedStorage& smem;
    int index;  // of the warpgroup, from 0
    Stages at;  // the next tile of keys
    StagesQ q;
    WorkRing queue;
    bool takes_turns;
    Bits visible[2];  // keys of the tile of S, by row
    Bits seen;        // those of the warp's rows together
    int meetings;
    RowState state[2];      // of this lane's rows: lane / 4 and lane / 4 + 8 of the warp's 16
    float rS[BLOCK_N / 2];  // element 4 n + 2 half + e: row `half`, key 8 n + 2 (lane % 4) + e
    uint32 rP[STEPS][4];    // the same as T, pair by pair: the A operand of 16 keys each
    float rO[HEAD_DIM_V / 2];

    __device__ __forceinline__ const Item& work() const { return smem.queue.item[queue.stage]; }
    __device__ __forceinline__ PositionMask mask() const { return mask_of(params, work()); }
    __device__ __forceinline__ static int lane() { return thread_index_anew() % WARP_SIZE; }
    __device__ __forceinline__ static int warp() {  // of all consumers', 16 rows each
        return thread_index_anew() / WARP_SIZE - WARPGROUP / WARP_SIZE;
    }
    __device__ __forceinline__ static int row(int half) {
        return warp() * 16 + half * 8 + lane() / QUAD;
    }
    __device__ __forceinline__ GateRow<GATE> gate_row(const QueryRow& q) const {
        const Work& w = work();
        const int64 row = (int64(w.batch) * params.heads_q + q.head) * w.seqlen_q + q.query;
        return {params, row, q.valid, RULES & SCORE_RULES ? 1.0f : params.softmax_scale};
    }

    // S of the next tile starts, when it is this warpgroup's turn.
    __device__ __forceinline__ void begin_scores() {
        at.wait_full(smem.k);
        await_turn();
        start_scores<LayoutQ, LayoutK>(rS, smem.sQ[q.stage] + LayoutQ::step(0, index * ROWS, 0),
                                       smem.sK[at.stage]);
    }
    __device__ __forceinline__ void begin_output(const Stages& of, int tile) {
        of.wait_full(smem.v);
        clear_unseen(tile, of.stage);
        start_output<LayoutV>(rO, rP, smem.sV[of.stage]);
    }
    // Waits for S; the products with V, where they came after, go on.
    template <int PENDING>
    __device__ __forceinline__ void end_scores() {
        wgmma_wait<PENDING>();
        fence_registers(rS);
        at.release(smem.k);
    }
    __device__ __forceinline__ void end_output(const Stages& of) {
        wgmma_wait<0>();
        fence_registers(rO);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) fence_registers(rP[step]);
        of.release(smem.v);
    }

    __device__ __forceinline__ RowRules<T, RULES> rules_for(const QueryRow& q) const {
        const Work& w = work();
        return {params, w.batch, q.head, q.query, w.seqlen_q, w.seqlen_kv, w.diagonal};
    }
    // Whether some row of the warpgroup's misses some key of the tile by its position.
    __device__ __forceinline__ bool cuts(int tile) const {
        const int first = query_of<PACK_GQA>(work(), index * ROWS);
        const int last = last_query_of<PACK_GQA>(work(), (index + 1) * ROWS);
        return mask().cuts(first, last, tile * BLOCK_N, (tile + 1) * BLOCK_N);
    }
    __device__ __forceinline__ static int first_key(int tile) {  // of this lane's
        return tile * BLOCK_N + thread_index_anew() % QUAD * 2;
    }

    // Which keys masks leave to this lane's rows, looked up before the scores are there.
    template <bool MASKED>
    __device__ __forceinline__ void look_up_keys(int tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            visible[half] =
                rules_for(query_row<PACK_GQA>(work(), row(half)))
                    .template visible<MASKED, TILES_N, LOOKUPS>(mask(), first_key(tile));
    }
    __device__ __forceinline__ void look_up_keys_of(int tile) {
        if constexpr (HIDES_KEYS) {
            if (cuts(tile)) {
                look_up_keys<true>(tile);
            } else {
                look_up_keys<false>(tile);
            }
            seen = Bits();
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (query_row<PACK_GQA>(work(), row(half)).valid) seen.add(visible[half]);
            seen.add_rows();
        }
    }

    // Applies the rules, hides what is hidden, and finds both rows' new maxima.
    template <bool MASKED>
    __device__ __forceinline__ void find_maxima(int tile, float (&max)[2]) {
        const int first_key = this->first_key(tile);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow q = query_row<PACK_GQA>(work(), row(half));
            const GateRow<GATE> gate = gate_row(q);
            const RowRules<T, RULES> rules = rules_for(q);
            // Relative to this lane's first key, so that each comparison is with a constant.
            const int begin = mask().row_begin(q.query) - first_key;
            const int end = mask().row_end(q.query) - first_key;
            float chain[2] = {state[half].max, NEG_INFINITY};
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
                float s[2] = {rS[4 * n + 2 * half], rS[4 * n + 2 * half + 1]};
                if constexpr (rules.CHANGES_SCORES)
                    rules.template change<MASKED>(s, first_key + n * 8);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int key = n * 8 + e;
                    bool seen = visible[half].has(n, e);
                    if (MASKED && !HIDES_KEYS) seen = key < end && (!WINDOW || key >= begin);
                    gate.score(first_key + key, s[e], seen);
                    s[e] = seen ? gate.raw_score(s[e]) : NEG_INFINITY;
                    chain[e] = fmaxf(chain[e], s[e]);
                    rS[4 * n + 2 * half + e] = s[e];
                }
            }
            max[half] = group_max<QUAD>(fmaxf(chain[0], chain[1]));
        }
    }

    // From scores to probabilities, in place, given the new maxima; and the factors for O.
    __device__ __forceinline__ void exponentiate(int tile, const float (&max)[2],
                                                 float (&factor)[2]) {
        const float scale = exponent_scale<RULES>(params);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const GateRow<GATE> gate = gate_row(query_row<PACK_GQA>(work(), row(half)));
            const float shift = shift_of(max[half], scale);
            factor[half] = raise_max(state[half], max[half], shift, scale);
            gate.tile_max(tile, max[half] * natural_scale<RULES>(params));
            float sum[2] = {};
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& s = rS[4 * n + 2 * half + e];
                    s = exp2_approx(s * scale - shift);
                    sum[e] += s;
                    gate.probability(first_key(tile) + n * 8 + e, to_float(from_float<T>(s)));
                }
            }
            state[half].sum += sum[0] + sum[1];
        }
    }

    __device__ __forceinline__ void softmax_of(int tile, float (&factor)[2]) {
        float max[2];
        if ((!HIDES_KEYS || RULES & SCORE_RULES) && cuts(tile)) {
            find_maxima<true>(tile, max);
            exponentiate(tile, max, factor);
        } else {
            find_maxima<false>(tile, max);
            exponentiate(tile, max, factor);
        }
    }

    __device__ __forceinline__ void scale_output(const float (&factor)[2]) {
        if (!warp_any(factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
        for (int e = 0; e < HEAD_DIM_V / 2; ++e) rO[e] *= factor[e / 2 % 2];
    }

    // What no query sees becomes zeros: its probability is 0, but 0 * NaN is not. TMA leaves out
    // what lies outside of all sequences; but in packed batches the box of a sequence's last keys
    // reaches into the next one. That every consumer sees to for itself; they all write the same.
    // (What masks hide they find out together: attend_seen_tiles.)
    __device__ __forceinline__ void clear_unseen(int tile, int stage) {
        if constexpr (!VARLEN) return;
        const int begin = mask().row_begin(0) - tile * BLOCK_N;
        const int end = mask().row_end(work().seqlen_q - 1) - tile * BLOCK_N;
        if (begin <= 0 && end >= BLOCK_N) return;
        for (int key = warp() % 4; key < BLOCK_N; key += 4) {
            if (key >= begin && key < end) continue;
            for (int d = lane() * 2; d < HEAD_DIM_V; d += 2 * WARP_SIZE)
                *reinterpret_cast<uint32*>(smem.sV[stage] + LayoutV::element(key, d)) = 0;
        }
        fence_proxy_async();
        named_barrier_sync(1 + index, WARPGROUP);
    }

    // All consumers tell which keys of the tile they see. Two places in turn: when one is used
    // again, all have met once more, and read it before.
    __device__ __forceinline__ auto& seen_in_turn() { return smem.seen.of[meetings % 2]; }
    __device__ __forceinline__ auto meet() {
        ++meetings;
        seen_in_turn().tell(seen, warp());
        named_barrier_sync(MEETING, NUM_THREADS);
        return seen_in_turn().extent();
    }
    __device__ __forceinline__ void clear_unseen_together() {
        seen_in_turn().template clear_unseen<LayoutV>(smem.sV[at.stage], warp());
        fence_proxy_async();
        named_barrier_sync(MEETING, NUM_THREADS);
    }

    __device__ __forceinline__ void await_turn() const {
        if (HAS_TURNS && takes_turns) named_barrier_sync(TURN + index, 2 * WARPGROUP);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (HAS_TURNS && takes_turns)
            named_barrier_arrive(TURN + (index + 1) % CONSUMERS, 2 * WARPGROUP);
    }

    // Tiles that other warpgroups need.
    __device__ __forceinline__ void skip_tiles(int count) {
#pragma unroll 1
        for (; count > 0; --count) {
            at.wait_full(smem.k);
            at.release(smem.k);
            await_turn();
            pass_turn();
            at.wait_full(smem.v);
            at.release(smem.v);
            at.advance();
        }
    }

    __device__ __forceinline__ void attend_tiles(const TileRange& tiles) {
        float factor[2];
        begin_scores();
        pass_turn();
        end_scores<0>();
        softmax_of(tiles.end - 1, factor);
        take_probabilities<T>(rP, rS);
#pragma unroll 1
        for (int tile = tiles.end - 2; tile >= tiles.begin; --tile) {
            const Stages last = at;
            at.advance();
            begin_scores();
            begin_output(last, tile + 1);
            pass_turn();
            end_scores<1>();
            softmax_of(tile, factor);
            end_output(last);
            take_probabilities<T>(rP, rS);
            scale_output(factor);
        }
        q.release(smem.q);
        begin_output(at, tiles.begin);
        end_output(at);
        at.advance();
    }

    // The same with masks. Which keys of the next tile they leave is looked up while P V runs; then
    // all consumers tell each other what they see. A tile of which nobody sees anything is passed
    // over; of others, values that nobody sees become zeros.
    __device__ __forceinline__ void attend_seen_tiles(const TileRange& tiles) {
        float factor[2];
        look_up_keys_of(tiles.end - 1);
#pragma unroll 1
        for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
            const auto seen_keys = meet();
            if (!seen_keys.some) {
                at.wait_full(smem.k);
                at.release(smem.k);
                at.wait_full(smem.v);
                at.release(smem.v);
                if (tile > tiles.begin) look_up_keys_of(tile - 1);
            } else {
                begin_scores();
                end_scores<0>();
                softmax_of(tile, factor);
                take_probabilities<T>(rP, rS);
                scale_output(factor);
                at.wait_full(smem.v);
                if (!seen_keys.all) clear_unseen_together();
                start_output<LayoutV>(rO, rP, smem.sV[at.stage]);
                if (tile > tiles.begin) look_up_keys_of(tile - 1);
                end_output(at);
            }
            at.advance();
        }
        q.release(smem.q);
    }

    // A block of queries.
    __device__ __forceinline__ void attend() {
        const TileRange all = work().tiles, mine = tiles_of(params, work(), index);
        takes_turns = all.end - all.begin > SHORT;
        state[0] = state[1] = RowState();
#pragma unroll
        for (int e = 0; e < HEAD_DIM_V / 2; ++e) rO[e] = 0.0f;
        if (mine.end == 0) {
            skip_tiles(all.end - all.begin);
            if (all.end > 0) q.release(smem.q);
        } else {
            q.wait_full(smem.q);
            skip_tiles(all.end - mine.end);
            if constexpr (HIDES_KEYS) {
                attend_seen_tiles(mine);
            } else {
                attend_tiles(mine);
            }
            skip_tiles(mine.begin - all.begin);
        }
        if (all.end > 0) q.advance();
    }

    // Whether the loops cannot be trusted with some row of the warp's: see online_softmax.cuh.
    __device__ __forceinline__ bool has_far_rows() const {
        bool is_any = false;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            is_any |= is_far(state[half].max, exponent_scale<RULES>(params)) &&
                      query_row<PACK_GQA>(work(), row(half)).valid;
        return warp_any(is_any);
    }

    // The warp's rows again, without tensor cores (exact_row.cuh).
    __device__ __forceinline__ void attend_exactly() {
        const TileRange tiles = tiles_of(params, work(), index);
        const PositionMask positions = mask();
        const KeySpan keys = {tiles.begin * BLOCK_N, min(tiles.end * BLOCK_N, work().seqlen_kv)};
        const auto all = [](int) { return true; };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow q = query_row<PACK_GQA>(work(), row(half));
            const ExactRow<T, RULES, GATE, DIM_QK, PositionMask> exact = {
                params, work(), positions, q, rules_for(q), gate_row(q)};
            const bool again = exact.template attend<HEAD_DIM_V>(
                state[half], keys, 0, DIM_V, all, all,
                [&](int n, int e) -> float& { return rO[4 * n + 2 * half + e]; });
            for (int tile = tiles.begin; again && tile < tiles.end; ++tile)
                exact.gate.tile_max(tile, state[half].max * natural_scale<RULES>(params));
        }
    }

    __device__ __forceinline__ float finish_row(RowState& row, const QueryRow& q,
                                                bool writes_lse) const {
        return flashcore::finish_row<RULES>(params, work(), q, gate_row(q), row, writes_lse);
    }
    __device__ __forceinline__ T* output_row(const QueryRow& q) const {
        const Work& w = work();
        return const_cast<T*>(
            head_row<T>(params.o, params.o_strides, w.batch, q.head, w.start_q + q.query));
    }

    // The ends of both rows: their LSE, and what O is multiplied by. The rows stay as they are:
    // some may have to be done again.
    __device__ __forceinline__ void finish_rows(float (&factor)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            RowState end = state[half];
            end.sum = group_sum<QUAD>(end.sum);
            const QueryRow q = query_row<PACK_GQA>(work(), row(half));
            factor[half] = finish_row(end, q, lane() % QUAD == 0);
        }
    }

    // Normalises and writes O.
    __device__ __forceinline__ void store(const float (&factor)[2]) {
        const auto pair = [&](int n, int half) {
            return pack2<T>(scaled_output(rO[4 * n + 2 * half], factor[half]),
                            scaled_output(rO[4 * n + 2 * half + 1], factor[half]));
        };
        if constexpr (WRITES_OUTPUT<GATE> && STAGED_COLS < HEAD_DIM_V) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const QueryRow q = query_row<PACK_GQA>(work(), row(half));
                store_quad_row<HEAD_DIM_V - STAGED_COLS, ALIGN_BYTES>(
                    output_row(q) + STAGED_COLS, q.valid, DIM_V - STAGED_COLS,
                    [&](int n) { return pair(STAGED_COLS / 8 + n, half); });
            }
        }
        if constexpr (STAGED_COLS > 0) {
            const Work& w = work();
            T* const tile = smem.sO[warp()];
            await_stored();
            put_rows<LayoutO>(shared_address(tile), pair);
            const TileBox box = {&params.o_map, w.first_row + warp() * 16, w.head, w.batch};
            store_tile_tma<LayoutO>(tile, box, EVICT_FIRST);
        }
    }

    // The same where the rows' keys are in parts, each of which leaves what it has found.
    __device__ __forceinline__ void finish_part() {
        const Parts parts(params, work().block, work().split, smem.sK);
        if (CLUSTER > 1) named_barrier_sync(1 + index, WARPGROUP);  // all warps have read K
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state[half].sum = group_sum<QUAD>(state[half].sum);
            if (query_row<PACK_GQA>(work(), row(half)).valid)
                parts.leave(row(half), state[half],
                            [&](int n, int e) { return rO[4 * n + 2 * half + e]; });
        }
        const int thread = thread_index_anew() % WARPGROUP;
        if (!parts.await_others(smem.is_last, thread == 0, 1 + index, WARPGROUP)) return;
        const int rows = min(rows_of(work()) - work().first_row, BLOCK_M);
        const auto use = [&](int row, int col, RowState& all, float4 o) {
            const QueryRow q = query_row<PACK_GQA>(work(), row);
            const float factor = finish_row(all, q, col == 0);
            if constexpr (WRITES_OUTPUT<GATE>)
                store_four<ALIGN_BYTES>(output_row(q) + col, DIM_V - col, o, factor);
        };
        parts.merge(rows, exponent_scale<RULES>(params), thread, WARPGROUP, use);
        parts.end();
    }

    __device__ __forceinline__ void next_item() {
        warp_sync();  // all lanes have read the work
        queue.release(smem.queue.places);
        queue.advance();
        queue.wait_full(smem.queue.places);
    }

    // Items until there are none, or one with rows to do again.
    __device__ __forceinline__ void attend_items() {
#pragma unroll 1
        for (; !is_end(work()); next_item()) {
            attend();
            if (SPLIT_KV && has_far_rows()) attend_exactly();
            if (SPLIT_KV && params.splits > 1) {
                finish_part();
                continue;
            }
            const bool again = !SPLIT_KV && has_far_rows();
            float factor[2];
            finish_rows(factor);  // while the last product ends
            if (again) return;
            store(factor);
        }
    }

    __device__ __forceinline__ void run() {
        takes_turns = true;
        meetings = 0;
        if (index == CONSUMERS - 1) pass_turn();  // the first one begins
#pragma unroll 1
        for (attend_items(); !SPLIT_KV && !is_end(work()); attend_items()) {
            float factor[2];
            attend_exactly();
            finish_rows(factor);
            store(factor);
            next_item();
        }
        if (STAGED_COLS > 0) await_stored();
    }
};

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(NUM_THREADS + WARPGROUP, 1)
    fwd_sm90(const __grid_constant__ HopperParams params) {
    char* const smem_raw = dynamic_shared<1>();
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(
        smem_raw + (1024 - shared_address(smem_raw) % 1024) % 1024);
    const int warp = shfl(int(thread_index() / WARP_SIZE), 0);
    Dispatch dispatcher(params);
    // Each of these takes half a microsecond.
    if (warp == 1) dispatcher.begin(smem.queue);
    if (thread_index() == 2 * WARP_SIZE) {
        smem.q.init(1, CONSUMERS * 4);  // warps
        smem.k.init(1, CONSUMERS * 4);
        smem.v.init(1, CONSUMERS * 4);
        smem.queue.claims.init(1, 1);
        smem.queue.places.init(1, CONSUMERS * 4 + 1);  // and the warp that loads
        fence_mbarrier_init();
    }
    if (thread_index() == 3 * WARP_SIZE) {
        prefetch_tensormap(&params.k_map);
        prefetch_tensormap(&params.q_map);
        prefetch_tensormap(&params.v_map);
    }
    block_sync();  // the barriers are there, and the first item
    const int warpgroup = warp / (WARPGROUP / WARP_SIZE);
    if (warpgroup == 0) {
        if constexpr (MOVES_REGISTERS) registers_dec<PRODUCER_REGISTERS>();
        if (warp == 0) load(params, smem);
        if (warp == 1) dispatcher.run(smem.queue);
    } else {
        if constexpr (MOVES_REGISTERS) registers_inc<CONSUMER_REGISTERS>();
        Consumer consumer = {params, smem, warpgroup - 1};
        consumer.run();
    }
}

}  // namespace flashcore
