// seen_keys.cuh - which keys of a tile some row sees. A key that a mask hides from all rows has
// probability 0, but 0 * NaN is not 0: what its row of V holds must not matter. A warp that loads V
// into registers takes zeros instead (KeyBits::select). wgmma reads V from shared memory: there the
// warps first find out which keys nobody sees, and overwrite those rows of V with zeros.
#pragma once
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// How much of a tile is seen: some of its keys, all of them.
struct SeenExtent {
    bool some, all;
};

// In shared memory: NUM_WARPS warps tell each other which of KEYS keys each of them sees.
template <bool HIDES_KEYS, int NUM_WARPS, int KEYS>
struct SeenKeys {
    using Bits = KeyBits<true, KEYS / 8>;
    static constexpr int WORDS = Bits::WORDS;
    static_assert(4 * WORDS <= WARP_SIZE, "a lane per word");
    uint32 bits[NUM_WARPS][4][WORDS];  // of the four lanes that share a row

    // mine: the keys that some row of the warp sees. A barrier has to follow before others read it.
    __device__ __forceinline__ void publish(const Bits& mine, int warp) {
        const int lane = thread_index() % WARP_SIZE;
        if (lane >= 4) return;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) bits[warp][lane][w] = mine.words[w];
    }

    // Which of this lane's keys a warp has published as seen.
    __device__ __forceinline__ Bits by(int warp) const {
        Bits theirs;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) theirs.words[w] = bits[warp][thread_index() % 4][w];
        return theirs;
    }

    // How much of the tile is seen, once all have published. All warps get the same answer.
    __device__ __forceinline__ SeenExtent extent() const {
        const int lane = thread_index() % WARP_SIZE;
        const bool has_word = lane < 4 * WORDS;
        const uint32 word = has_word ? seen(lane / WORDS, lane % WORDS) : 0;
        return {warp_any(word != 0), !warp_any(has_word && word != Bits::all(lane % WORDS))};
    }

    // The keys of a word that some warp has published as seen: lane i has word i % WORDS of the i /
    // WORDS-th of the four lanes that share a row.
    __device__ __forceinline__ uint32 word_of_lane() const {
        const int lane = thread_index() % WARP_SIZE;
        return lane < 4 * WORDS ? seen(lane / WORDS, lane % WORDS) : 0;
    }
    // Whether a key is among them; all lanes of the warp ask for the same one.
    __device__ __forceinline__ static bool has(uint32 word_of_lane, int key) {
        const uint32 word = shfl(word_of_lane, key % 8 / 2 * WORDS + key / 128);
        return word >> Bits::bit(key / 8, key % 2) & 1u;
    }

    // Overwrites rows of sV (KEYS rows) whose key no warp sees with zeros. Of `warps` warps each
    // has as many rows.
    template <typename Layout, typename T>
    __device__ __forceinline__ void clear_unseen(T* sV, int warp, int warps = NUM_WARPS) const {
#pragma unroll 1
        for (int key = warp; key < KEYS; key += warps) {
            if (seen(key % 8 / 2, key / 128) >> Bits::bit(key / 8, key % 2) & 1u) continue;
            for (int d = thread_index() % WARP_SIZE * 2; d < Layout::COLS; d += 2 * WARP_SIZE)
                *reinterpret_cast<uint32*>(sV + Layout::element(key, d)) = 0;
        }
    }

  private:
    // Which keys of a word of one of the four lanes some warp sees.
    __device__ __forceinline__ uint32 seen(int quad, int word) const {
        uint32 any = 0;
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; ++warp) any |= bits[warp][quad][word];
        return any;
    }
};

// Without masks all warps see all keys.
template <int NUM_WARPS, int KEYS>
struct SeenKeys<false, NUM_WARPS, KEYS> {
    using Bits = KeyBits<false, KEYS / 8>;
    template <typename Mine>
    __device__ __forceinline__ void publish(const Mine&, int) {}
    __device__ __forceinline__ Bits by(int) const { return {}; }
    __device__ __forceinline__ SeenExtent extent() const { return {true, true}; }
    template <typename Layout, typename T>
    __device__ __forceinline__ void clear_unseen(T*, int, int = NUM_WARPS) const {}
};

}  // namespace flashcore
