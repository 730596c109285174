// Probes of key_bits.cuh: one warp, whose lanes have eight rows of keys.
#include <flashcore/rules/key_bits.cuh>

using namespace flashcore;

template <int PAIRS>
__device__ void read_and_tell(const uint8* mask, uint8* seen, uint32* values, float* singles,
                              uint8* kept, uint8* together) {
    const int lane = thread_index(), quad = lane % 4, row = lane / 4, keys = PAIRS * 8;
    KeyBits<true, PAIRS> bits;
    bits.words[0] = mask_chunks(quad, PAIRS, [&](int chunk) {
        return reinterpret_cast<const uint4*>(mask + row * keys)[chunk];
    });
    KeyBits<true, PAIRS> inside = bits, all = bits;
    inside.keep(5 - quad * 2, keys - 3 - quad * 2);  // counted from this lane's first key
    all.add_rows();
    for (int n = 0; n < PAIRS; ++n) {
        values[row * keys / 2 + n * 4 + quad] = bits.select(n, 0x43218765u);
        for (int e = 0; e < 2; ++e) {
            const int i = row * keys + n * 8 + quad * 2 + e;
            seen[i] = bits.has(n, e);
            singles[i] = bits.select(n, e, __builtin_bit_cast(float, 0x7fc00000u));
            kept[i] = inside.has(n, e);
            together[i] = all.has(n, e);
        }
    }
    bits = KeyBits<true, PAIRS>();
    for (int n = 0; n < PAIRS; ++n) bits.set(n, 0, true), bits.set(n, 1, true);
    if (bits.words[0] != bits.all(0)) seen[row * keys] = 255;
}

// 32 threads; mask: (8, 8 * pairs) bytes. values: what is selected of 0x43218765; singles: of NaN.
#define FC_PROBE(PAIRS)                                                                      \
    extern "C" __global__ void pairs_##PAIRS(const uint8* mask, uint8* seen, uint32* values, \
                                             float* singles, uint8* kept, uint8* together) { \
        read_and_tell<PAIRS>(mask, seen, values, singles, kept, together);                   \
    }
FC_PROBE(2)
FC_PROBE(4)
FC_PROBE(6)
FC_PROBE(8)
FC_PROBE(10)
FC_PROBE(16)
