// score.cuh - what a score goes through between Q K^T and softmax, besides position_mask.cuh:
// softcap, ALiBi, bias, the user's score_mod; then the boolean mask and the user's mask_mod. A
// compiled kernel has the rules of its problem and no others.
#pragma once
#include <flashcore/params.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/rules/dual.cuh>
#include <flashcore/rules/key_bits.cuh>
#include <flashcore/rules/listed_tiles.cuh>
#include <flashcore/rules/mod_elements.cuh>
#include <flashcore/rules/mods.cuh>
#include <flashcore/rules/row_array.cuh>
#include <flashcore/rules/softcap.cuh>

namespace flashcore {

// Bits of FC_RULES; problem/rules.py has the same.
constexpr int RULE_SOFTCAP = 1;
constexpr int RULE_ALIBI = 2;
constexpr int RULE_BIAS = 4;       // in q's dtype
constexpr int RULE_BIAS_FP32 = 8;  // in float32
constexpr int RULE_SCORE_MOD = 16;
constexpr int RULE_MASK = 32;
constexpr int RULE_MASK_MOD = 64;
constexpr int RULE_SINK = 128;           // joins the softmax at the end, see online_softmax.cuh
constexpr int RULE_BIAS_PAIRS = 256;     // two neighbouring keys of the bias in one aligned load
constexpr int RULE_MASK_PAIRS = 512;     // the same of the mask
constexpr int RULE_SCALE_FIRST = 1024;   // scale before the maximum, for a scale below 2^-126
constexpr int RULE_MASK_CHUNKS = 2048;   // 16 neighbouring keys of the mask in one aligned load
constexpr int RULE_SOFTCAP_WIDE = 4096;  // a cap that most scores are far below
constexpr int RULE_DROPOUT = 8192;       // after the softmax, see dropout.cuh
constexpr int RULE_BLOCKS = 16384;       // lists of tiles, see listed_tiles.cuh

// Rules that change a score, rather than hide a key.
constexpr int CAPPING_RULES = RULE_SOFTCAP | RULE_SOFTCAP_WIDE;
constexpr int SCORE_RULES =
    CAPPING_RULES | RULE_ALIBI | RULE_BIAS | RULE_BIAS_FP32 | RULE_SCORE_MOD | RULE_SCALE_FIRST;
constexpr int HIDING_RULES = RULE_MASK | RULE_MASK_MOD | RULE_BLOCKS;

template <typename T, bool FP32>
struct BiasType {
    using type = T;
};
template <typename T>
struct BiasType<T, true> {
    using type = float;
};

// The derivatives of a score after its rules: by the score before them, softmax_scale q . k; by
// what ALiBi and the bias add to it; and by elements of mod_args.
struct ScoreSlopes {
    float score, added;
    PerElement elements;
};

// The rules as they apply to one query row, two neighbouring keys at a time. T is the type of q.
template <typename T, int RULES>
struct RowRules {
    static constexpr bool CHANGES_SCORES = (RULES & SCORE_RULES) != 0;
    static constexpr bool HIDES_KEYS = (RULES & HIDING_RULES) != 0;
    using Bias = typename BiasType<T, (RULES & RULE_BIAS_FP32) != 0>::type;

    const AttentionParams& params;
    int batch, head, query;
    int last_key;  // of the sequence: keys behind it are not looked up
    int position;  // the key index of the query's own position
    float slope;
    const Bias* gBias;   // the row's bias of key 0
    const uint8* gMask;  // the row's mask of key 0

    __device__ __forceinline__ RowRules(const AttentionParams& p, int batch, int head, int query,
                                        int seqlen_q, int seqlen_kv, int diagonal)
        : params(p),
          batch(batch),
          head(head),
          query(min(query, seqlen_q - 1)),
          last_key(seqlen_kv - 1),
          position(query + diagonal) {
        if constexpr (RULES & RULE_ALIBI)
            slope = p.alibi[batch * p.alibi_strides.batch + head * p.alibi_strides.head];
        if constexpr (RULES & (RULE_BIAS | RULE_BIAS_FP32))
            gBias = static_cast<const Bias*>(p.bias) + row_offset(p.bias_strides);
        if constexpr (RULES & RULE_MASK) gMask = p.mask + row_offset(p.mask_strides);
    }

