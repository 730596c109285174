// traits.cuh - the sizes of bwd_sm90_wide.cu, its shared memory, and its threads.
#pragma once
#include <backward/context.cuh>
#include <config.cuh>
#include <flashcore/params_backward_hopper.cuh>
#include <flashcore/pipeline/mbarrier_pipeline.cuh>
#include <flashcore/ptx/wgmma.cuh>
#include <sm90_backward/tiles.cuh>

namespace flashcore {

// The warpgroup that loads, and one for each gradient.
enum Role : int { LOADS, HAS_DV, HAS_DK, HAS_DQ };

// A gradient's columns are in one part or two: no product has more than 192 columns, for
// whose accumulators the compiler has registers.
constexpr int PARTS = HEAD_DIM <= 192 ? 1 : 2, COLS = HEAD_DIM / PARTS;
constexpr int PARTS_V = HEAD_DIM_V <= 192 ? 1 : 2, COLS_V = HEAD_DIM_V / PARTS_V;

// dQ of a tile in units of 64 queries by so many columns: those whose sums registers hold, beside
// what the other warpgroups have.
constexpr int COLS_DQ = HEAD_DIM <= 192 ? HEAD_DIM : 64, DQ_UNITS = HEAD_DIM / COLS_DQ;

// A multiprocessor has 64K registers: of four warpgroups, 512 are for a thread of each. setmaxnreg
// moves them to whom they hold a gradient from tile to tile; dV's warpgroup has the masks, too.
constexpr int LOAD_REGISTERS = 32;
constexpr int DV_REGISTERS = HEAD_DIM <= 192 ? 176 : 208;
constexpr int DK_REGISTERS = HEAD_DIM <= 192 ? 160 : 192;
constexpr int DQ_REGISTERS = 512 - LOAD_REGISTERS - DV_REGISTERS - DK_REGISTERS;

static_assert(CONSUMERS == 3 && BLOCK_M == ROWS && BLOCK_N == ROWS, "64 rows for each gradient");
static_assert(WARPS_M == CONSUMER_WARPS && WARPS_N == 1 && WARPS_D == 1 && !PACK_GQA && !SPLIT_KV &&
                  CLUSTER == 1,
              "a consumer has all columns of its gradient");
static_assert(OWNS_KEYS && !SUMS_DISTANCES && (RULES & SCORE_RULES & ~RULE_SCALE_FIRST) == 0,
              "P and dS come of S and dP one after the other, in different warpgroups");
static_assert(HEAD_DIM % 64 == 0 && HEAD_DIM_V % 64 == 0 && COLS_DQ % 64 == 0, "whole panels");
static_assert(GRADIENT_COLS >= HEAD_DIM && GRADIENT_COLS >= HEAD_DIM_V, "all columns in one block");
static_assert(!ORDERED || ADDS_DQ, "an order of additions");
// Rows of a tile that no row of the block meets may be NaN: by position TMA leaves them out, but
// not by masks, nor neighbours in a packed batch.
static_assert(!HIDES_KEYS && !VARLEN, "tiles whose rows all count, or are zeros");

// Tiles are swizzled as shared_layout.cuh says, which is TMA's and wgmma's swizzle, too. It counts
// from multiples of 1024 bytes.
struct alignas(1024) SharedStorage {
    T sDS[NUM_STAGES][LayoutDS::SIZE];          // BLOCK_N queries x BLOCK_M keys each
    T sOwnQK[LayoutOwnQK::SIZE];                // BLOCK_M x HEAD_DIM: K
    T sOwnVO[LayoutOwnVO::SIZE];                // BLOCK_M x HEAD_DIM_V: V
    T sQK[NUM_STAGES][LayoutQK::SIZE];          // BLOCK_N x HEAD_DIM each: Q
    T sVO[NUM_STAGES][LayoutVO::SIZE];          // BLOCK_N x HEAD_DIM_V each: dO
    float4 sP[BLOCK_N / 8][WARPGROUP_THREADS];  // as a thread's accumulators lie
    float sShift[NUM_STAGES][BLOCK_N];          // of the queries; guarded as sQK is
    float sDelta[NUM_STAGES][BLOCK_N];
    uint64 full_own;
    uint64 turn[TURNS], added[TURNS];  // ORDERED: see sm90_backward/turns.cuh
    Pipeline<NUM_STAGES> qk, vo;       // what TMA brings
    Pipeline<1> p;                     // from HAS_DV to HAS_DK
    Pipeline<NUM_STAGES> ds;           // from HAS_DK to HAS_DQ
    int block;                         // ORDERED: which one the CTA has drawn
};
static_assert(sizeof(SharedStorage) + 1024 == SMEM_BYTES,
              "flashcore_cupy/select computes the same size, and 1 KiB to align it");
static_assert(sizeof(HopperBackwardParams) == PARAMS_BYTES,
              "flashcore_cupy/select packs the same struct");

}  // namespace flashcore
