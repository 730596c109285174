// packed_batch.cuh - a packed batch as blocks of rows, and the orders in which they are worked on.
//
// All heads of a sequence follow each other, whatever the order of the sequences: a query's heads
// lie side by side in memory, which reads few bytes here and there at half its rate.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>

namespace flashcore {

// Work::batch of rows of a packed batch that belong to none of its sequences.
constexpr int NO_SEQUENCE = -1;

// A packed batch in pieces: the rows before the first boundary, the sequences, and the rows behind
// the last boundary. The first and the last piece, usually empty, belong to no sequence and have no
// keys. Boundaries outside the array are clamped: the host cannot check them without waiting for
// the GPU.
//
// Pieces are cut into blocks of block_m rows. There is room for as many blocks of each head as
// grids.py counts: piece n has the places from floor(its first row / block_m) + n on. That is
// enough, wherever it starts, and at most one too many; so a block finds its piece from cu_seqlens
// alone.
struct PackedBatch {
    const int* cu_seqlens;
    int sequences, total, rows_per_query, block_m;

    __device__ __forceinline__ int pieces() const { return sequences + 2; }
    __device__ __forceinline__ bool is_sequence(int piece) const {
        return piece > 0 && piece <= sequences;
    }
    __device__ __forceinline__ int boundary(int n) const {
        return min(max(cu_seqlens[n], 0), total);
    }
    __device__ __forceinline__ int start(int piece) const {
        return piece == 0 ? 0 : boundary(piece - 1);
    }
    __device__ __forceinline__ int length(int piece) const {
        return max((piece > sequences ? total : boundary(piece)) - start(piece), 0);
    }
    __device__ __forceinline__ int first_block(int piece) const {
        return first_block(piece, start(piece));
    }
    // The same of a piece whose first row is known.
    __device__ __forceinline__ int first_block(int piece, int start) const {
        return int(int64(start) * rows_per_query / block_m) + piece;
    }
    // Places for blocks of each head.
    __device__ __forceinline__ int places() const {
        return int(int64(total) * rows_per_query / block_m) + pieces();
    }
    // Blocks of rows that the piece has, of each head.
    __device__ __forceinline__ int blocks(int piece) const {
        return div_up(length(piece) * rows_per_query, block_m);
    }

    // Returns the last piece that starts at `block` or before it. A search by the whole warp: each
    // lane tries one of 32 evenly spaced pieces, and the next round searches between two of them.
    __device__ __forceinline__ int find(int block) const {
        const int lane = thread_index() % WARP_SIZE;
        int first = 0, count = pieces();
        while (count > 1) {
            const int step = div_up(count, WARP_SIZE);
            const bool candidate = lane * step < count && first_block(first + lane * step) <= block;
            const int chosen = max(warp_count(candidate), 1) - 1;
            first += chosen * step;
            count = min(step, count - chosen * step);
        }
        return first;
    }
};

// A block's place among those of a piece, all heads of it.
struct PackedPlace {
    int piece, index;
};

// All blocks of a packed batch, without gaps, and the sequences with the most keys first, so that
// no long block runs alone at the end: those of at least 2^n tiles of keys before those of fewer.
// One warp asks for places, in rising order, and goes over the sequences once for each n that
// occurs, and once before. Of many sequences only every fourth n counts: a pass takes long then.
struct PackedOrder {
    static constexpr int NO_PIECE = -2, MANY = 2048;

    PackedBatch q, kv;
    int heads, most, block_n;   // most: blocks that there are at most, of all heads
    int level = 32;             // the n of the pass; at first one that no sequence has
    int next_level = NO_PIECE;  // the highest n below it, as far as this lane has seen
    int group = 0;              // the next 32 pieces
    int before = 0;             // blocks before those

    // The n of a piece: -1 if it has no keys, NO_PIECE if it has no blocks or does not exist.
    __device__ __forceinline__ int level_of(int piece) const {
        if (piece >= q.pieces() || q.length(piece) == 0) return NO_PIECE;
        const int bits = q.pieces() > MANY ? 4 : 1;
        int level = -1;
        for (int tiles = q.is_sequence(piece) ? div_up(kv.length(piece), block_n) : 0; tiles > 0;
             tiles >>= bits)
            ++level;
        return level;
    }

    // For each lane, the sum of `before` and all lanes' x up to its own; no more than `most`, for
    // boundaries that do not rise may add up to anything.
    __device__ __forceinline__ int ends(int x) const {
        const int lane = thread_index() % WARP_SIZE;
        uint32 sum = x + (lane == 0 ? before : 0);
#pragma unroll
        for (int step = 1; step < WARP_SIZE; step *= 2) {
            const uint32 got = shfl(sum, max(lane - step, 0));
            if (lane >= step) sum = min(sum + got, uint32(most));
        }
        return int(min(sum, uint32(most)));
    }

    // Sets `place` to that of block `index`; returns false if there are not so many. Then `before`
    // is how many there are.
    __device__ __forceinline__ bool find(int index, PackedPlace& place) {
        while (level > NO_PIECE) {
            const int piece = group + thread_index() % WARP_SIZE, own = level_of(piece);
            if (own < level) next_level = max(next_level, own);
            if (warp_any(own == level)) {
                const int end = ends(own == level ? q.blocks(piece) * heads : 0);
                const int found = warp_count(end <= index);
                if (found < WARP_SIZE) {
                    const int begin = found == 0 ? before : shfl(end, max(found - 1, 0));
                    place = {group + found, index - begin};
                    return true;
                }
                before = shfl(end, WARP_SIZE - 1);
            }
            group += WARP_SIZE;
            if (group < q.pieces()) continue;
            group = 0;
            level = int(group_max<WARP_SIZE>(float(next_level)));
            next_level = NO_PIECE;
        }
        return false;
    }
};

}  // namespace flashcore
