// own_rows.cuh - the rows that a consumer of bwd_sm90.cu owns, of q and dO or of k and v: the first
// operand of S and dP in every step.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/ptx/cp_async.cuh>
#include <flashcore/ptx/mma.cuh>
#include <flashcore/tile/wgmma_tile.cuh>
#include <sm90_backward/traits.cuh>

namespace flashcore {

// LayoutOwn: of all consumers' rows in shared memory; Layout: of the tiles that they multiply.
template <typename LayoutOwn, typename Layout>
struct OwnRows {
    uint32 r[LayoutOwn::COLS / 16][4];  // OWN_IN_REGISTERS: the first operands of 16 columns each

    // Loads the lane's part, where it is kept in registers.
    __device__ __forceinline__ void load(const WarpContext& c, const T* sOwn) {
        if constexpr (OWN_IN_REGISTERS) {
            const int row = c.first_row + c.lane % 16, col = c.lane / 16 * 8;
#pragma unroll
            for (int step = 0; step < LayoutOwn::COLS / 16; ++step)
                ldmatrix_x4(r[step],
                            shared_address(sOwn + LayoutOwn::element(row, step * 16 + col)));
        }
    }

    // The product of the index-th consumer's rows and a tile's starts.
    __device__ __forceinline__ void multiply(float (&rS)[BLOCK_N / 2], const T* sOwn, int index,
                                             const T* sTile) {
        if constexpr (OWN_IN_REGISTERS) {
            wgmma_qk<Layout>(rS, r, sTile);
        } else {
            wgmma_qk<LayoutOwn, Layout>(rS, sOwn + LayoutOwn::step(0, index * ROWS, 0), sTile);
        }
    }
};

}  // namespace flashcore
