"""Gradients of mod_args by kernels, on a GPU or emulated, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases_gradients import Rules, operands, random
from kernel_gradients import DROP, HALF, HEADS, SINGLE, by_kernel, check, dtype_of, gradients
from places import Place, each

from flashcore_cupy import attention
from flashcore_cupy.check import verify_gradients
from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.problem.gradients import by_result

S, T = 90, 130
TABLE, GAIN = random(HEADS, seed=12), 1 + random(2 * HEADS, seed=13) * np.float32(0.3)
SLOPED = Mod(
    "score + table[h] * (kv_idx - q_idx) * 0.01f",
    lambda s, b, h, i, j, table: s + table[h] * (j - i) * np.float32(0.01),
)
GAINED = Mod(
    "/* gain[kv_idx] */ score * gain[b * 4 + h]  // of a batch and a head",
    lambda s, b, h, i, j, gain: s * gain[b, h],
)
BATCHES = Mod(
    "score * gain[2 - b] + gain[ 2*b+1 ] * (q_idx % 3)",
    lambda s, b, h, i, j, gain: s * gain[2 - b] + gain[2 * b + 1] * (i % 3),
)
#: The same element by several indices, in one head or in all; and one in both factors.
SHARED = Mod(
    "score * gain[0] * gain[0] + tanhf(gain[h] * score) * gain[h % 2]",
    lambda s, b, h, i, j, gain: s * gain[0] * gain[0] + np.tanh(gain[h] * s) * gain[h % 2],
)
BOTH = Mod(
    "q_idx > kv_idx ? score * gain[h] : table[h / 2] * score",
    lambda s, b, h, i, j, gain, table: np.where(i > j, s * gain[h], table[h // 2] * s),
)
NONE = Mod(
    "score + other[kv_idx % 3]",
    lambda s, b, h, i, j, gain, other: s + other[j % 3],
)
SEEN = Mod("gain[h] > 0.9f || kv_idx > q_idx", lambda b, h, i, j, gain: (gain[h] > 0.9) | (j > i))
CASES: dict[str, Rules] = {
    "of heads": {"score_mod": SLOPED, "mod_args": {"table": TABLE}},
    "of batches and heads": {"score_mod": GAINED, "mod_args": {"gain": GAIN.reshape(2, -1)}},
    "of batches": {"score_mod": BATCHES, "mod_args": {"gain": GAIN}, "causal": True},
    "shared": {"score_mod": SHARED, "mod_args": {"gain": GAIN}},
    "two arrays": {"score_mod": BOTH, "mod_args": {"gain": GAIN.astype(HALF), "table": TABLE}},
    "none read": {"score_mod": NONE, "mod_args": {"gain": GAIN, "other": TABLE}},
    "behind other rules": {
        "score_mod": SLOPED, "mod_args": {"table": TABLE}, "causal": True, "softcap": 2.0,
        "bias": random(S, T, seed=9), "sink": random(HEADS, seed=10), "window": (60, -1),
        "alibi_slopes": random(HEADS, seed=8) * np.float32(0.1),
    },
    "dropout": {"score_mod": GAINED, "mod_args": {"gain": GAIN.reshape(2, -1)}, **DROP},
    "a mask of the same": {"score_mod": SHARED, "mask_mod": SEEN, "mod_args": {"gain": GAIN}},
}  # fmt: skip
OTHERS = ("other",)


def plain(rules: Rules) -> Rules:
    return by_kernel(rules, on_kernel=False)


def asked(rules: Rules) -> tuple[str, ...]:
    more = [n for n in ("bias", "sink", "alibi_slopes") if n in rules]
    return ("q", *more, *(f"mod_args.{n}" for n in rules["mod_args"] if n not in OTHERS))


@each("name", CASES)
def test_rules(on: Place, name: str) -> None:
    sizes = {"seqlen": S, "seqlen_kv": T, "dtype": np.dtype(HALF), "batch": 2, "head_dim": 32}
    rules = CASES[name]
    check(on, "bwd_sm80", sizes | {"head_dim_v": 32}, rules, wrt=asked(rules))


@each("dims, dtype", [((64, 64), "bfloat16"), ((128, 64), SINGLE), ((512, 64), HALF)])
def test_head_dims(on: Place, dims: tuple[int, int], dtype: str) -> None:
    """Of wide heads several thread blocks have the same queries: each adds once."""
    sizes = {"seqlen": 70, "seqlen_kv": 50, "dtype": dtype_of(dtype), "head_dim": dims[0]}
    rules = CASES["of heads"]
    check(on, "bwd_sm80", sizes | {"head_dim_v": dims[1]}, rules, wrt=("mod_args.table",))


@each("lengths", [(1, 1), (33, 1), (129, 65), (0, 5), (5, 0)])
def test_lengths(on: Place, lengths: tuple[int, int]) -> None:
    sizes = {"seqlen": lengths[0], "seqlen_kv": lengths[1], "dtype": np.dtype(HALF), "batch": 2}
    rules = CASES["of batches and heads"]
    check(on, "bwd_sm80", sizes, rules, dlse=True, wrt=("mod_args.gain", "v"))


@each("name", ["of batches", "shared"])
def test_packed_batches(on: Place, name: str) -> None:
    lengths = ((0, 5), (33, 0), (40, 70))
    starts_q, starts_k = (np.cumsum([0, *x]).astype(np.int32) for x in zip(*lengths, strict=True))
    rules = CASES[name] | {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    q = random(starts_q[-1], HEADS, 32, dtype=HALF, seed=1)
    k, v = (random(starts_k[-1], 2, 32, dtype=HALF, seed=n) for n in (2, 3))
    o, lse = attention(q, k, v, return_lse=True, **plain(rules))
    do = random(*o.shape, dtype=HALF, seed=5)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    expected = verify_gradients.expect(do, q, k, v, wrt=asked(rules), **plain(rules))
    faults = expected.faults(gradients(on, "bwd_sm80", given, asked(rules), rules))
    assert not faults, faults


def test_gradients_are_added(on: Place) -> None:
    """In float32, of one part of the keys after the other; what nobody reads stays."""
    rules, wrt = CASES["two arrays"], ("mod_args.gain", "mod_args.table")
    q, k, v = operands(HEADS, 2, 50, 64, 32, 32, dtype=np.dtype(HALF))
    o, lse = attention(q, k, v, return_lse=True, **plain(rules))
    do = random(*o.shape, dtype=HALF, seed=5)
    expected = verify_gradients.expect(do, q, k, v, wrt=wrt, **plain(rules))
    sums: Any = {f"d{n}": np.ones(rules["mod_args"][n[9:]].shape, np.float32) for n in wrt}
    if on.kind == "gpu":
        sums = {name: on.xp.asarray(x) for name, x in sums.items()}
    for keys in (slice(0, 33), slice(33, 64)):
        part = {"k": k[:, :, keys], "v": v[:, :, keys]}
        given = {"do": do, "q": q, "o": o, "lse": lse, "dlse": None, **part}
        shifted = rules | {"score_mod": moved(rules["score_mod"], keys.start)}
        gradients(on, "bwd_sm80", given, wrt, shifted, out=sums, accumulate=True)
    for name, x in sums.items():
        got = on.to_host(x) - 1
        assert expected.each[name].judge(got).ok
    gain = on.to_host(sums["dmod_args.gain"])
    assert (gain[HEADS:] == 1).all() and (gain[:HEADS] != 1).all()


def moved(mod: Mod, by: int) -> Mod:
    """The same formula, where keys are counted from another one on."""
    return Mod(
        mod.cuda.replace("kv_idx", f"(kv_idx + {by})"),
        lambda s, b, h, i, j, **x: mod.python(s, b, h, i, j + by, **x),
    )


def test_a_derivative_by_the_score_may_be_given_beside(on: Place) -> None:
    rules = CASES["of heads"]
    q, k, v = operands(HEADS, 2, 50, 64, 32, 32, dtype=np.dtype(HALF))
    o, lse = attention(q, k, v, return_lse=True, **plain(rules))
    given = {"do": random(*o.shape, dtype=HALF, seed=5), "q": q, "k": k, "v": v, "o": o, "lse": lse}
    given["dlse"] = None
    found = [
        by_result(gradients(on, "bwd_sm80", given, asked(rules), rules, **more))
        for more in ({}, {"score_mod_grad": "0.0f"}, {"score_mod_grad": "1.0f"})
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0]["dmod_args.table"], other["dmod_args.table"])
    assert found[0]["dq"].any() and not found[1]["dq"].any()
    np.testing.assert_array_equal(found[0]["dq"], found[2]["dq"])


@pytest.mark.parametrize("gate", ["dp", "ds"])
def test_stages(on: Place, gate: str) -> None:
    """The pass that sums up for mod_args stops at them, too."""
    if on.kind == "gpu":
        pytest.skip("the gates of that pass are tried with dq")
    from flashcore_cupy import attention_backward

    rules = by_kernel(CASES["of heads"], on_kernel=True)
    q, k, v = operands(HEADS, 2, 20, 30, 32, 32, dtype=np.dtype(HALF))
    o, lse = attention(q, k, v, return_lse=True, **plain(CASES["of heads"]))
    do = random(*o.shape, dtype=HALF, seed=5)
    stages = [
        attention_backward(do, q, k, v, o, lse, wrt=wrt, gate=gate, kernel="bwd_sm80", **rules)
        for wrt in (("q",), ("mod_args.table",))
    ]
    np.testing.assert_array_equal(*stages)
