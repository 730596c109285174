// tile_lists.cu - turns a block mask into lists of a kernel's tiles, right before that kernel: what
// is in rules/listed_tiles.cuh. The mask may change from launch to launch, so nobody plans ahead.
//
// A CTA is one warp, and makes one list: of a block of TILE_ROWS queries, for one list of heads.
// It takes TILES tiles at a time:
//
//   mark    each listed block writes its state where its tiles have a byte for it
//   pack    tiles with any state go to the list, in order; a lane has every 32nd tile
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
    uint8 state[TILES][MOST_BLOCKS][MOST_BLOCKS];  // by block of queries, by block of keys
};
static_assert(sizeof(SharedStorage) == SMEM_BYTES, "flashcore_cupy/select computes the same size");

// The list that this CTA makes.
struct Lister {
    const TileListsParams& p;
    SharedStorage& smem;
    int batch, head_list;
    int first_query, last_query;
    int first_tile, end_tile;  // the tiles that some of its queries see by their positions
    int count;                 // entries so far

    __device__ __forceinline__ Lister(const TileListsParams& p, SharedStorage& smem)
        : p(p), smem(smem), count(0) {
        const int list = block_index() / p.m_blocks, m_block = block_index() % p.m_blocks;
        batch = list / p.list_heads;
        head_list = list % p.list_heads;
        first_query = m_block * p.tile_rows;
        last_query = min(first_query + p.tile_rows, p.seqlen_q) - 1;
        const Positions mask(p);
        first_tile = mask.row_begin(first_query) / p.tile_keys;
        end_tile = div_up(max(mask.row_end(last_query), 0), p.tile_keys);
    }

    __device__ __forceinline__ static int lane() { return thread_index() % WARP_SIZE; }
    __device__ __forceinline__ int first_block(int tile) const {
        return tile * p.tile_keys >> p.list_shift_kv;
    }
    // One past the last block of keys that exist.
    __device__ __forceinline__ int end_block() const {
        return div_up(p.seqlen_kv, 1 << p.list_shift_kv);
    }

    // Writes the states of the blocks in the lists of mixed (0) or full (1) ones, as far as they
    // lie in tiles from `begin` to before `end`.
    __device__ __forceinline__ void mark(int full, int begin, int end) {
        if (p.counts[full] == nullptr) return;
        const int first_row = first_query >> p.list_shift_q,
                  last_row = last_query >> p.list_shift_q;
        const ListStrides& at = p.counts_strides[full];
        const BroadcastStrides& to = p.indices_strides[full];
        for (int row = first_row; row <= last_row; ++row) {
            const int n = min(p.counts[full][batch * at.batch + head_list * at.head + row * at.row],
                              p.capacity[full]);
            const int* const indices =
                p.indices[full] + (batch * to.batch + head_list * to.head + row * to.row);
            for (int i = lane(); i < n; i += WARP_SIZE)
                mark_block(indices[i * to.column], row - first_row, full, begin, end);
        }
    }
    __device__ __forceinline__ void mark_block(int block, int row, int full, int begin, int end) {
        if (block < 0 || block >= end_block()) return;
        const int first_key = block << p.list_shift_kv;
        const int last_key = min(first_key + (1 << p.list_shift_kv), p.seqlen_kv) - 1;
        const int first = max(first_key / p.tile_keys, begin);
        const int last = min(last_key / p.tile_keys, end - 1);
        for (int tile = first; tile <= last; ++tile)
            smem.state[tile - begin][row][block - first_block(tile)] =
                full ? BLOCK_FULL : BLOCK_MIXED;
    }

    // Returns the entry of a tile whose states are in shared memory; its `states` are 0 if none of
    // its blocks is listed.
    __device__ __forceinline__ ListedTile entry_of(int tile, int begin) const {
        const int first_key = tile * p.tile_keys;
        const int end_key = min(first_key + p.tile_keys, p.seqlen_kv);
        const int blocks = ((end_key - 1) >> p.list_shift_kv) - first_block(tile) + 1;
        const Positions mask(p);
        uint32 states = 0;
        bool all_seen = false;  // whether some queries see all keys
        for (int row = 0; row < MOST_BLOCKS; ++row) {
            uint32 own = 0;
            for (int c = 0; c < MOST_BLOCKS; ++c)
                own |= uint32(smem.state[tile - begin][row][c]) << 2 * c;
            if (own == 0) continue;
            own |= BlocksOfRow::ALL_FULL & ~0u << 2 * blocks;  // those that it does not touch
            states |= own << 8 * row;
            const int first_of_row = (first_query >> p.list_shift_q) + row << p.list_shift_q;
            const int last_of_row = first_of_row + (1 << p.list_shift_q) - 1;
            const bool is_full = (own & BlocksOfRow::ALL_FULL) == BlocksOfRow::ALL_FULL;
            all_seen |=
                is_full && !mask.needs_mask(max(first_of_row, first_query),
                                            min(last_of_row, last_query), first_key, end_key);
        }
        return {uint32(tile) | (all_seen ? 0 : ListedTile::HAS_UNSEEN), states};
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
