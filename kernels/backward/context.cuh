// context.cuh - what the backward kernels share: which rows a thread has, and what belongs to an
// element of S.
//
// A CTA owns BLOCK_M rows of one side and walks over the other side, BLOCK_N rows at a time:
//
//                 own                 walked over
//   OWNS_KEYS     K, V of a block     Q, dO of all queries that see the block
//   else          Q, dO of a block    K, V of all keys that the block sees
//
// So q and k lie in arrays named *QK, HEAD_DIM columns wide, and v and dO in arrays named *VO,
// HEAD_DIM_V columns wide. Rows of S are the CTA's own, columns are of the tile.
#pragma once
#include <config.cuh>
#include <flashcore/params_backward.cuh>
#include <flashcore/rules/dropout.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/position_mask.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

constexpr int TILES_N = BLOCK_N / 8;  // 8-column accumulator tiles of S
constexpr bool HIDES_KEYS = RowRules<T, RULES>::HIDES_KEYS;
constexpr bool LISTED = (RULES & RULE_BLOCKS) != 0;  // walks over lists: see listed_walk.cuh
constexpr int QUAD = 4;                              // lanes that share a row of S

using Positions = PositionMask<BOUNDED_RIGHT, BOUNDED_LEFT>;
using Bits = KeyBits<HIDES_KEYS, TILES_N>;
using Kept = KeptBits<RULES, TILES_N>;

// What belongs to a query: its LSE, in log2 units, and D = rowsum(dO * O) - dLSE.
struct Statistics {
    float shift, delta;
};

// A query and a key that meet in an element of S.
struct Meeting {
    int query, key;
};

// A tile that is walked over: which one, and of which query head. Where the CTA owns queries, the
// head is theirs.
struct WalkedTile {
    int head, tile;
    uint32 states;    // LISTED: of the blocks that it touches, as ListedTile has them
    bool has_unseen;  // LISTED: maybe some of its rows meet no own row
};

// The rows of the other side, of which the CTA's own rows see some or all: [begin, end).
struct RowRange {
    int begin, end;
};

// Columns of S, of the tile's rows: [begin, end), counted from the first one that a lane has.
struct Columns {
    int begin, end;
};

// A warp's rows. A lane has two rows of every 16, lane / 4 and lane / 4 + 8, and of every 8 columns
// of S two.
struct WarpContext {
    const BackwardParams& params;
    const Work& work;
    int first_row;  // of the warp's, counted from the CTA's
    int lane;

    __device__ __forceinline__ Positions mask() const {
        return {params, work.seqlen_kv, work.diagonal};
    }
    // Which of the CTA's rows is this lane's row `half` (0 or 1) of the m-th 16.
    __device__ __forceinline__ int row(int m, int half) const {
        return first_row + m * 16 + half * 8 + lane / QUAD;
    }
    // The query and the key of element e (0 or 1) of 8-column group n in that row of a tile.
    __device__ __forceinline__ Meeting meeting(int tile, int m, int half, int n, int e) const {
        const int own = work.first_row + row(m, half);
        const int other = tile * BLOCK_N + n * 8 + lane % QUAD * 2 + e;
        return OWNS_KEYS ? Meeting{other, own} : Meeting{own, other};
    }
    // Which columns of a tile meet this lane's row `half` of the m-th 16, by position. None meet a
    // row that does not exist.
    __device__ __forceinline__ Columns columns_met(int tile, int m, int half) const {
        const int own = work.first_row + row(m, half);
        const int first = tile * BLOCK_N + lane % QUAD * 2;
        if constexpr (OWNS_KEYS) {
            if (own >= work.seqlen_kv) return {0, 0};
            return {mask().first_query(own) - first, mask().end_query(own, work.seqlen_q) - first};
        } else {
            if (own >= work.seqlen_q) return {0, 0};
            return {mask().row_begin(own) - first, mask().row_end(own) - first};
        }
    }
    // How far the key is from the query's own position.
    __device__ __forceinline__ float distance(const Meeting& x) const {
        return fabsf(float(x.query + work.diagonal - x.key));
    }
    __device__ __forceinline__ RowRules<T, RULES> rules_for(int head, int query) const {
        return {params, work.batch, head, query, work.seqlen_q, work.seqlen_kv, work.diagonal};
    }
    // The batch of arrays whose sequences are packed is one.
    __device__ __forceinline__ int array_batch() const { return VARLEN ? 0 : work.batch; }

    // Where a row of the CTA's is in a gradient; `valid`: whether it exists.
    template <typename G>
    __device__ __forceinline__ G* own_row(void* base, const Strides& strides, int row,
                                          bool& valid) const {
        const int own = work.first_row + row;
        valid = own < (OWNS_KEYS ? work.seqlen_kv : work.seqlen_q);
        const int head = OWNS_KEYS ? work.head_kv : work.head;
        const int start = OWNS_KEYS ? work.start_kv : work.start_q;
        return const_cast<G*>(head_row<G>(base, strides, array_batch(), head, start + own));
    }
};

// Which rows of the walked side have a meeting with some own row of [first, last], by positions.
__device__ __forceinline__ RowRange rows_met(const Work& w, const Positions& mask, int first,
                                             int last) {
    if constexpr (OWNS_KEYS) return {mask.first_query(first), mask.end_query(last, w.seqlen_q)};
    return {mask.row_begin(first), mask.row_end(last)};
}
// The same of all rows that exist, not the CTA's alone.
__device__ __forceinline__ RowRange rows_met_by_all(const WarpContext& c) {
    const int length = OWNS_KEYS ? c.work.seqlen_kv : c.work.seqlen_q;
    return rows_met(c.work, c.mask(), 0, length - 1);
}

// Reads the statistics of this lane's queries; of the last query for rows that do not exist.
template <int FRAGMENTS>
__device__ __forceinline__ void load_own_statistics(const WarpContext& c,
                                                    Statistics (&of)[FRAGMENTS][2]) {
    const Work& w = c.work;
    const int64 first = statistics_row(c.params, c.array_batch(), w.head) + w.start_q;
#pragma unroll
    for (int m = 0; m < FRAGMENTS; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64 row = first + min(w.first_row + c.row(m, half), w.seqlen_q - 1);
            of[m][half] = {c.params.shift[row], c.params.delta[row]};
        }
    }
}

}  // namespace flashcore
