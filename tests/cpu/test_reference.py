"""The float64 oracle, the naive attention, the comparison, and the tiled NumPy attention."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_reference import (
    CAUSAL,
    DTYPES,
    STRIDES,
    judge,
    largest_score,
    normal,
    repeatable,
    strided,
    tiles,
)
from hypothesis import given
from hypothesis import strategies as st

from flashcore_cupy.cpu import numpy_rules, parallel, reference, tiled_attention
from flashcore_cupy.cpu.reference import Comparison, compare, make_inputs, naive, oracle, tiled

POISON = np.nan


@st.composite
def problems(draw: Any) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]:
    """Operands with any strides, cut out of poisoned buffers, and the rules of a call."""
    heads_kv = draw(st.integers(1, 3))
    inputs = make_inputs(
        draw(st.sampled_from(reference.INPUT_KINDS)),
        batch=draw(st.integers(0, 2)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        seqlen=draw(st.integers(0, 150)),
        seqlen_kv=draw(st.integers(0, 200)),
        head_dim=draw(st.sampled_from((1, 8, 33, 64, 80, 128))),
        head_dim_v=draw(st.sampled_from((1, 16, 64, 96))),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )
    operands = tuple(strided(x, draw(st.sampled_from(STRIDES))) for x in inputs)
    scale = draw(st.sampled_from((None, 0.1, -0.3, 0.0)))
    return operands, {"causal": draw(st.sampled_from(CAUSAL)), "softmax_scale": scale}


# --- the oracle -----------------------------------------------------------------------------------


def by_hand(q: Any, k: Any, v: Any, scale: float, offset: float) -> tuple[list[float], float]:
    """One query's o and lse, one number at a time; it sees key j <= offset."""
    seen = [j for j in range(len(k)) if j <= offset]
    if not seen:
        return [0.0] * v.shape[1], -math.inf
    scores = [
        scale * math.fsum(float(a) * float(b) for a, b in zip(q, k[j], strict=True)) for j in seen
    ]
    weights = [math.exp(s - max(scores)) for s in scores]
    total = math.fsum(weights)
    o = [
        math.fsum(w * float(v[j, d]) for w, j in zip(weights, seen, strict=True)) / total
        for d in range(v.shape[1])
    ]
    return o, max(scores) + math.log(total)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("seqlen", "seqlen_kv"), [(4, 7), (7, 4), (5, 5), (3, 0)])
