// exact_row.cuh - computes a row again whose scores are too far from 0 for the main loops
// (online_softmax.cuh): key after key, in fp32, without tensor cores. That hardly ever happens, so
// it is a loop of its own, and costs the main loops no register.
#pragma once
#include <flashcore/debug.cuh>
#include <flashcore/params.cuh>
#include <flashcore/ptx/convert.cuh>
#include <flashcore/ptx/thread.cuh>
#include <flashcore/ptx/warp.cuh>
#include <flashcore/rules/dropout.cuh>
#include <flashcore/rules/score.cuh>
#include <flashcore/scheduler/work.cuh>
#include <flashcore/softmax/finish_row.cuh>
#include <flashcore/softmax/online_softmax.cuh>

namespace flashcore {

// Keys from `begin`, which is even, to before `end`.
struct KeySpan {
    int begin, end;
};

// Four lanes share the row, as mma.sync and wgmma leave it: each has two of every 8 columns. All
// lanes of the warp call it, for their own rows. A row whose scores are not far from 0 keeps the
// bits that the main loop gave it: they must not depend on the other rows of its warp.
template <typename T, int RULES, int GATE, int DIM_QK, typename Mask>
struct ExactRow {
    const AttentionParams& params;
    const Work& work;
    const Mask& mask;
    QueryRow q;  // if it does not exist, the last query's row is computed, and not used
    RowRules<T, RULES> rules;
    GateRow<GATE> gate;

    // Computes the scores of keys `key` (even) and key + 1; -inf if a key is hidden.
    __device__ __forceinline__ void scores(float (&s)[2], bool (&seen)[2], int key) const {
        const int query = min(q.query, work.seqlen_q - 1);
        const T* const gQ =
            head_row<T>(params.q, params.q_strides, work.batch, q.head, work.start_q + query);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const T* const gK = key_row(params.k, params.k_strides, key + e);
            s[e] = 0.0f;
#pragma unroll 1
            for (int d = thread_index() % 4; d < DIM_QK; d += 4)
                s[e] += to_float(gQ[d]) * to_float(gK[d]);
            s[e] = group_sum<4>(s[e]);
        }
        if constexpr (RowRules<T, RULES>::CHANGES_SCORES) rules.template change<true>(s, key);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            seen[e] = mask.visible(query, key + e) && rules.sees(key + e);
            s[e] = seen[e] ? gate.raw_score(s[e]) : NEG_INFINITY;
        }
    }

    // Computes m, l, and O in COLS columns of V from first_col on, over the keys for which has(key)
    // holds, two at a time. sums(key): whether the key counts in this warp's l. o(n, e): this
    // lane's e-th column of columns 8 n to 8 n + 7. Returns whether the row was computed again.
    template <int COLS, typename Has, typename Sums, typename Columns>
    __device__ __forceinline__ bool attend(RowState& row, const KeySpan& keys, int first_col,
                                           int valid_cols, Has has, Sums sums, Columns o) const {
        const float scale = exponent_scale<RULES>(params);
        const bool again = q.valid && is_far(row.max, scale);  // the row's four lanes agree
        if (!warp_any(again)) return false;
        float s[2];
        bool seen[2];
        if (again) {
            row = RowState();
#pragma unroll
            for (int n = 0; n < COLS / 8; ++n) o(n, 0) = o(n, 1) = 0.0f;
        }
#pragma unroll 1
        for (int key = keys.begin; key < keys.end; key += 2) {
            if (!has(key)) continue;
            scores(s, seen, key);
            if (again) row.max = fmaxf(row.max, fmaxf(s[0], s[1]));
        }
        const float max = finite_max(row.max);
        const int quad = thread_index() % 4;
#pragma unroll 1
        for (int key = keys.begin; key < keys.end; key += 2) {
            if (!has(key)) continue;
            scores(s, seen, key);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float p = seen[e] ? exp2_approx((s[e] - max) * scale) : 0.0f;
                if (!again) continue;
                gate.probability(key + e, p);
                if (!seen[e]) continue;  // what the key's row of V holds must not matter
                if (quad == 0 && sums(key)) row.sum += p;  // in one lane: the quad is summed later
                if constexpr (DROPS<RULES>)
                    if (!Dropout(params, work.batch, q.head).keeps_at(q.query, key + e)) continue;
                const T* const gV = key_row(params.v, params.v_strides, key + e) + first_col;
#pragma unroll
                for (int n = 0; n < COLS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int col = n * 8 + quad * 2 + i;
                        if (col < valid_cols) o(n, i) += p * to_float(gV[col]);
                    }
            }
        }
        return again;
    }

  private:
    // The row of a key; of the last key if it does not exist.
    __device__ __forceinline__ const T* key_row(const void* base, const Strides& strides,
                                                int key) const {
        return head_row<T>(base, strides, work.batch, work.head_kv,
                           work.start_kv + min(key, work.seqlen_kv - 1));
    }
};

}  // namespace flashcore
