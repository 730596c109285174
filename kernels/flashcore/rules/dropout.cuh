// dropout.cuh - which probabilities dropout keeps. It is a function of the call's seed and offset
// and of (batch, head, query, key) alone: the same for every tile, kernel and GPU, in the forward
// pass and in the backward pass. problem/philox.py has the same in NumPy.
//
// A call of Philox gives 8 numbers of 16 bits. They belong to 2 queries by 4 keys:
//
//   query 16 x + r + 8 a        counter: key block 4 y + c, query block 8 x + r, head, batch
//   key   16 y + 2 c + 8 b + e  number:  halfword e (0: the low one) of word 2 a + b
//
// A probability is kept if its number is at least dropout_p 2^16.
//
// These are the elements of an accumulator that a lane has: rows r and r + 8 of every 16, columns
// 2 c and 2 c + 1 of every 8. So where rows are queries, it uses all numbers of a call. Where rows
// are keys, it has columns 2 c and 2 c + 1 as queries: two calls, and half of each. The other half
// belongs to the lane whose keys are next to its own, so each of both makes one call, and they
// exchange.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/philox.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/types.cuh>

namespace flashcore {

template <int RULES>
constexpr bool DROPS = (RULES & RULE_DROPOUT) != 0;

// A bit for each of a lane's elements of a row of probabilities: whether it is kept.
template <int RULES, int PAIRS>
using KeptBits = KeyBits<DROPS<RULES>, PAIRS>;

// The factor that makes up for what is dropped, 1 / (1 - dropout_p).
template <int RULES>
__device__ __forceinline__ float keep_scale(const AttentionParams& p) {
    return DROPS<RULES> ? p.keep_scale : 1.0f;
}

// Of one head of a batch, or of a sequence of a packed batch.
struct Dropout {
    uint64 key;
    uint32 threshold;  // in the upper halfword
    uint32 head, batch;

    __device__ __forceinline__ Dropout(const AttentionParams& p, int batch, int head)
        : key(p.rng_key), threshold(uint32(p.dropout_p * 0x1p32f)), head(head), batch(batch) {
        if (p.rng != nullptr) key = p.rng[0] + mix(p.rng[1]);
    }

    // Which queries and which keys share a call.
    __device__ __forceinline__ static uint32 query_block(uint32 query) {
        return query / 16 * 8 + query % 8;
    }
    __device__ __forceinline__ static uint32 key_block(uint32 key_index) {
        return key_index / 16 * 4 + key_index % 8 / 2;
    }
    __device__ __forceinline__ void count(uint32 (&counter)[4], uint32 query_block,
                                          uint32 key_block) const {
        counter[0] = key_block;
        counter[1] = query_block;
        counter[2] = head;
        counter[3] = batch;
    }
    __device__ __forceinline__ bool keeps(uint32 word, int e) const {
        return (e ? word : word << 16) >= threshold;
    }

    // Whether one element is kept.
    __device__ __forceinline__ bool keeps_at(int query, int key_index) const {
        uint32 drawn[1][4];
        count(drawn[0], query_block(query), key_block(key_index));
        philox(drawn, key);
        const uint32(&words)[4] = drawn[0];
        const bool a = query / 8 % 2, b = key_index / 8 % 2;
        return keeps(a ? (b ? words[3] : words[2]) : (b ? words[1] : words[0]), key_index % 2);
    }

    // Makes CALLS calls, N at a time: count_of(i, counter) says which, use(i, words) takes what the
    // i-th gives.
    template <int CALLS, int N, typename CountOf, typename Use>
    __device__ __forceinline__ void draw_each(CountOf count_of, Use use) const {
        if constexpr (CALLS % N != 0) {
            draw_each<CALLS, N - 1>(count_of, use);
        } else {
#pragma unroll
            for (int first = 0; first < CALLS; first += N) {
                uint32 words[N][4];
#pragma unroll
                for (int n = 0; n < N; ++n) count_of(first + n, words[n]);
                philox(words, key);
#pragma unroll
                for (int n = 0; n < N; ++n) use(first + n, words[n]);
            }
        }
    }

    // Rows are queries. Sets the bits of a lane's two rows, `query` and query + 8; first_key: the
    // first of its keys in them.
    template <bool USED, int PAIRS>
    __device__ __forceinline__ void keep_rows(KeyBits<USED, PAIRS> (&kept)[2], int query,
                                              int first_key) const {
        static_assert(PAIRS % 2 == 0, "a call has pairs of 16 keys");
        const uint32 i_block = query_block(query), j_block = key_block(first_key);
        draw_each<PAIRS / 2, 4>(
            [&](int step, uint32(&counter)[4]) { count(counter, i_block, j_block + 4 * step); },
            [&](int step, const uint32(&words)[4]) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    kept[i / 4].set(2 * step + i / 2 % 2, i % 2, keeps(words[i / 2], i % 2));
            });
    }

    // Rows are keys. Sets the bits of a lane's two rows, `key_index` and key_index + 8;
    // first_query: the first of its queries in them. All lanes of the warp call it.
    template <bool USED, int PAIRS>
    __device__ __forceinline__ void keep_columns(KeyBits<USED, PAIRS> (&kept)[2], int key_index,
                                                 int first_query) const {
        static_assert(PAIRS % 2 == 0, "a call has queries of two pairs");
        const int e = key_index % 2;       // whose numbers of a call are this lane's
        KeyBits<USED, PAIRS> drawn[2][2];  // by e, b: of the calls that this lane makes
        // Two at a time: the kernels where rows are keys have no registers for more.
        const uint32 i_block = query_block(first_query + e), j_block = key_block(key_index);
        draw_each<PAIRS / 2, 2>(
            [&](int step, uint32(&counter)[4]) { count(counter, i_block + 8 * step, j_block); },
            [&](int step, const uint32(&words)[4]) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    drawn[i % 2][i / 2 % 2].set(2 * step + i / 4, 0, keeps(words[i / 2], i % 2));
            });
#pragma unroll
        for (int b = 0; b < 2; ++b) {
#pragma unroll
            for (int w = 0; w < KeyBits<USED, PAIRS>::WORDS; ++w) {
                const uint32 low = drawn[0][b].words[w], high = drawn[1][b].words[w];
                const uint32 own = e ? high : low, other = shfl_xor(e ? low : high, 4);
                // The lower halfword is of the even queries.
                kept[b].words[w] = e ? other | own << 16 : own | other << 16;
            }
        }
    }
};

}  // namespace flashcore