def test_oracle_is_the_formula(causal: Any, seqlen: int, seqlen_kv: int) -> None:
    q, k, v = normal(
        batch=2, heads=4, heads_kv=2, seqlen=seqlen, seqlen_kv=seqlen_kv, head_dim=5, head_dim_v=3
    )
    o, lse = oracle(q, k, v, causal=causal, softmax_scale=0.7)
    assert o.dtype == lse.dtype == np.float64
    offset = {False: math.inf, True: seqlen_kv - seqlen, "top-left": 0}[causal]
    for b, h, i in np.ndindex(2, 4, seqlen):
        expected, expected_lse = by_hand(q[b, h, i], k[b, h // 2], v[b, h // 2], 0.7, i + offset)
        np.testing.assert_allclose(o[b, h, i], expected, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(lse[b, h, i], expected_lse, rtol=1e-13)


def test_default_scale_is_one_over_sqrt_d() -> None:
    q, k, v = normal(head_dim=50)
    for f in (lambda **kw: oracle(q, k, v, **kw)[1], lambda **kw: tiled(q, k, v, **kw)[1]):
        np.testing.assert_allclose(f(), f(softmax_scale=50**-0.5), rtol=1e-12)
        assert np.abs(f() - f(softmax_scale=1.0)).min() > 0.01


def test_causal_offset() -> None:
    assert reference.causal_offset(False, 3, 5) is None
    assert reference.causal_offset(True, 3, 5) == 2
    assert reference.causal_offset(True, 5, 3) == -2
    assert reference.causal_offset("top-left", 3, 5) == 0
    with pytest.raises(ValueError, match="causal: got 'bottom'"):
        reference.causal_offset("bottom", 3, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("rows", [[0, 3, 3, 99, 41], []])
def test_rows_are_those_of_the_whole(causal: Any, rows: list[int]) -> None:
    q, k, v = normal(np.float16, heads=4, heads_kv=2, seqlen_kv=70)
    chosen = np.array(rows, np.int32)
    rules: dict[str, Any] = {"causal": causal, "softmax_scale": 0.3}
    functions = (
        lambda **kw: oracle(q, k, v, **kw)[0],
        lambda **kw: oracle(q, k, v, **kw)[1],
        lambda **kw: naive(q, k, v, **kw).astype(np.float32),
        lambda **kw: reference.gate_scores(q, k, v, **kw),
        lambda **kw: reference.gate_probabilities(q, k, v, **kw),
        lambda **kw: reference.gate_uniform(q, k, v, **kw),
    )
    for f in functions:
        # BLAS may sum in another order for another number of rows; naive then rounds to float16.
        np.testing.assert_allclose(f(rows=chosen, **rules), f(**rules)[:, :, rows], atol=2e-3)
    exact = oracle(q, k, v, rows=chosen, **rules)[0]
    np.testing.assert_allclose(exact, oracle(q, k, v, **rules)[0][:, :, rows], atol=1e-14)


@pytest.mark.parametrize("rows", [[-1], [100], [[1]], [0.5], 3])
def test_rows_outside_are_refused(rows: Any) -> None:
    for f in (oracle, naive, reference.gate_scores):
        with pytest.raises(ValueError, match="rows: got"):
            f(*normal(), rows=np.array(rows))


def test_blocks_of_queries_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(np.float16)
    whole = oracle(q, k, v, causal=True), naive(q, k, v, causal=True)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 7 * 100)
    np.testing.assert_allclose(oracle(q, k, v, causal=True)[0], whole[0][0], atol=1e-14)
    np.testing.assert_allclose(oracle(q, k, v, causal=True)[1], whole[0][1], atol=1e-14)
    np.testing.assert_allclose(naive(q, k, v, causal=True), whole[1], atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_naive_rounds_as_its_dtype(dtype: np.dtype[Any]) -> None:
    q, k, v = normal(dtype, seqlen=200)
    error = np.abs(naive(q, k, v).astype(np.float64) - oracle(q, k, v)[0]).max()
    epsilon = float(ml_dtypes.finfo(dtype).eps)
    assert naive(q, k, v).dtype == dtype
    assert epsilon / 100 < error < 4 * epsilon


def test_naive_rounds_the_probabilities() -> None:
    keys = 41
    p = float(np.float16(1 / keys))  # 41 of these make 0.99973: nearer to 0.9995 than to 1
    q, k = np.zeros((1, 1, 1, 8), np.float16), np.zeros((1, 1, keys, 8), np.float16)
    v = np.ones((1, 1, keys, 1), np.float16)
    assert naive(q, k, v).item() == float(np.float16(keys * p)) != 1.0
    assert oracle(q, k, v)[0].item() == pytest.approx(1.0, abs=1e-15)


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", CAUSAL)
def test_gates_are_the_stages_of_the_oracle(causal: Any) -> None:
    q, k, v = normal(np.float16, heads=4, heads_kv=2, seqlen=60, seqlen_kv=40, head_dim_v=8)
    rules: dict[str, Any] = {"causal": causal, "softmax_scale": 0.2}
    scores = reference.gate_scores(q, k, v, **rules)
    p = reference.gate_probabilities(q, k, v, **rules)
    o, lse = oracle(q, k, v, **rules)
    shared = np.repeat(v.astype(np.float64), 2, axis=1)
    full = 0.2 * q.astype(np.float64) @ np.repeat(k.astype(np.float64), 2, axis=1).swapaxes(2, 3)
    hidden = np.zeros((60, 40), bool)
    if causal:
        hidden = np.triu(np.ones((60, 40), bool), 1 + (40 - 60 if causal is True else 0))
    assert np.array_equal(np.isneginf(scores), np.broadcast_to(hidden, scores.shape))
    np.testing.assert_allclose(scores[..., ~hidden], full[..., ~hidden], atol=1e-12)
    np.testing.assert_allclose(p @ shared, o, atol=1e-12)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(np.log(np.exp(scores).sum(-1)), lse, atol=1e-12)
    uniform = ~hidden / np.maximum(1, (~hidden).sum(1, keepdims=True))
    np.testing.assert_allclose(reference.gate_uniform(q, k, v, **rules), uniform @ shared)


# --- tiled against the oracle ---------------------------------------------------------------------


@repeatable
@given(problems(), st.sampled_from(((64, 1024), (64, 64), (16, 128))))
def test_tiled_is_accepted(problem: Any, tile: tuple[int, int]) -> None:
    operands, rules = problem
    with tiles(*tile):
        outcome = judge(*operands, **rules)
    # Of an output of few elements, the naive one may be nearer to the oracle by chance.
    q, k, v = operands
    noise = 4 * float(ml_dtypes.finfo(q.dtype).eps) + 4 * 2.0**-24 * largest_score(q, k, v, **rules)
    chance = noise * float(np.abs(v.astype(np.float32)).max(initial=0.0))
    few = math.prod(q.shape[:3]) * v.shape[3] < 2000
    lucky = few and outcome.nonfinite_mismatches == 0 and outcome.max_error <= chance
    assert outcome.ok or lucky, outcome.reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("kind", reference.INPUT_KINDS)
def test_tiled_is_accepted_over_several_tiles(kind: Any, causal: Any, dtype: Any) -> None:
    q, k, v = make_inputs(
        kind, batch=1, heads=2, heads_kv=1, seqlen=130, seqlen_kv=1500, head_dim=64, dtype=dtype
    )
    outcome = judge(q, k, v, causal=causal)
    assert outcome.ok, outcome.reason


def test_float32_gives_float32_accuracy() -> None:
    q, k, v = normal(np.float32, seqlen=1500, heads=1)
    assert np.abs(tiled(q, k, v)[0] - oracle(q, k, v)[0]).max() < 1e-6


def test_scores_past_1e4() -> None:
    q, k, v = make_inputs("large", batch=1, heads=2, seqlen=300, head_dim=64, dtype="bfloat16")
    scores = reference.gate_scores(q, k, v)
    assert scores.max(axis=-1).min() > 1e4 and scores.min() < -1e4
    o, lse = tiled(q, k, v)
    assert np.isfinite(o.astype(np.float32)).all() and np.isfinite(lse).all()


@pytest.mark.parametrize("largest", [1e38, 3e38])
def test_means_of_values_whose_sums_overflow(largest: float) -> None:
    """They are scaled by a power of two, which shows in nothing else."""
    q, k, v = normal(seqlen=70, seqlen_kv=1500)
    v *= np.float32(largest / 8)
    v[0, 0, 3] = largest
    equal = np.full_like(v, largest)
    for values in (v, equal, -equal):
        assert judge(q, k, values).ok
    small = judge(q, k, v * np.float32(1e-38))
    assert small.ok, small.reason
    v[0, 0, 5, 7], v[0, 0, 6, 8] = np.inf, np.nan
    assert judge(q, k, v).ok


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0), (2, 2, 1, 1)])
@pytest.mark.parametrize("causal", CAUSAL)
def test_empty_and_single(sizes: tuple[int, int, int, int], causal: Any) -> None:
    batch, heads, seqlen, seqlen_kv = sizes
    q, k, v = normal(
        np.float16, batch=batch, heads=heads, seqlen=seqlen, seqlen_kv=seqlen_kv, head_dim_v=8
    )
    expected = (
        np.repeat(v, seqlen, axis=2) if seqlen_kv else np.zeros((*q.shape[:3], 8), np.float16)
    )
    for o in (tiled(q, k, v, causal=causal)[0], naive(q, k, v, causal=causal)):
        assert o.shape == (batch, heads, seqlen, 8) and o.dtype == np.float16
        if seqlen_kv < 2:
            assert np.array_equal(o, expected)
    for lse in (tiled(q, k, v, causal=causal)[1], oracle(q, k, v, causal=causal)[1]):
        assert lse.shape == (batch, heads, seqlen)
        assert np.isneginf(lse).all() == (seqlen_kv == 0 or lse.size == 0)


def test_queries_without_keys() -> None:
    q, k, v = normal(np.float16, seqlen=200, seqlen_kv=70)  # bottom-right: 130 queries see nothing
    v[...] = np.abs(v) + 1
    for o, lse in (tiled(q, k, v, causal=True), oracle(q, k, v, causal=True)):
        assert np.all(o[:, :, :130] == 0) and np.all(np.isneginf(lse[:, :, :130]))
        assert np.all(o[:, :, 130:] >= 1) and np.all(np.isfinite(lse[:, :, 130:]))
        assert np.array_equal(np.asarray(o[:, :, 130], np.float16), v[:, :, 0])


def test_top_left_and_bottom_right_differ_by_the_alignment() -> None:
    q, k, v = normal(seqlen=50, seqlen_kv=80)
    first, _ = tiled(q, k, v, causal="top-left")
    last, _ = tiled(q, k, v, causal=True)
    assert np.array_equal(first[:, :, 0], v[:, :, 0])
    np.testing.assert_allclose(last[:, :, -1], tiled(q[:, :, -1:], k, v)[0][:, :, 0], atol=1e-6)
    np.testing.assert_allclose(
        first, tiled(q, k[:, :, :50], v[:, :, :50], causal=True)[0], atol=1e-6
    )


def test_out_is_written_in_place_and_nothing_around_it() -> None:
    q, k, v = normal(np.float16, seqlen=70)
    buffer = np.full((1, 80, 2, 40), POISON, np.float16)
    out = buffer[:, 5:75, :, 4:36].transpose(0, 2, 1, 3)
    o, _ = tiled(q, k, v, out=out)
    assert o is out
    assert np.array_equal(out, tiled(q, k, v)[0])
    assert np.isnan(buffer).sum() == buffer.size - out.size


def test_inputs_are_left_alone() -> None:
    inputs = normal(np.float32, seqlen=70)
    before = [x.copy() for x in inputs]
    for f in (tiled, oracle, naive):
        f(*inputs, causal=True)
    assert all(np.array_equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_wrong_operands_are_named() -> None:
    q, k, v = normal(heads=4)
    for f in (tiled, oracle, naive):
        with pytest.raises(ValueError, match=r"k: got shape \(4, 100, 32\)"):
            f(q, k[0], v)
        with pytest.raises(ValueError, match=r"got shapes .*\(1, 4, 99, 32\)"):
            f(q, k[:, :, 1:], v)
        with pytest.raises(ValueError, match="k: got 3 heads for q's 4"):
            f(q, k[:, :3], v[:, :3])
        with pytest.raises(ValueError, match="causal: got"):
            f(q, k, v, causal="left")
    for out in (np.empty((1, 4, 100, 31), np.float32), np.empty(q.shape, np.float16)):
        with pytest.raises(ValueError, match="out: got float"):
            tiled(q, k, v, out=out)


# --- NaN and infinity -----------------------------------------------------------------------------


@repeatable
@given(
    st.lists(
        st.tuples(
            st.sampled_from("qkv"),
            st.sampled_from((np.nan, np.inf, -np.inf)),
            st.integers(0, 1),
            st.integers(0, 89),
            st.integers(0, 31),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(CAUSAL),
    st.sampled_from(DTYPES),
    st.sampled_from(((64, 1024), (64, 64), (16, 64))),
)
def test_nonfinite_stand_where_the_oracle_has_them(
    pokes: Any, causal: Any, dtype: Any, tile: Any
) -> None:
    q, k, v = normal(dtype, seqlen=90, seqlen_kv=110)
    for name, value, head, row, column in pokes:
        {"q": q, "k": k, "v": v}[name][0, head, row, column] = value
    expected, expected_lse = oracle(q, k, v, causal=causal)
    with tiles(*tile):
        o, lse = tiled(q, k, v, causal=causal)
    outcome = compare(o, expected, naive(q, k, v, causal=causal))
    assert outcome.ok, outcome.reason
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("causal", CAUSAL)
def test_nonfinite_v_reaches_its_column_of_the_queries_that_see_it(
    causal: Any, value: float
) -> None:
    q, k, v = normal(np.float16, heads=4, heads_kv=2, seqlen=150, seqlen_kv=130)
    v[0, 1, 77, 5] = value
    expected = np.zeros((1, 4, 150, 32), bool)
    first = {False: 0, True: 77 + 20, "top-left": 77}[causal]
    expected[0, 2:, first:, 5] = True
    for o in (
        tiled(q, k, v, causal=causal)[0],
        oracle(q, k, v, causal=causal)[0],
        naive(q, k, v, causal=causal),
    ):
        assert np.array_equal(~np.isfinite(o), expected)
        assert np.array_equal(o[expected], np.full(expected.sum(), value), equal_nan=True)


@pytest.mark.parametrize("causal", CAUSAL)
def test_nan_in_q_and_k_reach_the_queries_that_see_them(causal: Any) -> None:
    q, k, v = normal(np.float16, heads=4, heads_kv=2, seqlen=150, seqlen_kv=150)
    q[0, 0, 60, 3] = np.nan
    k[0, 1, 77, 3] = np.nan
    expected = np.zeros((1, 4, 150), bool)
    expected[0, 0, 60] = True
    expected[0, 2:, 77 if causal else 0 :] = True
    for o, lse in (tiled(q, k, v, causal=causal), oracle(q, k, v, causal=causal)):
        assert np.array_equal(np.isnan(o), np.broadcast_to(expected[..., None], o.shape))
        assert np.array_equal(np.isnan(lse), expected)


def test_keys_that_nobody_sees_change_nothing() -> None:
    q, k, v = normal(np.float16, seqlen=50, seqlen_kv=120)
    clean = [f(q, k, v, causal="top-left") for f in (tiled, oracle)]
    k[:, :, 50:], v[:, :, 50:] = np.nan, np.inf
    for (o, lse), f in zip(clean, (tiled, oracle), strict=True):
        got, got_lse = f(q, k, v, causal="top-left")
        np.testing.assert_allclose(got, o, atol=1e-3)
        np.testing.assert_allclose(got_lse, lse, atol=1e-6)


def test_scores_of_minus_infinity_count_as_nothing() -> None:
    q, k, v = normal(np.float32, head_dim=4, seqlen=70)
    q[...], k[:, :, 10:] = 1, -np.inf
    for o, lse in (tiled(q, k, v), oracle(q, k, v)):
        expected, expected_lse = oracle(q, k[:, :, :10], v[:, :, :10])
        np.testing.assert_allclose(o, expected, atol=1e-6)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-6)
    k[...] = -np.inf
    for o, lse in (tiled(q, k, v), oracle(q, k, v)):
        assert np.all(o == 0) and np.all(np.isneginf(lse))


# --- invariants -----------------------------------------------------------------------------------


@repeatable
@given(problems())
def test_v_of_one_gives_one(problem: Any) -> None:
    (q, k, v), rules = problem
    v[...] = 1
    o, lse = tiled(q, k, v, **rules)
    sees = np.broadcast_to(~np.isneginf(lse)[..., None], o.shape)
    # Sums of up to 200 weights in float32, those of o and of the denominator in different orders.
    np.testing.assert_allclose(o.astype(np.float32), sees.astype(np.float32), rtol=200 * 2.0**-24)


def test_permuting_keys_changes_nothing() -> None:
    q, k, v = normal(np.float32, seqlen=300)
    order = np.random.default_rng(1).permutation(300)
    o, lse = tiled(q, k, v)
    permuted, permuted_lse = tiled(q, k[:, :, order], v[:, :, order])
    np.testing.assert_allclose(permuted, o, atol=1e-6)
    np.testing.assert_allclose(permuted_lse, lse, atol=1e-5)


@pytest.mark.parametrize("causal", CAUSAL)
def test_adding_a_constant_to_all_scores_adds_it_to_lse(causal: Any) -> None:
    q, k, v = normal(np.float32, seqlen=150)
    q[..., 0] = 1
    o, lse = tiled(q, k, v, causal=causal, softmax_scale=0.25)
    k[..., 0] += 40
    shifted, shifted_lse = tiled(q, k, v, causal=causal, softmax_scale=0.25)
    np.testing.assert_allclose(shifted, o, atol=1e-5)
    np.testing.assert_allclose(shifted_lse, lse + 10, atol=1e-5)


def test_constant_rows_give_the_mean_of_v() -> None:
    q, k, v = make_inputs("constant", batch=1, heads=2, seqlen=200, head_dim=64, dtype="float32")
    assert np.ptp(reference.gate_scores(q, k, v), axis=-1).max() < 1e-12
    mean = np.broadcast_to(v.mean(axis=2, keepdims=True, dtype=np.float64), v.shape)
    np.testing.assert_allclose(tiled(q, k, v)[0], mean, atol=1e-6)
    np.testing.assert_allclose(oracle(q, k, v)[0], mean, atol=1e-12)
    np.testing.assert_allclose(reference.gate_uniform(q, k, v), mean, atol=1e-12)


def test_same_bits_twice_and_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = normal(np.float32, heads=3, seqlen=1111, head_dim=80)
    o, lse = tiled(q, k, v, causal=True)
    for workers in (1, 2, 5):
        monkeypatch.setattr(parallel, "cores", lambda n=workers: n)
        again, again_lse = tiled(q, k, v, causal=True)
        assert again.tobytes() == o.tobytes() and again_lse.tobytes() == lse.tobytes()


@pytest.mark.parametrize("sizes", [(1, 1, 4000), (1, 8, 512), (4, 2, 100), (0, 3, 9), (1, 1, 0)])
@pytest.mark.parametrize("workers", [1, 2, 64])
def test_tasks_cover_every_tile_once(sizes: tuple[int, int, int], workers: int) -> None:
    batch, heads_kv, seqlen = sizes
    problem = numpy_rules.Sizes(batch, 3 * heads_kv, heads_kv, seqlen, seqlen, 64, 64)
    tasks = list(tiled_attention._tasks(problem, workers))
    covered = [(t.batch, head, row) for t in tasks for head, row in t.tiles]
    block = tiled_attention.BLOCK_M
    expected = {
        (b, h, row)
        for b in range(batch)
        for h in range(3 * heads_kv)
        for row in range(0, seqlen, block)
    }
    assert len(covered) == len(set(covered)) and set(covered) == expected
    assert all(head // 3 == t.head_kv for t in tasks for head, _ in t.tiles)
    if seqlen == 4000:
        assert len(tasks) >= min(workers, 20)


# --- compare --------------------------------------------------------------------------------------


def outcome_of(change: Any, dtype: Any = np.float16) -> Comparison:
    """Compare after `change` has edited a correct output in place."""
    q, k, v = normal(dtype)
    expected, plain = oracle(q, k, v)[0], naive(q, k, v)
    got = expected.astype(dtype)
    change(got, expected, plain)
    return compare(got, expected, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compare_accepts_rounding_noise(dtype: Any) -> None:
    def noise(got: np.ndarray, expected: np.ndarray, _: np.ndarray) -> None:
        sign = np.random.default_rng(0).choice([-1, 1], got.shape)
        epsilon = float(ml_dtypes.finfo(dtype).eps)
        got[...] = (expected * (1 + 0.5 * epsilon * sign)).astype(dtype)

    outcome = outcome_of(noise, dtype)
    assert outcome.ok and outcome.reason == "" and outcome.nonfinite_mismatches == 0
    assert 0 < outcome.mean_error < outcome.max_error <= outcome.allowed_error
    assert outcome.allowed_error < 16 * float(ml_dtypes.finfo(dtype).eps)
    q, k, v = normal(dtype)
    assert compare(naive(q, k, v), oracle(q, k, v)[0], naive(q, k, v)).ok


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compare_rejects_one_element_that_is_off(dtype: Any) -> None:
    def off(got: np.ndarray, expected: np.ndarray, _: np.ndarray) -> None:
        got[0, 1, 40, 3] = expected[0, 1, 40, 3] + 0.1

    outcome = outcome_of(off, dtype)
    assert not outcome.ok and outcome.worst_index == (0, 1, 40, 3)
    assert outcome.max_error == pytest.approx(0.1, rel=0.1) and "max error" in outcome.reason
    assert outcome.worst_got - outcome.worst_expected == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("got_value", "expected_value"),
    [
        (np.nan, 1.0),
        (np.inf, 1.0),
        (1.0, np.nan),
        (1.0, np.inf),
        (-np.inf, np.inf),
        (np.nan, np.inf),
        (np.inf, np.nan),
    ],
)
def test_compare_rejects_wrong_nonfinite(got_value: float, expected_value: float) -> None:
    def poke(got: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
        got[0, 1, 2, 3], expected[0, 1, 2, 3] = got_value, expected_value
        plain[0, 1, 2, 3] = expected_value

    outcome = outcome_of(poke)
    assert not outcome.ok and outcome.nonfinite_mismatches == 1
    assert outcome.worst_index == (0, 1, 2, 3) and "NaN" in outcome.reason
    assert np.isfinite([outcome.max_error, outcome.mean_error, outcome.allowed_error]).all()


def test_compare_rejects_all_nan() -> None:
    outcome = outcome_of(lambda got, *_: got.fill(np.nan))
    assert not outcome.ok and outcome.nonfinite_mismatches == 6400


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_compare_accepts_equal_nonfinite(value: float) -> None:
    def poke(got: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
        for x in (got, expected, plain):
            x[0, 1, 2] = value

    outcome = outcome_of(poke)
    assert outcome.ok and 0 < outcome.allowed_error < 0.01


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_compare_is_not_loosened_by_a_nonfinite_naive(value: float) -> None:
    def poke(got: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
        plain[0, 0, 0, 0] = value
        got[0, 1, 2, 3] += 0.1

    outcome = outcome_of(poke)
    assert not outcome.ok and outcome.allowed_error < 0.01


def test_compare_float32_allows_the_last_place() -> None:
    """A row with one key returns p v / p: p and v are in two TF32 parts of 11 bits each."""
    expected = np.full((1, 1, 4, 8), 20.9905, np.float32)
    place = np.spacing(np.float32(20.9905))
    assert compare(expected + place, expected, expected).ok
    allowed = compare(expected, expected, expected).allowed_error
    assert place <= allowed < 9 * place
    assert not compare(expected + 10 * place, expected, expected).ok


def test_compare_float32_allows_four_times_the_naive_error() -> None:
    expected = np.zeros(8)
    plain = np.full(8, 1e-3, np.float32)  # expected + 0.3 - 0.3 is exact at 0
    for dtype, factor in ((np.float32, 4), (np.float16, 2)):
        got = np.full(8, 0.99 * factor * 1e-3, dtype)
        assert compare(got, expected, plain).ok
        assert not compare((got * dtype(1.02)).astype(dtype), expected, plain).ok


def test_compare_allows_for_the_rounding_of_the_dtype() -> None:
    # In float16: 0.1 + 0.3 is a tie that rounds down by 2^-13, and - 0.3 and - 0.1 are exact.
    expected = np.full(8, float(np.float16(0.1)))
    outcome = compare(expected.astype(np.float16), expected, expected)
    assert outcome.ok and outcome.max_error == 0.0
    assert outcome.allowed_error == 2 * 2.0**-13


def test_compare_allows_for_the_rounding_of_p_and_o() -> None:
    """Two keys with scores 1 and 0: P normalised first comes out better, by luck."""
    e = float(np.exp(-1.0))
    p = float(ml_dtypes.bfloat16(e))  # as a fused kernel has it, before the sum is known
    got = np.array([p / (1 + e)]).astype(ml_dtypes.bfloat16)
    expected = np.array([e / (1 + e)])
    naive_o = expected.astype(ml_dtypes.bfloat16)
    assert abs(float(got[0]) - expected[0]) > 2 * abs(float(naive_o[0]) - expected[0])
    assert compare(got, expected, naive_o).ok
    assert not compare((got.astype(np.float64) * 0.99).astype(got.dtype), expected, naive_o).ok


def test_compare_of_nothing_and_of_unequal_shapes() -> None:
    empty = np.empty((1, 2, 0, 8))
    assert compare(empty.astype(np.float16), empty, empty).ok
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\), \(3,\)"):
        compare(np.ones(3), np.ones(3), np.ones(2))


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", reference.INPUT_KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_inputs_have_the_sizes_asked_for(kind: Any, dtype: str) -> None:
    sizes: dict[str, Any] = {
        "batch": 2, "heads": 6, "heads_kv": 3, "seqlen": 5, "seqlen_kv": 7, "head_dim": 32,
        "head_dim_v": 16, "dtype": dtype,
    }  # fmt: skip
    q, k, v = make_inputs(kind, seed=1, **sizes)
    assert (q.shape, k.shape, v.shape) == ((2, 6, 5, 32), (2, 3, 7, 32), (2, 3, 7, 16))
    assert {x.dtype.name for x in (q, k, v)} == {dtype}
    assert all(np.isfinite(x.astype(np.float32)).all() for x in (q, k, v))
    assert all(x.flags.c_contiguous for x in (q, k, v))
    same, other = make_inputs(kind, seed=1, **sizes), make_inputs(kind, seed=2, **sizes)
    assert [x.tobytes() for x in same] == [x.tobytes() for x in (q, k, v)]
    assert [x.tobytes() for x in other] != [x.tobytes() for x in (q, k, v)]


def test_input_kinds_are_what_they_say() -> None:
    sizes = {"batch": 1, "heads": 4, "seqlen": 500, "head_dim": 64}
    q, k, v = make_inputs("normal", dtype="float32", **sizes)
    assert abs(float(q.std()) - 1) < 0.01 and np.abs(q).max() < 6
    q, _, _ = make_inputs("outliers", dtype="float32", **sizes)
    assert 0.0002 < (np.abs(q) > 6).mean() < 0.001 and 15 < np.abs(q).max() < 60
    q, k, v = make_inputs("onehot", dtype="float32", **sizes)
    assert all(np.all((x != 0).sum(-1) == 1) for x in (q, k, v))
    assert reference.gate_scores(q, k, v).max() == pytest.approx(16)
    with pytest.raises(ValueError, match="kind: got 'odd'; choose one of normal"):
        make_inputs("odd", **sizes)  # type: ignore[arg-type]


# --- memory and time ------------------------------------------------------------------------------


def test_s_8192_stays_within_one_gigabyte() -> None:
    pytest.importorskip("resource", reason="it tells a process's memory, on POSIX alone")
    code = """
import re, resource, sys, time
from flashcore_cupy.cpu.reference import make_inputs, tiled
q, k, v = make_inputs("normal", batch=1, heads=8, seqlen=8192, head_dim=64, dtype="float16")
start = time.perf_counter()
o, lse = tiled(q, k, v)
if sys.platform == "linux":  # getrusage tells what the parent had before, if that was more
    with open("/proc/self/status") as status:
        peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1]) * 1024
else:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(peak, time.perf_counter() - start, float(abs(o).max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, seconds, largest = (float(x) for x in done.stdout.split())
    print(f"S=8192: peak {peak / 2**20:.0f} MiB, {seconds:.2f} s")
    assert 0 < largest < 1
    assert peak < 2**30


def test_memory_grows_with_s_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: 1)

    def peak(seqlen: int) -> int:
        q, k, v = normal(np.float16, heads=1, seqlen=seqlen)
        tracemalloc.start()
        tiled(q, k, v)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    small, large = peak(1024), peak(4096)
    assert large < 4 * small
    assert large < 4096 * 4096 / 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_s_512_is_fast(dtype: Any, causal: bool) -> None:
    q, k, v = make_inputs("normal", batch=1, heads=8, seqlen=512, head_dim=64, dtype=dtype)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        tiled(q, k, v, causal=causal)
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds[2:])[5]
    print(f"S=512 {dtype} causal={causal}: median {median * 1e3:.1f} ms")
    # Wanted: a median of 50 ms on 2 idle cores. A busy machine gets four times that.
    assert min(seconds) < 0.2


def test_bits_do_not_depend_on_blas_threads() -> None:
    code = """
import hashlib
from flashcore_cupy.cpu.reference import make_inputs, tiled
for head_dim in (64, 80, 128):
    x = make_inputs("normal", batch=1, heads=2, seqlen=777, head_dim=head_dim, dtype="float32")
    print(hashlib.sha256(tiled(*x)[0].tobytes()).hexdigest())
"""
    digests = set()
    for threads in ("1", "2"):
        names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | dict.fromkeys(names, threads),
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1 and len(digests.pop().split()) == 3
