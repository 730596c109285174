// row_array.cuh - what a row of scores has of a bias or a mask: two neighbouring keys at a time.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

// Loads elements `key` and key + 1 of a row. MASKED: keys behind the last one get the last one's.
// PAIRS: rows hold an even number of keys, so a pair that begins inside a row ends inside it.
template <bool MASKED, bool PAIRS, typename E>
__device__ __forceinline__ void load_two(float (&x)[2], const E* gRow, const BroadcastStrides& s,
                                         int key, int last_key) {
    E two[2];
    if constexpr (PAIRS) {
        const int first = MASKED ? min(key, last_key & ~1) : key;
        *reinterpret_cast<Vector<2 * sizeof(E)>*>(two) =
            *reinterpret_cast<const Vector<2 * sizeof(E)>*>(gRow + first);
    } else {
        two[0] = gRow[(MASKED ? min(key, last_key) : key) * s.column];
        two[1] = gRow[(MASKED ? min(key + 1, last_key) : key + 1) * s.column];
    }
    x[0] = to_float(two[0]);
    x[1] = to_float(two[1]);
}

}  // namespace flashcore