    // Turns q . k of keys `key` and key + 1 into their scores in natural units. MASKED: the keys
    // may lie behind the sequence; they get the last key's score then, which the mask hides.
    template <bool MASKED>
    __device__ __forceinline__ void change(float (&s)[2], int key) const {
        const int keys[2] = {inside<MASKED>(key), inside<MASKED>(key + 1)};
        float bias[2] = {};
        if constexpr (RULES & (RULE_BIAS | RULE_BIAS_FP32))
            load_two<MASKED, (RULES & RULE_BIAS_PAIRS) != 0>(bias, gBias, params.bias_strides, key,
                                                             last_key);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            s[e] *= params.softmax_scale;
            if constexpr (RULES & CAPPING_RULES)
                s[e] = params.softcap *
                       tanh_for<T, (RULES & RULE_SOFTCAP_WIDE) != 0>(s[e] * params.inverse_softcap);
            if constexpr (RULES & RULE_ALIBI) s[e] -= slope * distance(keys[e]);
            s[e] += bias[e];
            if constexpr (RULES & RULE_SCORE_MOD)
                s[e] = score_mod(params.mod_args, s[e], batch, head, query, keys[e]);
        }
    }

    // The same for one key. Returns the derivatives of what it becomes.
    template <bool MASKED, typename Number = Dual>
    __device__ __forceinline__ ScoreSlopes change_with_slopes(float& s, int key) const {
        const int existing = inside<MASKED>(key);
        ScoreSlopes slopes = {1.0f, 1.0f};
        s *= params.softmax_scale;
        if constexpr (RULES & CAPPING_RULES) {
            const float x =
                tanh_for<T, (RULES & RULE_SOFTCAP_WIDE) != 0>(s * params.inverse_softcap);
            s = params.softcap * x;
            slopes.score = 1.0f - x * x;
        }
        if constexpr (RULES & RULE_ALIBI) s -= slope * distance(existing);
        if constexpr (RULES & (RULE_BIAS | RULE_BIAS_FP32))
            s += to_float(gBias[existing * params.bias_strides.column]);
        if constexpr (RULES & RULE_SCORE_MOD) {
            slopes_by_elements(slopes.elements, params.mod_args, s, batch, head, query, existing);
            const Number changed =
                score_mod(params.mod_args, Number(s, 1.0f), batch, head, query, existing);
            s = changed.value;
            slopes.score *= changed.slope;
            slopes.added *= changed.slope;
        }
        return slopes;
    }

    // How far a key is from the query's own position.
    __device__ __forceinline__ float distance(int key) const {
        return fabsf(float(position - key));
    }

    // Returns which of a lane's keys, PAIRS pairs from `key` on, the query sees by the boolean mask
    // and mask_mod; MASKED: by its position, too. UNROLL steps of 16 keys are looked up at a time.
    // All lanes of the warp call it.
    template <bool MASKED, int PAIRS, int UNROLL, typename Mask>
    __device__ __forceinline__ KeyBits<HIDES_KEYS, PAIRS> visible(const Mask& mask, int key) const {
        KeyBits<HIDES_KEYS, PAIRS> bits = looked_up<MASKED, PAIRS, UNROLL>(key);
        if constexpr (HIDES_KEYS && MASKED)
            bits.keep(mask.row_begin(query) - key, mask.row_end(query) - key);
        return bits;
    }

    // The same in a listed tile, of whose blocks `blocks` are the query's: in full ones nothing is
    // asked, and keys in blocks that are not listed are hidden.
    template <bool MASKED, int PAIRS, int UNROLL, typename Mask>
    __device__ __forceinline__ KeyBits<HIDES_KEYS, PAIRS> visible_in(const BlocksOfRow& blocks,
                                                                     const Mask& mask,
                                                                     int key) const {
        KeyBits<HIDES_KEYS, PAIRS> bits;
        if (!blocks.are_full()) bits = looked_up<MASKED, PAIRS, UNROLL>(key);
        blocks.keep_listed(bits, key);
        if constexpr (HIDES_KEYS && MASKED)
            bits.keep(mask.row_begin(query) - key, mask.row_end(query) - key);
        return bits;
    }

