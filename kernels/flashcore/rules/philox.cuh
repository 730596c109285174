// philox.cuh - Philox4x32-10, a random number generator that is a function: of a key, and of a
// counter, which says which numbers are wanted (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3"). So numbers need no state, and no order in which they are drawn.
#pragma once
#include <flashcore/types.cuh>

namespace flashcore {

// Turns counters into four random words each; together, since they share what becomes of the key.
template <int N>
__device__ __forceinline__ void philox(uint32 (&counters)[N][4], uint64 key) {
    uint32 key_low = uint32(key), key_high = uint32(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            uint32(&x)[4] = counters[n];
            const uint64 a = uint64(x[0]) * 0xd2511f53u, b = uint64(x[2]) * 0xcd9e8d57u;
            x[0] = uint32(b >> 32) ^ x[1] ^ key_low;
            x[1] = uint32(b);
            x[2] = uint32(a >> 32) ^ x[3] ^ key_high;
            x[3] = uint32(a);
        }
        key_low += 0x9e3779b9u;
        key_high += 0xbb67ae85u;
    }
}

// Makes of each number another, so that neighbours have nothing in common: the end of SplitMix64
// (Steele et al. 2014).
__device__ __forceinline__ uint64 mix(uint64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

}  // namespace flashcore
