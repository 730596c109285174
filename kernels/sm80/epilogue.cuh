// epilogue.cuh - the end of a warp's rows in fwd_sm80.cu: their LSE, and O, which goes through
// shared memory so that stores are wide.
#pragma once
#include <config.cuh>
#include <flashcore/output/epilogue.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <sm80/traits.cuh>

namespace flashcore {

// Writes the LSE; normalises O and writes it through the warp's own rows of sQ.
__device__ __forceinline__ void finish(const Context& c, Rows& rows) {
    const AttentionParams& p = c.params;
    float sum[FRAGMENTS_M][2];
    rows.quad_sums(sum);
    c.smem.all_reduce(sum, c.first_row(), c.warp_d, c.rows_barrier(),
                      [](float a, float b) { return a + b; });
    rows.set_sums(sum);
    static_assert(LayoutO::PANEL == LayoutQ::PANEL && LayoutO::LD == LayoutQ::LD,
                  "a warp's rows of O lie over its own rows of Q, which nobody else reads");
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
    warp_sync();  // the warp's rows of O are complete in shared memory
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

}  // namespace flashcore
