// wmma_tile.cuh - one warp's share of a tile product out of WMMA fragments, S = Q K^T and O += P V;
// and a way to scale the rows of fragments whose layout is not specified.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/ptx/wmma.cuh>

namespace flashcore {

constexpr int WMMA_DIM = 16;  // fragments are 16 x 16 x 16

// S[16 x NUM_N*16] = Q[16 x DEPTH] K[NUM_N*16 x DEPTH]^T for one warp, raw scores, fp32.
// sQ and sK point at the warp's first row; sK is read col-major, which is the transpose.
template <int NUM_N, int DEPTH, int LD, typename T>
__device__ __forceinline__ void scores_fragments(Accumulator (&rS)[NUM_N], const T* sQ,
                                                 const T* sK) {
#pragma unroll
    for (int n = 0; n < NUM_N; ++n) fill(rS[n], 0.0f);
#pragma unroll
    for (int k = 0; k < DEPTH; k += WMMA_DIM) {
        FragmentAB<T> rQ;
        wmma_load_a_row(rQ, sQ + k, LD);
#pragma unroll
        for (int n = 0; n < NUM_N; ++n) {
            FragmentAB<T> rK;
            wmma_load_b_col(rK, sK + n * WMMA_DIM * LD + k, LD);
            wmma_mma_row_col(rS[n], rQ, rK);
        }
    }
}

// O[16 x NUM_D*16] += P[16 x DEPTH] V[DEPTH x NUM_D*16] for one warp, P and V row-major.
template <int NUM_D, int DEPTH, int LD_P, int LD_V, typename T>
__device__ __forceinline__ void accumulate_fragments(Accumulator (&rO)[NUM_D], const T* sP,
                                                     const T* sV) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += WMMA_DIM) {
        FragmentAB<T> rP;
        wmma_load_a_row(rP, sP + k, LD_P);
#pragma unroll
        for (int d = 0; d < NUM_D; ++d) {
            FragmentAB<T> rV;
            wmma_load_b_row(rV, sV + k * LD_V + d * WMMA_DIM, LD_V);
            wmma_mma_row_row(rO[d], rP, rV);
        }
    }
}

// Which row of its 16 x 16 matrix each of a lane's accumulator elements belongs to. WMMA does not
// specify it, so ask the hardware: load a matrix whose elements are their own row numbers. sScratch
// has room for 16 rows of LD floats and belongs to this warp.
template <int LD>
__device__ __forceinline__ void accumulator_rows(int (&rows)[8], float* sScratch) {
    const int lane = thread_index() % WARP_SIZE;
    for (int i = lane; i < WMMA_DIM * WMMA_DIM; i += WARP_SIZE)
        sScratch[(i / WMMA_DIM) * LD + i % WMMA_DIM] = float(i / WMMA_DIM);
    warp_sync();  // the row numbers are there before any lane loads its share
    Accumulator numbers;
    wmma_load_c_row(numbers, sScratch, LD);
    warp_sync();  // and have been read before the scratch is used for anything else
#pragma unroll
    for (int e = 0; e < 8; ++e) rows[e] = int(numbers.x[e]);
}

// The warp's O in registers: 16 rows, multiplied row by row without knowing the fragment's layout.
template <int NUM_D>
struct RegisterOutput {
    Accumulator rO[NUM_D];  // 16 rows x 16 columns each
    int rows[8];            // the row of each element of an Accumulator

    // sFactor: one factor per row of the warp.
    __device__ __forceinline__ void scale_rows(const float* sFactor) {
        float factor[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) factor[e] = sFactor[rows[e]];
#pragma unroll
        for (int d = 0; d < NUM_D; ++d) {
#pragma unroll
            for (int e = 0; e < 8; ++e) rO[d].x[e] *= factor[e];
        }
    }
};

}  // namespace flashcore
