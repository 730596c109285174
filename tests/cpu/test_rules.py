"""Score rules, masks and sinks on NumPy arrays, against a formula with one number at a time."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_dropout import UNIT
from cases_dropout import number as number_at
from cases_reference import CAUSAL, DTYPES, judge, largest_score, normal, repeatable, tiles
from hypothesis import given
from hypothesis import strategies as st

from flashcore_cupy.cpu import parallel, reference, tiled_attention
from flashcore_cupy.cpu.numpy_rules import NumpyRules, Sizes
from flashcore_cupy.cpu.reference import (
    gate_probabilities,
    gate_scores,
    gate_uniform,
    make_inputs,
    naive,
    naive_varlen,
    oracle,
    oracle_varlen,
    tiled,
)
from flashcore_cupy.cpu.tiled_attention import sequences
from flashcore_cupy.problem import rules as records
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.problem.blocks import Block
from flashcore_cupy.problem.listed_blocks import EMPTY, MIXED

B, HQ, HKV, SQ, SKV = 2, 4, 2, 9, 13
FULL = (B, HQ, SQ, SKV)


class Dense:
    """All stages of an attention in float64, every score worked out by itself.

    scores (B, Hq, Sq, Skv), -inf where hidden; p likewise; o (B, Hq, Sq, Dv); lse (B, Hq, Sq);
    uniform, the mean of the visible v, shaped as o.
    """

    def __init__(self, q: Any, k: Any, v: Any, **rules: Any) -> None:
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        full = (*q.shape[:3], k.shape[2])
        group = q.shape[1] // k.shape[1]
        self.scores, self.p = np.empty(full), np.zeros(full)
        self.lse = np.empty(full[:3])
        self.o, self.uniform = (np.zeros((*full[:3], v.shape[3])) for _ in range(2))
        sink = rules.pop("sink", None)
        drop, rng = rules.pop("dropout_p", 0.0), rules.pop("rng", None)
        sequence = rules.get("sequence")
        for at in np.ndindex(*full):
            b, h, i, j = at
            product = float(np.dot(q[b, h, i], k[b, h // group, j]))
            self.scores[at] = one_score(product, at, q.shape, full, **rules)
        for b, h, i in np.ndindex(*full[:3]):
            scores, values = self.scores[b, h, i], v[b, h // group]
            logits = [*scores, *([] if sink is None else [float(sink[h])])]
            weights = [math.exp(s - max(logits)) if s > -math.inf else 0.0 for s in logits]
            total = math.fsum(weights)
            self.lse[b, h, i] = max(logits) + math.log(total) if total else -math.inf
            for j in np.flatnonzero(scores > -math.inf):
                self.p[b, h, i, j] = weights[j] / total
                place = (b if sequence is None else sequence, h, i, int(j))
                if drop and number_at(rng, *place) < round(drop * UNIT):
                    continue
                value = values[j] / (1 - round(drop * UNIT) / UNIT)
                self.o[b, h, i] += self.p[b, h, i, j] * value
                self.uniform[b, h, i] += value / np.sum(scores > -math.inf)


def one_score(
    product: float,
    at: tuple[int, ...],
    q_shape: tuple[int, ...],
    full: tuple[int, ...],
    *,
    softmax_scale: float | None = None,
    causal: Any = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    bias: Any = None,
    mask: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    block_mask: Any = None,
    mod_args: Any = None,
    sequence: int | None = None,
) -> float:
    """The score of one query and one key; -inf if hidden."""
    b, h, i, j = at
    number = b if sequence is None else sequence
    place = i if causal == "top-left" else i + full[3] - full[2]
    mods = dict(mod_args or {})
    sees = not causal or j <= place
    sees = sees and (window[0] == -1 or place - window[0] <= j)
    sees = sees and (window[1] == -1 or j <= place + window[1])
    state = MIXED if block_mask is None else block_mask.to_dense()[0, h, i // 64, j // 64]
    if state == EMPTY:
        return -math.inf
    if state == MIXED:
        sees = sees and (mask is None or bool(np.broadcast_to(mask, full)[at]))
        sees = sees and (mask_mod is None or bool(mask_mod(number, h, i, j, **mods)))
    if not sees:
        return -math.inf
    score = product * (q_shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        score = softcap * math.tanh(score / softcap)
    if alibi_slopes is not None:
        slope = alibi_slopes[h] if alibi_slopes.ndim == 1 else alibi_slopes[number, h]
        score -= float(slope) * abs(place - j)
    if bias is not None:
        score += float(np.broadcast_to(bias, full)[at])
    if score_mod is not None:
        score = float(score_mod(score, number, h, i, j, **mods))
    return score


def operands(dtype: Any = np.float32, **sizes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N(0, 1) operands: by default B = 2, Hq = 4, Hkv = 2, Sq = 9, Skv = 13, D = 8, Dv = 5."""
    given = {
        "batch": B, "heads": HQ, "heads_kv": HKV, "seqlen": SQ, "seqlen_kv": SKV, "head_dim": 8,
        "head_dim_v": 5,
    }  # fmt: skip
    return make_inputs("normal", dtype=dtype, **(given | sizes))


