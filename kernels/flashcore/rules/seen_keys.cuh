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

// The largest power of two that divides x and is not above `most`; 1 if there is none.
__device__ constexpr int power_of_two_in(int x, int most) {
    return x % 2 != 0 || most < 2 ? 1 : 2 * power_of_two_in(x / 2, most / 2);
}

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

    // Overwrites rows of sV (KEYS rows) whose key no warp sees with zeros: WARPS warps together, of
    // which this is number `warp`.
    //
    // A thread has one chunk of every GROUPS-th group of eight rows, the same row of each: so its
    // keys' bits lie in the word of one lane, and only constants are added to its bit and to its
    // address from one row to the next. Eight threads have the same chunk of eight rows, which are
    // in different banks.
    template <typename Layout, int WARPS, typename T>
    __device__ __forceinline__ void clear_unseen(T* sV, int warp) const {
        constexpr int EIGHTHS = WARPS * WARP_SIZE / 8, CHUNKS = Layout::COLS / Layout::CHUNK;
        constexpr int GROUPS = power_of_two_in(KEYS / 8, EIGHTHS / CHUNKS);
        const int lane = thread_index() % WARP_SIZE;
        const uint32 of_lane = word_of_lane();
        const int row = lane % 8, place = (warp * WARP_SIZE + lane) / 8;
        const int group = place / CHUNKS;  // the first
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            const uint32 all = shfl(of_lane, row / 2 * WORDS + w);
            const uint32 seen = all >> Bits::bit(group, row % 2);
            if (group >= GROUPS) continue;
#pragma unroll
            for (int n = 0; n < 16; n += GROUPS) {
                if (16 * w + n >= KEYS / 8 || seen >> Bits::bit(n, 0) & 1u) continue;
                const int key = 128 * w + 8 * (group + n) + row;
                for (int chunk = place % CHUNKS; chunk < CHUNKS; chunk += EIGHTHS)
                    *reinterpret_cast<Vector<16>*>(
                        sV + Layout::element(key, chunk * Layout::CHUNK)) = Vector<16>();
            }
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
    template <typename Layout, int WARPS, typename T>
    __device__ __forceinline__ void clear_unseen(T*, int) const {}
};

}  // namespace flashcore