    // Whether the lists, the mask and mask_mod let the query see a key. The key need not exist.
    __device__ __forceinline__ bool sees(int key) const {
        if constexpr (RULES & RULE_BLOCKS) {
            const int state = TileLists(params).state_of(batch, head, query, inside<true>(key));
            if (state != BLOCK_MIXED) return state != 0;
        }
        return sees_in_mixed(key);
    }
    // Whether the mask and mask_mod do.
    __device__ __forceinline__ bool sees_in_mixed(int key) const {
        bool seen =
            !(RULES & RULE_MASK) || gMask[inside<true>(key) * params.mask_strides.column] != 0;
        if constexpr (RULES & RULE_MASK_MOD)
            seen = seen && mask_mod(params.mod_args, batch, head, query, inside<true>(key));
        return seen;
    }

  private:
    // Key by key, or in pairs.
    static constexpr bool LOOKS_UP_KEYS =
        (RULES & RULE_MASK_MOD) != 0 || ((RULES & RULE_MASK) != 0 && !(RULES & RULE_MASK_CHUNKS));

    // What the boolean mask and mask_mod say of PAIRS pairs of keys from `key` on.
    template <bool MASKED, int PAIRS, int UNROLL>
    __device__ __forceinline__ KeyBits<HIDES_KEYS, PAIRS> looked_up(int key) const {
        KeyBits<HIDES_KEYS, PAIRS> bits;
        if constexpr (LOOKS_UP_KEYS) {
#pragma unroll(UNROLL)
            for (int step = 0; step < PAIRS / 2; ++step) {
                // The step's first bit. The other bits are as far from it in every step.
                const int first = 8 * (step / 2 % 2) + 4 * (step / 4 % 2) + step % 2;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    bool seen[2];
                    see<MASKED>(seen, key + step * 16 + n * 8);
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (seen[e]) bits.words[step / 8] |= 1u << bits.bit(n, e) << first;
                }
            }
        }
        if constexpr (RULES & RULE_MASK_CHUNKS) {
            const int quad = thread_index() % 4;
#pragma unroll
            for (int w = 0; w < div_up(PAIRS, 16); ++w) {
                const int first_key = key - 2 * quad + w * 128;
                const auto read = [&](int chunk) {
                    const int k = first_key + chunk * MASK_CHUNK;
                    return *reinterpret_cast<const uint4*>(
                        gMask + (MASKED ? min(k, last_key & -MASK_CHUNK) : k));
                };
                const uint32 word = mask_chunks(quad, min(PAIRS - w * 16, 16), read);
                bits.words[w] = LOOKS_UP_KEYS ? bits.words[w] & word : word;
            }
        }
        if constexpr (HIDES_KEYS && !LOOKS_UP_KEYS && !(RULES & RULE_MASK_CHUNKS)) bits.set_all();
        return bits;
    }

    // Whether the query sees keys `key` and key + 1.
    template <bool MASKED>
    __device__ __forceinline__ void see(bool (&visible)[2], int key) const {
        float seen[2] = {1.0f, 1.0f};
        if constexpr ((RULES & RULE_MASK) && !(RULES & RULE_MASK_CHUNKS))
            load_two<MASKED, (RULES & RULE_MASK_PAIRS) != 0>(seen, gMask, params.mask_strides, key,
                                                             last_key);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            visible[e] = seen[e] != 0.0f;
            if constexpr (RULES & RULE_MASK_MOD)
                visible[e] = visible[e] &&
                             mask_mod(params.mod_args, batch, head, query, inside<MASKED>(key + e));
        }
    }

    template <bool MASKED>
    __device__ __forceinline__ int inside(int key) const {
        return MASKED ? min(key, last_key) : key;
    }

    __device__ __forceinline__ int64 row_offset(const BroadcastStrides& s) const {
        return batch * s.batch + head * s.head + query * s.row;
    }
};

}  // namespace flashcore