def random(*shape: int, seed: int = 3) -> np.ndarray:
    """N(0, 1), float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def check(q: Any, k: Any, v: Any, **rules: Any) -> Dense:
    """Hold every function against the dense formula; float32 operands."""
    dense = Dense(q, k, v, **rules)
    o, lse = oracle(q, k, v, **rules)
    np.testing.assert_allclose(o, dense.o, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(lse, dense.lse, rtol=1e-11, atol=1e-12)
    for got, expected in (
        (gate_scores(q, k, v, **rules), dense.scores),
        (gate_probabilities(q, k, v, **rules), dense.p),
        (gate_uniform(q, k, v, **rules), dense.uniform),
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(naive(q, k, v, **rules), dense.o, atol=2e-5)
    for tile in ((64, 1024), (4, 64)):
        with tiles(*tile):
            o, lse = tiled(q, k, v, **rules)
        np.testing.assert_allclose(o, dense.o, atol=2e-5)
        np.testing.assert_allclose(lse, dense.lse, atol=2e-5)
    return dense


def drift(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A score_mod that looks at all it gets."""
    return 0.5 * score + 0.1 * (kv_idx - q_idx) * (h + 1) - 0.2 * b


def sparse(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A mask_mod that looks at all it gets."""
    return (q_idx + 2 * kv_idx + b + h) % 3 != 0


#: Of heads whose one block is full, mixed, empty, and full.
OF_HEADS = BlockMask.from_lists(
    *(np.array(n, np.int32).reshape(1, HQ, 1, *axes) for n, axes in (
        ([0, 1, 0, 0], ()), ([0] * HQ, (1,)), ([1, 0, 0, 1], ()), ([0] * HQ, (1,))
    )),
    seqlen_q=SQ, seqlen_kv=SKV, block=(64, 64),
)  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"softmax_scale": -0.4},
    "window": {"window": (3, 2)},
    "softcap": {"softcap": 0.7},
    "alibi by head": {"alibi_slopes": random(HQ)},
    "alibi by batch": {"alibi_slopes": random(B, HQ)},
    "bias": {"bias": random(*FULL)},
    "bias float64": {"bias": random(*FULL).astype(np.float64)},
    "bias float16 by head": {"bias": random(HQ, 1, SKV).astype(np.float16)},
    "bias bfloat16 by query": {"bias": random(B, 1, SQ, 1).astype(ml_dtypes.bfloat16)},
    "bias of one": {"bias": random(1)},
    "mask": {"mask": random(*FULL) > 0},
    "mask of keys": {"mask": random(B, 1, 1, SKV) > -0.5},
    "mask of queries": {"mask": random(SQ, 1) > 0},
    "sink": {"sink": 2 * random(HQ)},
    "dropout": {"dropout_p": 0.4, "rng": (3, 1)},
    "score_mod": {"score_mod": drift},
    "mask_mod": {"mask_mod": sparse},
    "block_mask": {"block_mask": OF_HEADS, "mask_mod": sparse},
    "mask_mod by key": {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx % 2 == b},
}


def test_every_record_is_held_against_the_formula() -> None:
    tried = {name for asked in RULES.values() for name in asked}
    assert {rule.name for rule in records.RULES} <= tried


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_the_formula(name: str, causal: Any) -> None:
    rules = RULES[name]
    dense = check(*operands(), causal=causal, **rules)
    if rules:  # and it does something
        plain = Dense(*operands(), causal=causal)
        shown = (dense.o, plain.o) if name == "dropout" else (dense.lse, plain.lse)
        assert not np.allclose(*shown)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("seqlen", "seqlen_kv"), [(9, 13), (13, 9), (1, 20), (20, 1)])
def test_all_rules_together_are_the_formula(causal: Any, seqlen: int, seqlen_kv: int) -> None:
    q, k, v = operands(seqlen=seqlen, seqlen_kv=seqlen_kv)
    full = B, HQ, seqlen, seqlen_kv
    check(
        *(q, k, v),
        causal=causal,
        window=(8, 5),
        softcap=1.5,
        alibi_slopes=random(B, HQ, seed=1),
        bias=random(*full, seed=2),
        mask=random(*full, seed=4) > -1,
        sink=random(HQ, seed=5),
        score_mod=drift,
        mask_mod=sparse,
        dropout_p=0.3,
        rng=(5, 1),
    )


# --- order ----------------------------------------------------------------------------------------


def test_rules_apply_in_their_order() -> None:
    q, k, v = operands()
    seen = {}

    def spy(score: Any, b: int, h: int, q_idx: Any, kv_idx: Any) -> Any:
        seen[b, h] = score.copy()
        return score

    slopes, bias = random(HQ), random(*FULL)
    rules: dict[str, Any] = {"softcap": 0.5, "alibi_slopes": slopes, "bias": bias}
    oracle(q, k, v, causal=True, score_mod=spy, softmax_scale=2.0, **rules)
    product = 2.0 * q[1, 3].astype(np.float64) @ k[1, 1].astype(np.float64).T
    distance = np.abs(np.arange(SQ)[:, None] + SKV - SQ - np.arange(SKV))
    expected = 0.5 * np.tanh(product / 0.5) - float(slopes[3]) * distance + bias[1, 3]
    np.testing.assert_allclose(seen[1, 3], expected, rtol=1e-12)


@pytest.mark.parametrize("value", [7.0, math.inf, math.nan])
def test_score_mod_brings_no_hidden_key_back(value: float) -> None:
    def only_hidden(score: Any, b: int, h: int, q_idx: Any, kv_idx: Any) -> Any:
        return np.where(kv_idx % 2 == 0, 7.0, value) + 0 * q_idx

    def even(b: int, h: int, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx % 2 == 0

    q, k, v = operands()
    for o, lse in (
        f(q, k, v, score_mod=only_hidden, mask_mod=even, window=(-1, 4)) for f in (tiled, oracle)
    ):
        for i in range(SQ):
            keys = np.arange(0, min(SKV, i + SKV - SQ + 5), 2)
            np.testing.assert_allclose(lse[:, :, i], 7 + math.log(len(keys)), rtol=1e-6)
            mean = np.repeat(v[:, :, keys].mean(axis=2), 2, axis=1)
            np.testing.assert_allclose(o[:, :, i], mean, atol=1e-6)


def test_gate_pv_takes_no_score_rule_and_no_sink() -> None:
    q, k, v = operands()
    plain = gate_uniform(q, k, v, window=(2, 3))
    rules: dict[str, Any] = {"sink": random(HQ), "bias": random(*FULL), "softcap": 1.0}
    got = gate_uniform(q, k, v, window=(2, 3), alibi_slopes=random(HQ), score_mod=drift, **rules)
    assert np.array_equal(got, plain)


# --- windows --------------------------------------------------------------------------------------

WINDOWS = [
    (-1, -1), (0, 0), (0, -1), (-1, 0), (2, 1), (1, 3), (-1, 2), (4, -1), (10**12, 10**30),
    (100, 0),
]  # fmt: skip


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("seqlen", "seqlen_kv"), [(9, 13), (13, 9), (30, 3), (3, 30), (5, 0)])
def test_windows(window: Any, causal: Any, seqlen: int, seqlen_kv: int) -> None:
    q, k, v = operands(batch=1, heads=1, heads_kv=1, seqlen=seqlen, seqlen_kv=seqlen_kv)
    check(q, k, v, window=window, causal=causal)


def test_window_that_is_no_bound_changes_no_bit() -> None:
    q, k, v = normal(np.float16, seqlen=300)
    for causal in CAUSAL:
        plain = tiled(q, k, v, causal=causal)
        for window in ((300, 300), (-1, 300), (10**15, -1)):
            wide = tiled(q, k, v, causal=causal, window=window)
            assert all(x.tobytes() == y.tobytes() for x, y in zip(plain, wide, strict=True))
    left_of_causal = tiled(q, k, v, causal=True, window=(50, 70))
    again = tiled(q, k, v, window=(50, 0))
    assert all(x.tobytes() == y.tobytes() for x, y in zip(left_of_causal, again, strict=True))


@pytest.mark.parametrize("causal", [False, "top-left"])
def test_windows_outside_the_keys(causal: Any) -> None:
    q, k, v = normal(np.float16, seqlen=200, seqlen_kv=60)
    offset = 0 if causal else 60 - 200
    place = np.arange(200) + offset
    sees = (place - 5 <= 59) & (place >= 0)
    for o, lse in (f(q, k, v, window=(5, 0), causal=causal) for f in (tiled, oracle)):
        assert np.array_equal(np.isneginf(lse[0, 0]), ~sees)
        assert np.all(o[:, :, ~sees] == 0) and np.isfinite(o.astype(np.float32)).all()


def test_windowed_tiles_leave_the_other_keys_alone() -> None:
    seqlen, looked_at = 4096, []

    def count(score: Any, b: int, h: int, q_idx: Any, kv_idx: Any) -> Any:
        looked_at.append(score.size)
        return score

    q, k, v = normal(np.float16, seqlen=seqlen, heads=1)
    tiled(q, k, v, window=(100, 20), score_mod=count)
    columns = 100 + 20 + tiled_attention.BLOCK_M + 2 * 64  # and the ends of blocks
    assert sum(looked_at) <= seqlen * columns
    assert max(looked_at) > 0


# --- sinks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [-3.0, 0.0, 500.0])
def test_sink_is_a_key_of_value_zero(sink: float) -> None:
    q, k, v = operands(heads=2)
    o, lse = tiled(q, k, v, sink=np.full(2, sink, np.float32))
    more_k, more_v = (np.concatenate([x, np.zeros_like(x[:, :, :1])], axis=2) for x in (k, v))
    bias = np.zeros(SKV + 1)
    bias[-1] = sink  # beside a score of 0
    expected, expected_lse = oracle(q, more_k, more_v, bias=bias)
    np.testing.assert_allclose(o, expected, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)
    p = gate_probabilities(q, k, v, sink=np.full(2, sink))
    np.testing.assert_allclose(p.sum(axis=3), 1 - np.exp(sink - expected_lse), atol=1e-12)


def test_sink_without_keys() -> None:
    q, k, v = operands()
    sink = random(HQ)
    cases: list[Any] = [
        ((q, k, v), {"mask": np.zeros((1, 1), bool)}),
        ((q, k[:, :, :0], v[:, :, :0]), {}),
        ((q, k, v), {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx < 0}),
    ]
    for arrays, rules in cases:
        for o, lse in (f(*arrays, sink=sink, **rules) for f in (tiled, oracle)):
            assert np.all(o == 0)
            assert np.array_equal(lse, np.broadcast_to(sink[:, None], (B, HQ, SQ)))
        for o, lse in (f(*arrays, **rules) for f in (tiled, oracle)):
            assert np.all(o == 0) and np.all(np.isneginf(lse))
        assert np.all(naive(*arrays, sink=sink, **rules) == 0)


def test_sink_of_minus_infinity_is_none() -> None:
    q, k, v = normal(np.float16, seqlen_kv=70)  # bottom-right: 30 queries see nothing
    nothing = np.full(2, -np.inf, np.float32)
    for f in (tiled, oracle):
        plain, sunk = f(q, k, v, causal=True), f(q, k, v, causal=True, sink=nothing)
        assert all(x.tobytes() == y.tobytes() for x, y in zip(plain, sunk, strict=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_sink_stays_in_its_head(value: float) -> None:
    q, k, v = operands()
    sink = np.array([0, value, 0, 0], np.float32)
    expected, expected_lse = oracle(q, k, v, sink=sink)
    o, lse = tiled(q, k, v, sink=sink)
    np.testing.assert_allclose(o, expected, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)
    assert np.isfinite(lse[:, [0, 2, 3]]).all() and not np.isfinite(lse[:, 1]).any()


# --- NaN and infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tile", [(64, 1024), (16, 64)])
@pytest.mark.parametrize("rule", ["window", "mask", "mask_mod"])
def test_nonfinite_v_reaches_the_queries_that_see_it(rule: str, tile: Any, value: float) -> None:
    q, k, v = normal(np.float16, heads=4, heads_kv=2, seqlen=150, seqlen_kv=170)
    v[0, 1, 77, 5] = value
    sees = {
        "window": (np.arange(150) + 20 - 12 <= 77) & (np.arange(150) + 20 + 3 >= 77),
        "mask": np.arange(150) % 7 == 2,
        "mask_mod": np.arange(150) > 130,
    }[rule]
    at_77 = np.ones((150, 170), bool)
    at_77[:, 77] = sees
    rules: dict[str, Any] = {
        "window": {"window": (12, 3)},
        "mask": {"mask": at_77},
        "mask_mod": {"mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx != 77) | (q_idx > 130)},
    }[rule]
    expected = np.zeros((1, 4, 150, 32), bool)
    expected[0, 2:, sees, 5] = True
    with tiles(*tile):
        o, _ = tiled(q, k, v, **rules)
    for got in (o, oracle(q, k, v, **rules)[0], naive(q, k, v, **rules)):
        assert np.array_equal(~np.isfinite(got), expected)
        assert np.array_equal(got[expected], np.full(expected.sum(), value), equal_nan=True)


@pytest.mark.parametrize("rule", ["window", "mask", "mask_mod"])
def test_nan_in_k_reaches_the_queries_that_see_it(rule: str) -> None:
    q, k, v = normal(np.float16, seqlen=150, seqlen_kv=150)
    k[0, 1, 77, 3] = np.nan
    sees = (np.arange(150) >= 77) & (np.arange(150) <= 87)
    band = np.tril(np.ones((150, 150), bool)) & ~np.tril(np.ones((150, 150), bool), -11)
    rules: dict[str, Any] = {
        "window": {"window": (10, 0)},
        "mask": {"mask": band},
        "mask_mod": {
            "mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx >= q_idx - 10)
        },
    }[rule]
    for o, lse in (f(q, k, v, **rules) for f in (tiled, oracle)):
        assert np.array_equal(np.isnan(lse[0]), np.stack([np.zeros(150, bool), sees]))
        assert np.array_equal(np.isnan(o).all(axis=3), np.isnan(lse))
        assert np.array_equal(np.isnan(o).any(axis=3), np.isnan(lse))


def test_hidden_values_change_nothing() -> None:
    q, k, v = normal(np.float32, seqlen=90, seqlen_kv=120)
    keep = np.arange(120) % 5 != 3
    bias = random(90, 120)
    rules: dict[str, Any] = {"mask": keep, "sink": random(2)}
    clean = [f(q, k, v, bias=bias, **rules) for f in (tiled, oracle)]
    k[:, :, ~keep], v[:, :, ~keep], bias[:, ~keep] = np.nan, np.inf, np.nan
    for (o, lse), f in zip(clean, (tiled, oracle), strict=True):
        got, got_lse = f(q, k, v, bias=bias, **rules)
        np.testing.assert_allclose(got, o, atol=1e-6)
        np.testing.assert_allclose(got_lse, lse, atol=1e-6)


def test_bias_of_minus_infinity_masks() -> None:
    q, k, v = operands()
    mask = random(*FULL) > 0
    mask[0, 1, 3] = False
    bias = np.where(mask, 0, -np.inf).astype(np.float16)
    for f in (tiled, oracle):
        for x, y in zip(f(q, k, v, mask=mask), f(q, k, v, bias=bias), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


# --- callables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("f", "dtype"), [(tiled, np.float32), (oracle, np.float64)])
def test_what_the_callables_get(f: Any, dtype: Any) -> None:
    scored, masked = np.zeros(FULL, int), np.zeros(FULL, int)
    table = random(SKV)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, *, table: Any) -> Any:
        assert score.dtype == dtype and score.shape == (q_idx.size, kv_idx.size)
        assert type(b) is type(h) is int
        scored[b, h, q_idx, kv_idx] += 1
        return score + table[kv_idx]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any, *, table: Any) -> Any:
        assert q_idx.shape == (len(q_idx), 1) and kv_idx.shape == (1, kv_idx.size)
        assert q_idx.dtype == kv_idx.dtype == np.int64
        masked[b, h, q_idx, kv_idx] += 1
        return table[kv_idx] > -0.5

    q, k, v = operands()
    with tiles(4, 64):
        got = f(q, k, v, score_mod=score_mod, mask_mod=mask_mod, mod_args={"table": table})
    assert np.all(scored == 1) and np.all(masked == 1)
    for x, y in zip(got, oracle(q, k, v, bias=table, mask=table > -0.5), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_score_mod_may_overwrite_its_scores() -> None:
    def in_place(score: Any, b: int, h: int, q_idx: Any, kv_idx: Any) -> Any:
        score *= 3
        return score

    q, k, v = operands()
    np.testing.assert_allclose(
        tiled(q, k, v, score_mod=in_place)[1], oracle(q, k, v, softmax_scale=3 * 8**-0.5)[1], 1e-5
    )


def test_what_a_callable_raises_comes_through() -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("mine")

    for f in (tiled, oracle):
        for rules in ({"score_mod": fail}, {"mask_mod": fail}):
            with pytest.raises(KeyError, match="mine"):
                f(*normal(seqlen=2000, heads=1), **rules)


def test_wrong_results_of_callables_are_named() -> None:
    q, k, v = operands()
    cases: list[Any] = [
        (
            {"score_mod": lambda score, *_: score[1:]},
            ValueError,
            r"score_mod: returned .*\(8, 13\)",
        ),
        ({"mask_mod": lambda *_: np.ones((2, 2), bool)}, ValueError, r"mask_mod: returned shape"),
        (
            {"mask_mod": lambda b, h, i, j: i + j},
            TypeError,
            "mask_mod: returned ndarray of shape .*, dtype int64; return bool",
        ),
    ]
    for f in (tiled, oracle, naive):
        for rules, error, match in cases:
            with pytest.raises(error, match=match):
                f(q, k, v, **rules)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({"window": (1, -2)}, ValueError, r"window: got \(1, -2\); use \(left, right\)"),
        ({"window": 4}, ValueError, "window: got 4"),
        ({"window": (4,)}, ValueError, r"window: got \(4,\)"),
        ({"window": (1.5, 2)}, ValueError, r"window: got \(1.5, 2\)"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ({"softcap": math.nan}, ValueError, "softcap: got nan"),
        ({"alibi_slopes": np.ones(2)}, ValueError, r"alibi_slopes: got shape \(2,\); use \(Hq,\)"),
        ({"alibi_slopes": np.ones((3, HQ))}, ValueError, r"alibi_slopes: got shape \(3, 4\)"),
        ({"sink": np.ones((B, HQ))}, ValueError, r"sink: got shape \(2, 4\); use \(Hq,\) = \(4,\)"),
        (
            {"bias": np.ones((HQ, SQ, 2))},
            ValueError,
            r"bias: got shape \(4, 9, 2\).*does not broadcast",
        ),
        ({"bias": np.ones((1, *FULL))}, ValueError, "bias: got shape"),
        ({"mask": np.ones((3, 1), bool)}, ValueError, r"mask: got shape \(3, 1\)"),
        ({"mask": np.ones((SQ, SKV))}, TypeError, "mask: got dtype float64; use bool, True where"),
        ({"score_mod": "score + 1"}, TypeError, "score_mod: got str; on NumPy arrays pass a call"),
        ({"mask_mod": "kv_idx > 1"}, TypeError, r"mask_mod: got str; .* mask_mod\(b, h, q_idx"),
        ({"sequence": 0}, ValueError, "sequence: got operands with B = 2"),
        ({"windows": (1, 1)}, TypeError, "windows"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(rules: Any, error: Any, match: str) -> None:
    for f in (tiled, oracle, naive, gate_scores, gate_probabilities, gate_uniform):
        with pytest.raises(error, match=match):
            f(*operands(), **rules)


@pytest.mark.parametrize("rows", [[0, 3, 3, 8, 1], []])
def test_rows_are_those_of_the_whole(rows: list[int]) -> None:
    q, k, v = operands()
    rules: dict[str, Any] = {
        "window": (4, 2),
        "alibi_slopes": random(B, HQ),
        "bias": random(*FULL),
        "mask": random(SQ, SKV) > -1,
        "sink": random(HQ),
        "score_mod": drift,
        "mask_mod": sparse,
    }
    for f in (
        lambda **kw: oracle(q, k, v, **kw)[0],
        lambda **kw: oracle(q, k, v, **kw)[1],
        lambda **kw: naive(q, k, v, **kw),
        lambda **kw: gate_scores(q, k, v, **kw),
        lambda **kw: gate_probabilities(q, k, v, **kw),
        lambda **kw: gate_uniform(q, k, v, **kw),
    ):
        np.testing.assert_allclose(
            f(rows=np.array(rows, int), **rules), f(**rules)[:, :, rows], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
def test_what_the_rules_say_of_a_block(window: Any, causal: Any) -> None:
    rules = NumpyRules(Sizes(1, 1, 1, 20, 23, 8, 8), causal=causal, window=window)
    whole = rules.visible(Block(0, 0, np.arange(20), 0, 19, slice(0, 23)))
    for row, stop, start, end in ((0, 4, 0, 23), (4, 8, 5, 9), (17, 20, 1, 22), (9, 10, 10, 11)):
        at = Block(0, 0, np.arange(row, stop), row, stop - 1, slice(start, end))
        assert np.array_equal(rules.visible(at), whole[row:stop, start:end])
        sure = whole[row:stop, start:end].copy()
        for part in rules.doubtful(at):
            sure[:, part.keys.start - start : part.keys.stop - start] = True
        assert sure.all()  # no key outside the doubtful parts is hidden
        some = np.flatnonzero(whole[row:stop].any(axis=0))
        seen = rules.keys_seen(row, stop - 1)
        if len(some):
            assert (seen.start, seen.stop) == (some[0], some[-1] + 1)
        else:
            assert seen.start == seen.stop


# --- tiled against the oracle ---------------------------------------------------------------------


@st.composite
def problems(draw: Any) -> tuple[Any, dict[str, Any]]:
    """Operands and any combination of rules."""
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch, heads = draw(st.integers(1, 2)), heads_kv * group
    seqlen, seqlen_kv = draw(st.integers(1, 150)), draw(st.integers(0, 200))
    seed = draw(st.integers(0, 99))
    operands = make_inputs(
        "normal",
        batch=batch,
        heads=heads,
        heads_kv=heads_kv,
        seqlen=seqlen,
        seqlen_kv=seqlen_kv,
        head_dim=draw(st.sampled_from((8, 33, 64))),
        head_dim_v=draw(st.sampled_from((1, 16, 40))),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=seed,
    )
    full = [batch, heads, seqlen, seqlen_kv]
    axes = [draw(st.sampled_from((1, n))) for n in full][draw(st.integers(0, 3)) :]
    bound = st.one_of(st.just(-1), st.integers(0, 220))
    slopes = draw(st.sampled_from([(heads,), (batch, heads)]))
    every = {
        "window": (draw(bound), draw(bound)),
        "softcap": draw(st.sampled_from((0.5, 20.0))),
        "alibi_slopes": 0.3 * random(*slopes, seed=seed),
        "bias": random(*axes, seed=seed).astype(draw(st.sampled_from(DTYPES))),
        "mask": random(*axes, seed=seed + 1) > -0.5,
        "sink": 3 * random(heads, seed=seed),
        "score_mod": lambda score, b, h, q_idx, kv_idx: score + 0.01 * (kv_idx - q_idx + h - b),
        "mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx + q_idx + h) % 4 != b,
        "softmax_scale": draw(st.sampled_from((0.1, -0.3))),
        "dropout_p": draw(st.sampled_from((0.1, 0.7))),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(every))))
    rules = {name: every[name] for name in sorted(chosen)}
    rules["rng"] = (seed, 7)
    return operands, rules | {"causal": draw(st.sampled_from(CAUSAL))}


@repeatable
@given(problems(), st.sampled_from(((64, 1024), (64, 64), (16, 128))))
def test_tiled_is_accepted(problem: Any, tile: tuple[int, int]) -> None:
    (q, k, v), rules = problem
    with tiles(*tile):
        outcome = judge(q, k, v, **rules)
    # Of an output of few elements, the naive one may be nearer to the oracle by chance.
    noise = 4 * float(ml_dtypes.finfo(q.dtype).eps) + 4 * 2.0**-24 * largest_score(q, k, v, **rules)
    chance = noise * float(np.abs(v.astype(np.float32)).max(initial=0.0))
    few = math.prod(q.shape[:3]) * v.shape[3] < 2000
    lucky = few and outcome.nonfinite_mismatches == 0 and outcome.max_error <= chance
    assert outcome.ok or lucky, outcome.reason


@repeatable
@given(
    problems(),
    st.lists(
        st.tuples(
            st.sampled_from("qkv"),
            st.sampled_from((np.nan, np.inf, -np.inf)),
            st.integers(0, 10**6),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_nonfinite_stand_where_the_oracle_has_them(problem: Any, pokes: Any) -> None:
    (q, k, v), rules = problem
    for name, value, where in pokes:
        x = {"q": q, "k": k, "v": v}[name]
        if x.size:
            x.reshape(-1)[where % x.size] = value
    with tiles(16, 64):
        o, lse = tiled(q, k, v, **rules)
    expected, expected_lse = oracle(q, k, v, **rules)
    outcome = reference.compare(o, expected, naive(q, k, v, **rules))
    assert outcome.nonfinite_mismatches == 0, outcome.reason
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-4)


def test_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(np.float32, heads=4, heads_kv=2, seqlen=700, head_dim=40)
    rules: dict[str, Any] = {
        "window": (300, 40),
        "softcap": 5.0,
        "alibi_slopes": 0.1 * random(4),
        "bias": random(700, 1),
        "mask": random(4, 1, 700) > -1,
        "sink": random(4),
        "score_mod": drift,
        "mask_mod": sparse,
    }
    o, lse = tiled(q, k, v, **rules)
    for workers in (1, 2, 5):
        monkeypatch.setattr(parallel, "cores", lambda n=workers: n)
        again, again_lse = tiled(q, k, v, **rules)
        assert again.tobytes() == o.tobytes() and again_lse.tobytes() == lse.tobytes()


def test_no_broadcast_is_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: 1)
    q, k, v = normal(np.float16, batch=4, heads=4, seqlen=1024, head_dim=8)
    bias, mask = random(4, 1, 1, 1024), random(1024, 1) > -2
    tracemalloc.start()
    tiled(q, k, v, bias=bias, mask=mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1024 * 1024 * 4  # less than one head of scores, of 16


# --- packed batches -------------------------------------------------------------------------------


def packed() -> tuple[Any, Any, Any, np.ndarray, np.ndarray]:
    """Five sequences, some of them without queries or keys."""
    cu_q, cu_k = np.array([0, 5, 5, 17, 20, 21], np.int32), np.array([0, 7, 12, 20, 20, 33])
    q, k, v = random(21, 4, 8, seed=1), random(33, 2, 8, seed=2), random(33, 2, 6, seed=3)
    return q, k, v, cu_q, cu_k


def test_sequences_are_views_of_the_packed_arrays() -> None:
    q, k, v, cu_q, cu_k = packed()
    parts = list(sequences(q, k, v, cu_q, cu_k))
    assert [at for *_, at in parts] == [
        slice(0, 5), slice(5, 5), slice(5, 17), slice(17, 20), slice(20, 21)
    ]  # fmt: skip
    for n, (one_q, one_k, one_v, at) in enumerate(parts):
        keys = slice(cu_k[n], cu_k[n + 1])
        for one, whole, rows in ((one_q, q, at), (one_k, k, keys), (one_v, v, keys)):
            assert one.shape == (1, whole.shape[1], rows.stop - rows.start, whole.shape[2])
            assert np.array_equal(one[0].swapaxes(0, 1), whole[rows])
            one[...] = n
            assert np.all(whole[rows] == n)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("by_batch", [False, True])
def test_packed_batch_is_its_sequences_one_by_one(causal: Any, by_batch: bool) -> None:
    q, k, v, cu_q, cu_k = packed()
    rules: dict[str, Any] = {
        "causal": causal,
        "window": (9, 4),
        "softcap": 2.0,
        "alibi_slopes": random(5, 4) if by_batch else random(4),
        "sink": random(4) if by_batch else None,
        "score_mod": drift,
        "mask_mod": sparse,
        "dropout_p": 0.3,
        "rng": (5, 1),
    }
    o, lse = oracle_varlen(q, k, v, cu_q, cu_k, **rules)
    plain = naive_varlen(q, k, v, cu_q, cu_k, **rules)
    assert o.shape == plain.shape == (21, 4, 6) and lse.shape == (4, 21)
    assert o.dtype == lse.dtype == np.float64 and plain.dtype == np.float32
    for number, (*one, at) in enumerate(sequences(q, k, v, cu_q, cu_k)):
        dense = Dense(*one, sequence=number, **rules)
        np.testing.assert_allclose(o[at].swapaxes(0, 1)[None], dense.o, atol=1e-12)
        np.testing.assert_allclose(lse[:, at][None], dense.lse, rtol=1e-12)
        np.testing.assert_allclose(plain[at].swapaxes(0, 1)[None], dense.o, atol=1e-5)
        got, got_lse = tiled(*one, sequence=number, **rules)
        np.testing.assert_allclose(got, dense.o, atol=1e-5)
        np.testing.assert_allclose(got_lse, dense.lse, atol=1e-5)


def test_packed_neighbours_do_not_show() -> None:
    q, k, v, cu_q, cu_k = packed()
    o, lse = oracle_varlen(q, k, v, cu_q, cu_k)
    q[:5], k[:12], v[:12], v[20:] = np.nan, np.inf, np.nan, np.nan
    got, got_lse = oracle_varlen(q, k, v, cu_q, cu_k)
    assert np.array_equal(got[5:20], o[5:20]) and np.array_equal(got_lse[:, 5:20], lse[:, 5:20])
    assert np.isnan(got[:5]).all() and np.isnan(got[20:]).all()


def test_slopes_of_too_few_sequences_are_refused() -> None:
    q, k, v, cu_q, cu_k = packed()
    with pytest.raises(ValueError, match=r"alibi_slopes: got shape \(4, 4\)"):
        oracle_varlen(q, k, v, cu_q, cu_k, alibi_slopes=random(4, 4))
