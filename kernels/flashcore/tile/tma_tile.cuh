// tma_tile.cuh - whole tiles between global and shared memory by TMA, panel by panel.
#pragma once
#include <flashcore/ptx/mbarrier.cuh>
#include <flashcore/ptx/tma.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/tile/shared_layout.cuh>

namespace flashcore {

// A box's first row and batch in a tensor map.
struct BoxPlace {
    int row, batch;
};

// Where a tile lies in a tensor map: its first row, and the head and batch of all its rows.
struct TileBox {
    const TensorMap* map;
    int row, head, batch;

    // The box that begins r rows behind the tile's first.
    __device__ __forceinline__ BoxPlace at(int r) const { return {row + r, batch}; }
};

// Where a tile lies in a packed array: its first row, the end of its sequence, and its head. What
// lies behind the sequence is outside of the map: batch b of it are map_rows rows of the array from
// row map_begin + b on, and a box ends with them (clipped_view in select/tensor_view.py).
//
// Of a sequence that ends in the first map_rows rows behind map_begin, the box reaches further.
struct SequenceBox {
    const TensorMap* map;
    int row, end, head, map_rows, map_begin;

    __device__ __forceinline__ BoxPlace at(int r) const {
        const int first = row + r - map_begin, inside = min(end - (row + r), map_rows);
        const int skipped = min(map_rows - inside, first);
        return {skipped, first - skipped};
    }
};

// Starts the copies of a whole tile, panel by panel, in boxes of BOX_ROWS rows; or of those ROWS of
// its rows that begin at sTile. One warp does this.
template <typename Layout, int BOX_ROWS, int ROWS = Layout::ROWS, typename T, typename Box>
__device__ __forceinline__ void load_tile_tma(T* sTile, uint64* full, const Box& box,
                                              uint64 policy) {
    if (!elect_one()) return;
    mbarrier_arrive_expect_tx(full, ROWS * Layout::COLS * sizeof(T));
#pragma unroll
    for (int panel = 0; panel < Layout::COLS / Layout::PANEL; ++panel)
#pragma unroll
        for (int r = 0; r < ROWS; r += BOX_ROWS) {
            const BoxPlace at = box.at(r);
            tma_load_4d(sTile + Layout::step(0, r, panel * Layout::PANEL), box.map, full,
                        panel * Layout::PANEL, at.row, box.head, at.batch, policy);
        }
}

// Starts to store a tile that the warp has written, one box per panel, as a group.
template <typename Layout, typename T, typename Box>
__device__ __forceinline__ void store_tile_tma(const T* sTile, const Box& box, uint64 policy) {
    fence_proxy_async();  // TMA sees what this lane has written
    warp_sync();          // all lanes have written
    if (!elect_one()) return;
    const BoxPlace at = box.at(0);
#pragma unroll
    for (int panel = 0; panel < Layout::COLS / Layout::PANEL; ++panel)
        tma_store_4d(box.map, sTile + Layout::step(0, 0, panel * Layout::PANEL),
                     panel * Layout::PANEL, at.row, box.head, at.batch, policy);
    tma_store_commit();
}

// Waits until TMA has read the tile: before the warp writes the next tile over it, or ends.
__device__ __forceinline__ void await_stored() {
    if (elect_one()) tma_store_wait();
    warp_sync();  // all lanes may write again
}

}  // namespace flashcore
