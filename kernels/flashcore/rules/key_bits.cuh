// key_bits.cuh - for kernels with a boolean mask or a mask_mod: a bit for each key that a lane has
// of a row of scores. The bit says whether the row sees the key.
//
// A lane has pairs of keys: pair n is keys 8 n and 8 n + 1, counted from the lane's first key. A
// word holds 16 pairs, which are the lane's share of 128 keys. Key e (0 or 1) of pair n has bit
//
//   16 e + 8 (n / 4 % 2) + 4 (n / 8 % 2) + 2 (n % 2) + n / 2 % 2
//
// e chooses the halfword, so that one multiplication turns a pair's two bits into a mask for two
// 16-bit values. The order within a halfword is the one in which mask_chunks gets the bits.
#pragma once
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

template <bool USED, int PAIRS>
struct KeyBits {
    static constexpr int WORDS = div_up(PAIRS, 16);
    uint32 words[WORDS] = {};  // 16 pairs each

    __device__ static constexpr int bit(int n, int e) {
        return 16 * e + 8 * (n / 4 % 2) + 4 * (n / 8 % 2) + 2 * (n % 2) + n / 2 % 2;
    }
    // Word w if the row sees all keys.
    __device__ static constexpr uint32 all(int w) {
        uint32 bits = 0;
        for (int n = w * 16; n < min(w * 16 + 16, PAIRS); ++n)
            bits |= 1u << bit(n, 0) | 1u << bit(n, 1);
        return bits;
    }

    __device__ __forceinline__ bool has(int n, int e) const {
        return words[n / 16] & 1u << bit(n, e);
    }
    __device__ __forceinline__ void set(int n, int e, bool value) {
        if (value) words[n / 16] |= 1u << bit(n, e);
    }

    // Whether any lane of the warp has a bit.
    __device__ __forceinline__ bool any_in_warp() const {
        uint32 bits = 0;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) bits |= words[w];
        return warp_any(bits != 0);
    }

    // Of two 16-bit values, for the keys of pair n, returns those whose key has its bit, and zeros
    // for the others.
    __device__ __forceinline__ uint32 select(int n, uint32 values) const {
        return values & (words[n / 16] >> bit(n, 0) & 0x00010001u) * 0xffffu;
    }
    // The same for the fp32 value of one key.
    __device__ __forceinline__ float select(int n, int e, float value) const {
        return has(n, e) ? value : 0.0f;
    }

    __device__ __forceinline__ void set_all() {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) words[w] = all(w);
    }

    // The bits of keys in [begin, end), counted from the lane's first key.
    __device__ static __forceinline__ KeyBits between(int begin, int end) {
        KeyBits inside;
#pragma unroll
        for (int w = 0; w < WORDS; ++w)
            inside.words[w] = reordered(before(end - 128 * w) & ~before(begin - 128 * w)) & all(w);
        return inside;
    }
    // Clears the bits of keys outside [begin, end).
    __device__ __forceinline__ void keep(int begin, int end) {
        const KeyBits inside = between(begin, end);
#pragma unroll
        for (int w = 0; w < WORDS; ++w) words[w] &= inside.words[w];
    }
    // Clears the bits of keys in [begin, end).
    __device__ __forceinline__ void clear(int begin, int end) {
        const KeyBits inside = between(begin, end);
#pragma unroll
        for (int w = 0; w < WORDS; ++w) words[w] &= ~inside.words[w];
    }

    __device__ __forceinline__ void add(const KeyBits& other) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) words[w] |= other.words[w];
    }
    // Adds the bits of the lanes that have the same keys of other rows: every fourth lane.
    __device__ __forceinline__ void add_rows() {
#pragma unroll
        for (int w = 0; w < WORDS; ++w)
#pragma unroll
            for (int mask = 4; mask < WARP_SIZE; mask *= 2) words[w] |= shfl_xor(words[w], mask);
    }

  private:
    // A word for the keys before `end`, whose halfword e has pair n at bit n.
    __device__ static __forceinline__ uint32 before(int end) {
        const int pairs[2] = {min(max(end + 7 >> 3, 0), 16), min(max(end + 6 >> 3, 0), 16)};
        return (1u << pairs[0]) - 1 | (1u << pairs[1]) - 1 << 16;
    }
    // The same word with each pair's bits where bit() has them: the two middle nibbles of a
    // halfword change places, and the two middle bits of a nibble.
    __device__ static __forceinline__ uint32 reordered(uint32 x) {
        const uint32 nibbles = (x ^ x >> 4) & 0x00f000f0u;
        x ^= nibbles ^ nibbles << 4;
        const uint32 inner = (x ^ x >> 1) & 0x22222222u;
        return x ^ inner ^ inner << 1;
    }
};

// Without masks a row sees every key, and no bits are kept.
template <int PAIRS>
struct KeyBits<false, PAIRS> {
    __device__ __forceinline__ bool has(int, int) const { return true; }
    __device__ __forceinline__ void set(int, int, bool) {}
    __device__ __forceinline__ uint32 select(int, uint32 values) const { return values; }
    __device__ __forceinline__ float select(int, int, float value) const { return value; }
    __device__ __forceinline__ bool any_in_warp() const { return true; }
    __device__ __forceinline__ void set_all() {}
    __device__ __forceinline__ void add(const KeyBits&) {}
    __device__ __forceinline__ void add_rows() {}
};

// ---- a mask that is read 16 keys at a time -----------------------------------------------------

constexpr int MASK_CHUNK = 16;  // bytes, a key each

// Returns a bit for each of 16 bytes: whether the byte is not 0. Byte i of the result has the bits
// of bytes i, i + 4, i + 8, i + 12 of the chunk, from its lowest bit on.
__device__ __forceinline__ uint32 chunk_bits(const uint4& chunk) {
    const uint32 x[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    uint32 bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // The highest bit of a byte: its own, or carried there from what lies below it.
        const uint32 highest = ((x[i] & 0x7f7f7f7fu) + 0x7f7f7f7fu | x[i]) & 0x80808080u;
        bits |= highest >> (7 - i);
    }
    return bits;
}

// Returns the bits of up to 16 pairs of a row: one word of KeyBits. Each of the four lanes that
// share the row reads one chunk of the first 64 keys and one of the second 64; then they exchange
// bits, since lane `quad` of the four needs keys 2 quad and 2 quad + 1 of every 8. read(i) returns
// the i-th chunk.
template <typename Read>
__device__ __forceinline__ uint32 mask_chunks(int quad, int pairs, Read read) {
    uint32 mine = 0;
#pragma unroll
    for (int half = 0; half < div_up(pairs, 8); ++half) {
        const int chunk = half * 4 + quad;
        if (pairs % 8 == 0 || chunk * 2 < pairs) mine |= chunk_bits(read(chunk)) << 4 * half;
    }
    // Byte 8 a + 4 b + 2 c + e of a chunk is key e of the chunk's pair a, of the lane for which 2 b
    // + c = quad. So its bit is bit 2 a + b of byte 2 c + e of `mine`, or 4 bits higher if it is
    // one of the second 64 keys.
    uint32 part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32 chunk = shfl(mine, thread_index() % WARP_SIZE - quad + i);
        part[i] = chunk >> (quad % 2 * 16 + quad / 2) & 0x5555u;
    }
    const uint32 low = part[0] | part[1] << 1, high = part[2] | part[3] << 1;
    return interleave_bytes(low, high);  // the low bytes are of e = 0
}

}  // namespace flashcore
