// listed_walk.cuh - block masks: the walk of a CTA of a backward kernel over a list of tiles
// (rules/listed_tiles.cuh) instead of a range.
//
// The lists of a group's query heads may differ, or some share one, so a CTA that owns keys opens
// the list of each head in turn. Nobody knows how many tiles there are until the last list has
// ended. The walk looks one tile ahead: that one is copied while this one is used.
//
// Tiles of the walked side divide a block of the mask, and so do a warp's own rows. So a warp meets
// one block in each tile: it is empty, mixed or full.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/rules/listed_tiles.cuh>
#include <flashcore/scheduler/work.cuh>

namespace flashcore {

struct ListedWalk {
    const AttentionParams& p;
    int batch, block;    // the block of own rows
    int head, end_head;  // whose list is open, and one past the last
    const ListedTile* entry;
    int left;  // entries of the open list from `entry` on
    WalkedTile now, ahead;
    RowRange met;  // by all rows that exist, by positions; others count as zeros

    static constexpr int NO_TILE = -1;

    __device__ __forceinline__ explicit ListedWalk(const WarpContext& c)
        : p(c.params),
          batch(c.work.batch),
          block(c.work.first_row / BLOCK_M),
          head(c.work.head - 1),
          end_head(c.work.head + (OWNS_KEYS ? c.params.group : 1)),
          entry(nullptr),
          left(0),
          met(rows_met_by_all(c)) {
        now = take();
        ahead = take();
    }

    __device__ __forceinline__ bool is_empty() const { return now.tile == NO_TILE; }
    __device__ __forceinline__ bool has(int) const { return now.tile != NO_TILE; }
    __device__ __forceinline__ bool has_next(int) const { return ahead.tile != NO_TILE; }
    __device__ __forceinline__ WalkedTile at(int) const { return now; }
    // The nth tile, if it is the first one or the one behind that which `at` returns.
    __device__ __forceinline__ WalkedTile to_copy(int nth) const { return nth == 0 ? now : ahead; }
    __device__ __forceinline__ void advance() {
        now = ahead;
        ahead = take();
    }

  private:
    __device__ __forceinline__ WalkedTile take() {
        while (left == 0) {
            if (head + 1 >= end_head) return {head, NO_TILE, 0, false};
            const TileLists lists(p);
            const int number = lists.number(batch, ++head, block);
            left = lists.count(number);
            entry = lists.entries(number);
        }
        --left;
        const ListedTile found = *entry++;
        return {head, found.tile(), found.states, found.has_unseen()};
    }
};

// How many tiles a CTA walks over, for who does not read the lists itself.
__device__ __forceinline__ int count_listed(const WarpContext& c) {
    const TileLists lists(c.params);
    const int heads = OWNS_KEYS ? c.params.group : 1;
    int count = 0;
    for (int n = 0; n < heads; ++n)
        count +=
            lists.count(lists.number(c.work.batch, c.work.head + n, c.work.first_row / BLOCK_M));
    return count;
}

// The state of the block that a warp's own rows, or its warpgroup's, meet in a tile; 0: empty.
__device__ __forceinline__ int state_met(const WarpContext& c, const WalkedTile& at) {
    if constexpr (!LISTED) return BLOCK_MIXED;
    const int shift = OWNS_KEYS ? c.params.list_shift_kv : c.params.list_shift_q;
    const int first = c.work.first_row;
    const int nth = (first + c.first_row >> shift) - (first >> shift);
    return at.states >> 8 * nth & 3;
}

}  // namespace flashcore
