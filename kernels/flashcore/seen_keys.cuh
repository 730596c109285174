// seen_keys.cuh - a boolean mask may hide a key from all rows of a tile. Its probability is 0 then,
// but 0 * NaN is not: what its row of V holds must not matter, so it is replaced by zeros.
#pragma once
#include <flashcore/ptx_warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Which of a warp's keys its rows see, found lane by lane.
template <bool HIDES_KEYS, int KEYS_PER_WARP>
struct SeenByWarp {
    uint32 bits[div_up(KEYS_PER_WARP, 32)] = {};
    // Key `key` of the warp's, counted from this lane's first.
    __device__ __forceinline__ void set(int key) {
        bits[key / 32] |= 1u << (key % 32 + threadIdx.x % 4 * 2);
    }
};
template <int KEYS_PER_WARP>
struct SeenByWarp<false, KEYS_PER_WARP> {
    __device__ __forceinline__ void set(int) {}
};

// Which of a lane's keys the masks leave to a row, pairs of keys 8 n and 8 n + 1 from the lane's
// first on; found ahead of the scores: they and all that it takes to look keys up do not fit the
// registers together.
template <int PAIRS>
struct VisiblePairs {
    static constexpr int WORDS = div_up(PAIRS, 16);
    uint32 words[WORDS];  // of pair n: bits 2 n and 2 n + 1

    __device__ __forceinline__ bool has(int n, int e) const {
        return words[n / 16] >> (n % 16 * 2 + e) & 1u;
    }

    // USED: without it nothing is found. LOOKUPS at a time.
    template <bool USED, bool MASKED, int LOOKUPS, typename Rules>
    __device__ static __forceinline__ VisiblePairs find(const Rules& rules, int first_key) {
        VisiblePairs visible{};
        if constexpr (USED) {
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                uint32 bits = 0;
#pragma unroll(LOOKUPS)
                for (int n = min(word * 16 + 16, PAIRS) - 1; n >= word * 16; --n) {
                    bool seen[2];
                    rules.template see<MASKED>(seen, first_key + n * 8);
                    bits = bits << 2 | seen[1] << 1 | uint32(seen[0]);
                }
                visible.words[word] = bits;
            }
        }
        return visible;
    }
};

// The place in shared memory where the warps put this together. Where no key is unseen they meet
// once, so that a fast warp must not come again before all have read: the caller sees to it.
template <bool HIDES_KEYS, int WARPS_M, int COLUMNS, int KEYS_PER_WARP>
struct SeenKeys {
    static constexpr int WORDS = div_up(KEYS_PER_WARP, 32);
    static constexpr int NUM_WARPS = WARPS_M * COLUMNS;
    uint32 bits[NUM_WARPS][WORDS];  // warp column * WARPS_M + m: row m, keys of that column

    // Zeros in sV (COLUMNS * KEYS_PER_WARP rows) where no warp sees the key. `warp` counts from 0;
    // sync() is a barrier of all these warps.
    template <typename Layout, typename T, typename Sync>
    __device__ __forceinline__ void clear_unseen(T* sV, const SeenByWarp<true, KEYS_PER_WARP>& mine,
                                                 int warp, Sync sync) {
        const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            const uint32 word = warp_or(mine.bits[w]);
            if (lane == 0) bits[warp][w] = word;
        }
        sync();  // all warps' bits are there
        // Lane i has the i-th word of keys. All warps come to the same answer.
        const uint32 all = lane % WORDS < WORDS - 1 ? ALL : ALL >> (WORDS * 32 - KEYS_PER_WARP);
        const bool some_unseen = lane < COLUMNS * WORDS && seen(lane / WORDS, lane % WORDS) != all;
        if (!warp_any(some_unseen)) return;
#pragma unroll 1
        for (int key = warp; key < COLUMNS * KEYS_PER_WARP; key += NUM_WARPS) {
            const int k = key % KEYS_PER_WARP;
            if (seen(key / KEYS_PER_WARP, k / 32) >> (k % 32) & 1u) continue;
            for (int d = lane; d < Layout::COLS; d += WARP_SIZE) sV[Layout::element(key, d)] = T{};
        }
        sync();  // no warp reads V before
    }

  private:
    static_assert(COLUMNS * WORDS <= WARP_SIZE, "a lane per word");
    static constexpr uint32 ALL = 0xffffffffu;

    // Which keys of a word of a column some warp sees.
    __device__ __forceinline__ uint32 seen(int column, int word) const {
        uint32 any = 0;
#pragma unroll
        for (int m = 0; m < WARPS_M; ++m) any |= bits[column * WARPS_M + m][word];
        return any;
    }
};
template <int WARPS_M, int COLUMNS, int KEYS_PER_WARP>
struct SeenKeys<false, WARPS_M, COLUMNS, KEYS_PER_WARP> {
    template <typename Layout, typename T, typename Sync>
    __device__ __forceinline__ void clear_unseen(T*, const SeenByWarp<false, KEYS_PER_WARP>&, int,
                                                 Sync) {}
};

}  // namespace flashcore
