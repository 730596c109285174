// tile_gradients.cuh - from S and dP of a tile to P and dS, on the accumulators of a consumer of
// bwd_sm90.cu.
//
// Element 4 n + 2 half + e is of the lane's row `half` (0 or 1) and of column 8 n + 2 (lane % 4)
// + e.
#pragma once
#include <backward/context.cuh>
#include <backward/differentiate.cuh>
#include <config.cuh>
#include <flashcore/params_backward_hopper.cuh>
#include <sm90_backward/producer.cuh>
#include <sm90_backward/traits.cuh>

namespace flashcore {

// What of a tile is hidden: `masked`: some, by positions or for want of rows; `is_full`: nothing,
// for the block of a mask is full, and nothing has been looked up.
struct Masking {
    bool masked, is_full;
};

struct TileGradients : WarpContext {
    const HopperBackwardParams& p;
    SharedStorage& smem;
    State state;
    Bits visible[1][2];    // with masks: which rows of its next tile each of the lane's meets
    Statistics own[1][2];  // of the lane's queries, where the CTA owns queries
    float distances[2];    // SUMS_DISTANCES: of the lane's rows

    // P takes the place of S.
    __device__ __forceinline__ void exponentiate(const WalkedTile& at, const Masking& masking,
                                                 float (&rS)[BLOCK_N / 2]) {
        if (masking.masked) {
            exponentiate_as<true, HIDES_KEYS>(at, rS);
        } else if (LISTED && masking.is_full) {
            exponentiate_as<false, false>(at, rS);
        } else {
            exponentiate_as<false, HIDES_KEYS>(at, rS);
        }
    }

    // dS takes the place of dP.
    __device__ __forceinline__ void multiply_p(const Masking& masking, const Kept (&kept)[2],
                                               const float (&rP)[BLOCK_N / 2],
                                               float (&rdP)[BLOCK_N / 2]) {
        if (masking.masked) {
            multiply_p_as<true, HIDES_KEYS>(kept, rP, rdP);
        } else if (LISTED && masking.is_full) {
            multiply_p_as<false, false>(kept, rP, rdP);
        } else {
            multiply_p_as<false, HIDES_KEYS>(kept, rP, rdP);
        }
    }

    // Both, with a rule's derivative.
    __device__ __forceinline__ void differentiate_tile(const WalkedTile& at, const Masking& masking,
                                                       const Kept (&kept)[2],
                                                       float (&rS)[BLOCK_N / 2],
                                                       float (&rdP)[BLOCK_N / 2]) {
        if (masking.masked) {
            differentiate_as<true, HIDES_KEYS>(at, kept, rS, rdP);
        } else if (LISTED && masking.is_full) {
            differentiate_as<false, false>(at, kept, rS, rdP);
        } else {
            differentiate_as<false, HIDES_KEYS>(at, kept, rS, rdP);
        }
    }

  private:
    // What the lane's row `half` meets of the tile; all, where nothing has been looked up.
    template <bool LOOKED_UP>
    __device__ __forceinline__ KeyBits<LOOKED_UP, TILES_N> seen_by(int half) const {
        if constexpr (LOOKED_UP == HIDES_KEYS) return visible[0][half];
        return {};
    }

    template <bool MASKED, bool LOOKED_UP>
    __device__ __forceinline__ void exponentiate_as(const WalkedTile& at,
                                                    float (&rS)[BLOCK_N / 2]) {
        each_pair([&](int i, int n, int half, const Statistics(&of)[2]) {
#pragma unroll
            for (int e = 0; e < 2; ++e)
                rS[i + e] = probability<MASKED>(*this, at, 0, half, n, e, seen_by<LOOKED_UP>(half),
                                                rS[i + e], of[e].shift);
        });
    }

    template <bool MASKED, bool LOOKED_UP>
    __device__ __forceinline__ void multiply_p_as(const Kept (&kept)[2],
                                                  const float (&rP)[BLOCK_N / 2],
                                                  float (&rdP)[BLOCK_N / 2]) {
        each_pair([&](int i, int n, int half, const Statistics(&of)[2]) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float dp = kept[half].select(n, e, rdP[i + e] * keep_scale<RULES>(p));
                rdP[i + e] = score_gradient<MASKED, LOOKED_UP>(rP[i + e], dp, of[e].delta);
            }
        });
    }

    template <bool MASKED, bool LOOKED_UP>
    __device__ __forceinline__ void differentiate_as(const WalkedTile& at, const Kept (&kept)[2],
                                                     float (&rS)[BLOCK_N / 2],
                                                     float (&rdP)[BLOCK_N / 2]) {
        each_pair([&](int i, int n, int half, const Statistics(&of)[2]) {
            const float s[2] = {rS[i], rS[i + 1]}, dp[2] = {rdP[i], rdP[i + 1]};
            const auto added = [&](const Meeting& x, float dt) {
                if (SUMS_DISTANCES) distances[half] += dt * distance(x);
            };
            const PairOfGradients pair = differentiate<MASKED>(
                *this, at, 0, half, n, seen_by<LOOKED_UP>(half), kept[half], s, dp, of, added);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                rS[i + e] = pair.p[e];
                rdP[i + e] = pair.ds[e];
            }
        });
    }

    // Calls visit(i, n, half, of) for each pair of a lane's neighbouring elements, i and i + 1, of
    // 8-column group n of its row `half`; of: the statistics of their queries.
    template <typename Visit>
    __device__ __forceinline__ void each_pair(Visit visit) const {
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
            Statistics of[2];
            if constexpr (OWNS_KEYS) {
                const int query = n * 8 + lane % QUAD * 2;
                const float2 shift = load_pair(&smem.sShift[state.stage][query]);
                const float2 delta = load_pair(&smem.sDelta[state.stage][query]);
                of[0] = {shift.x, delta.x};
                of[1] = {shift.y, delta.y};
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if constexpr (!OWNS_KEYS) of[0] = of[1] = own[0][half];
                visit(4 * n + 2 * half, n, half, of);
            }
        }
    }

    __device__ __forceinline__ static float2 load_pair(const float* address) {
        return *reinterpret_cast<const float2*>(address);
    }
};

}  // namespace flashcore
