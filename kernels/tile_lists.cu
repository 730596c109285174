// tile_lists.cu - turns a block mask into lists of a kernel's tiles, right before that kernel: what
// is in rules/listed_tiles.cuh. The mask may change from launch to launch, so nobody plans ahead.
//
// A CTA is one warp, and makes one list, for one list of heads: of a block of tile_rows queries,
// and tiles of keys. With OWNS_KEYS: of a block of tile_keys keys, and tiles of queries. It takes
// TILES tiles at a time:
//
//   mark    each listed block writes its state where its tiles have a byte for it
//   pack    tiles with any state go to the list, in order; a lane has every 32nd tile
//
// The mask has a list for each of its rows of blocks. An owner of queries reads those of its rows,
// lanes side by side. An owner of keys reads all rows, a lane each, and takes what is its own.
//
// Indices and counts out of range are skipped, and so are tiles that positions hide.
#include <config.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/listed_tiles.cuh>
#include <flashcore/rules/position_mask.cuh>

namespace flashcore {

struct ListStrides {
    int64 batch, head, row;
};
struct TileListsParams : AttentionParams {
    const int* counts[2];  // of mixed blocks and of full ones, per block of queries; or null
    const int* indices[2];
    ListStrides counts_strides[2];
    BroadcastStrides indices_strides[2];
    int capacity[2];  // indices that there is room for
};
static_assert(sizeof(TileListsParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

using Positions = PositionMask<BOUNDED_RIGHT, BOUNDED_LEFT>;

constexpr int TILES = 512;
struct SharedStorage {
    // By block of the CTA's own side, by block of the tile's.
    uint8 state[TILES][MOST_BLOCKS][MOST_BLOCKS];
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");

// Queries or keys, as the lists have them.
struct Side {
    int length, tile;  // rows that exist, and those of a tile
    int shift;         // a block of the mask has 2^shift of them

    // One past the last block that exists.
    __device__ __forceinline__ int end_block() const { return div_up(length, 1 << shift); }
};

// The list that this CTA makes.
struct Lister {
    const TileListsParams& p;
    SharedStorage& smem;
    const Side own, other;
    int batch, head_list;
    int first_own, last_own;   // the CTA's own rows
    int first_tile, end_tile;  // the tiles that some of them meet by their positions
    int count;                 // entries so far

    __device__ __forceinline__ Lister(const TileListsParams& p, SharedStorage& smem)
        : p(p),
          smem(smem),
          own(OWNS_KEYS ? keys(p) : queries(p)),
          other(OWNS_KEYS ? queries(p) : keys(p)),
          count(0) {
        const int list = block_index() / p.m_blocks, block = block_index() % p.m_blocks;
        batch = list / p.list_heads;
        head_list = list % p.list_heads;
        first_own = block * own.tile;
        last_own = min(first_own + own.tile, own.length) - 1;
        const Positions mask(p);
        const int begin = OWNS_KEYS ? mask.first_query(first_own) : mask.row_begin(first_own);
        const int end = OWNS_KEYS ? mask.end_query(last_own, p.seqlen_q) : mask.row_end(last_own);
        first_tile = begin / other.tile;
        end_tile = div_up(max(end, 0), other.tile);
    }

    __device__ __forceinline__ static Side queries(const TileListsParams& p) {
        return {p.seqlen_q, p.tile_rows, p.list_shift_q};
    }
    __device__ __forceinline__ static Side keys(const TileListsParams& p) {
        return {p.seqlen_kv, p.tile_keys, p.list_shift_kv};
    }
    __device__ __forceinline__ static int lane() { return thread_index() % WARP_SIZE; }
    __device__ __forceinline__ int first_block(int tile) const {
        return tile * other.tile >> other.shift;
    }

    // Writes the states of the blocks in the lists of mixed (0) or full (1) ones, as far as they
    // lie in tiles from `begin` to before `end`.
    __device__ __forceinline__ void mark(int full, int begin, int end) {
        if (p.counts[full] == nullptr) return;
        if constexpr (OWNS_KEYS) {
            const int last_row = min(end * other.tile, other.length) - 1 >> other.shift;
            for (int row = first_block(begin) + lane(); row <= last_row; row += WARP_SIZE)
                mark_row(row, full, begin, end, 0, 1);
        } else {
            for (int row = first_own >> own.shift; row <= last_own >> own.shift; ++row)
                mark_row(row, full, begin, end, lane(), WARP_SIZE);
        }
    }
    // Every step-th of a row's listed blocks, from `first` on.
    __device__ __forceinline__ void mark_row(int row, int full, int begin, int end, int first,
                                             int step) {
        const ListStrides& at = p.counts_strides[full];
        const BroadcastStrides& to = p.indices_strides[full];
        const int n = min(p.counts[full][batch * at.batch + head_list * at.head + row * at.row],
                          p.capacity[full]);
        const int* const indices =
            p.indices[full] + (batch * to.batch + head_list * to.head + row * to.row);
        for (int i = first; i < n; i += step)
            mark_block(row, indices[i * to.column], full, begin, end);
    }
    __device__ __forceinline__ void mark_block(int row, int column, int full, int begin, int end) {
        const int nth = OWNS_KEYS ? column : row, block = OWNS_KEYS ? row : column;
        if (OWNS_KEYS && (nth < first_own >> own.shift || nth > last_own >> own.shift)) return;
        if (!OWNS_KEYS && (block < 0 || block >= other.end_block())) return;
        const int first_row = block << other.shift;
        const int last_row = min(first_row + (1 << other.shift), other.length) - 1;
        const int first = max(first_row / other.tile, begin);
        const int last = min(last_row / other.tile, end - 1);
        for (int tile = first; tile <= last; ++tile)
            smem.state[tile - begin][nth - (first_own >> own.shift)][block - first_block(tile)] =
                full ? BLOCK_FULL : BLOCK_MIXED;
    }

    // Returns the entry of a tile whose states are in shared memory; its `states` are 0 if none of
    // its blocks is listed.
    __device__ __forceinline__ ListedTile entry_of(int tile, int begin) const {
        const int first = tile * other.tile, end = min(first + other.tile, other.length);
        const int blocks = ((end - 1) >> other.shift) - first_block(tile) + 1;
        uint32 states = 0;
        bool all_seen = false;  // whether some own rows meet all of the tile
        for (int nth = 0; nth < MOST_BLOCKS; ++nth) {
            uint32 met = 0;
            for (int c = 0; c < MOST_BLOCKS; ++c)
                met |= uint32(smem.state[tile - begin][nth][c]) << 2 * c;
            if (met == 0) continue;
            met |= BlocksOfRow::ALL_FULL & ~0u << 2 * blocks;  // those that it does not touch
            states |= met << 8 * nth;
            const int first_row = (first_own >> own.shift) + nth << own.shift;
            const int last_row = first_row + (1 << own.shift) - 1;
            const bool is_full = (met & BlocksOfRow::ALL_FULL) == BlocksOfRow::ALL_FULL;
            all_seen |=
                is_full && !hides(max(first_row, first_own), min(last_row, last_own), first, end);
        }
        return {uint32(tile) | (all_seen ? 0 : ListedTile::HAS_UNSEEN), states};
    }
    // Whether positions hide some own row of [first_row, last_row] and some of the tile's
    // [first, end) from each other.
    __device__ __forceinline__ bool hides(int first_row, int last_row, int first, int end) const {
        const Positions mask(p);
        return OWNS_KEYS ? mask.needs_mask(first, end - 1, first_row, last_row + 1)
                         : mask.needs_mask(first_row, last_row, first, end);
    }

    __device__ __forceinline__ void list(int number) {
        ListedTile* const entries = const_cast<ListedTile*>(TileLists(p).entries(number));
#pragma unroll 1
        for (int begin = first_tile; begin < end_tile; begin += TILES) {
            const int end = min(begin + TILES, end_tile);
            for (int i = lane(); i < end - begin; i += WARP_SIZE)
                *reinterpret_cast<Vector<16>*>(&smem.state[i]) = Vector<16>();
            warp_sync();  // all states are 0
            mark(0, begin, end);
            warp_sync();  // a block that is in both lists is full
            mark(1, begin, end);
            warp_sync();  // all lanes have written the states of their blocks
            for (int first = begin; first < end; first += WARP_SIZE) {
                const int tile = first + lane();
                const ListedTile entry = tile < end ? entry_of(tile, begin) : ListedTile{0, 0};
                const int nth = warp_rank(entry.states != 0);
                if (entry.states != 0 && count + nth <= p.tile_capacity)
                    entries[count + nth - 1] = entry;
                count = min(count + shfl(nth, WARP_SIZE - 1), p.tile_capacity);
            }
            warp_sync();  // all lanes have read the states before they are overwritten
        }
        if (lane() == 0) const_cast<int*>(p.tile_counts)[number] = count;
    }
};

extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    tile_lists(const __grid_constant__ TileListsParams params) {
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(dynamic_shared<16>());
    Lister(params, smem).list(block_index());
}

}  // namespace flashcore
