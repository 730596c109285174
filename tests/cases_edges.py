"""The edges of ``attention``, the same on NumPy arrays and on a GPU: each test runs on both.

What a query sees decides everything: nothing (zero, -inf), NaN (exactly there), neighbours (never).
"""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from places import EXACT, RULED, Place, each, everywhere

from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.cpu import reference
from flashcore_cupy.problem.attention_problem import DTYPES
from flashcore_cupy.select import registry
from flashcore_cupy.select.units import round_up

#: Batch, heads of q, of k and v, queries and keys: one for each kind of tile; and keys that thread
#: blocks share out, in clusters and through memory.
SIZES = {
    "decode": (2, 8, 2, 3, 700),
    "few blocks": (1, 4, 2, 70, 200),
    "some": (6, 8, 8, 65, 160),
    "enough": (13, 8, 2, 80, 150),
    "clusters": (1, 8, 2, 1, 3008),
    "parts": (1, 32, 8, 3, 5008),
    "grouped": (1, 16, 2, 3, 2000),
}
#: Where a smaller one has the same tile; for "enough" see ``Place.by``.
EMULATED = SIZES | {
    "some": (1, 41, 41, 33, 160),
    "enough": (1, 4, 2, 80, 150),
    "grouped": (1, 8, 1, 3, 900),
}
TILES = ("decode", "few blocks", "some", "enough")
every_tile = each("size", TILES)


def every_tile_and(*dtypes: str) -> pytest.MarkDecorator:
    """Each with each; emulated, each once: float32 has one tile for all but decoding."""
    once = [("decode", "float16"), ("some", "bfloat16"), ("enough", "float16")]
    once.append(("few blocks", "float32"))
    return each("size, dtype", itertools.product(TILES, dtypes), emulated=once)


def arrays(
    seqlen_q: int,
    seqlen_kv: int,
    dim: int = 64,
    *,
    batch: int = 1,
    heads: int = 2,
    heads_kv: int | None = None,
    dtype: str = "float16",
    seed: int = 0,
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = ((heads, seqlen_q), *((heads_kv or heads, seqlen_kv),) * 2)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return [rng.standard_normal((batch, *row, dim)).astype(kind) for row in rows]


def sized(on: Place, size: str, *, multiple: int = 1, **more: Any) -> list[np.ndarray]:
    """Arrays of a size, with keys that are a multiple of a number."""
    batch, heads, heads_kv, seqlen_q, seqlen_kv = (EMULATED if on.is_emulated else SIZES)[size]
    batch = min(batch, 2) if on.is_numpy else batch  # which has one tile for all
    seqlen_kv = round_up(seqlen_kv, multiple)
    return arrays(seqlen_q, seqlen_kv, batch=batch, heads=heads, heads_kv=heads_kv, **more)


def check(got: np.ndarray, q: Any, k: Any, v: Any, **rules: Any) -> None:
    rules = {n: x.python if isinstance(x, Mod) else x for n, x in rules.items()}
    packs = "cu_seqlens_q" in rules
    oracle, naive = reference.oracle, reference.naive
    if packs:
        oracle, naive = reference.oracle_varlen, reference.naive_varlen
    expected, _ = oracle(q, k, v, **rules)
    comparison = reference.compare(got, expected, naive(q, k, v, **rules))
    assert comparison.ok, comparison.reason


@everywhere(*registry.KERNELS)
@each("causal", [False, True, "top-left"])
def test_nothing_to_see(on: Place, causal: object) -> None:
    for seqlen_q, seqlen_kv, batch in ((5, 0, 1), (0, 5, 1), (0, 0, 1), (5, 7, 0)):
        q, k, v = arrays(seqlen_q, seqlen_kv, batch=batch)
        o, lse = on.run(q, k, v, causal=causal, return_lse=True)
        assert o.shape == q.shape and lse.shape == q.shape[:3]
        assert (o == 0).all() and (lse == -np.inf).all()


@everywhere(*registry.KERNELS)
@each("gate", ["qk", "softmax", "pv"])
def test_gates_with_nothing_to_see(on: Place, gate: str) -> None:
    q, k, v = arrays(20, 0)
    got = on.run(q, k, v, gate=gate, causal=on.is_emulated)  # then of one build with the next
    assert got.shape == (1, 2, 20, 64 if gate == "pv" else 0)
    q, k, v = arrays(100, 30)  # causal: the first 70 queries see nothing
    got = on.run(q, k, v, gate=gate, causal=True)
    nothing = -np.inf if gate == "qk" else 0
    assert (got[:, :, :70] == nothing).all()


@everywhere(*EXACT)
def test_queries_without_keys(on: Place) -> None:
    q, k, v = arrays(150, 60)
    o, lse = on.run(q, k, v, causal=True, return_lse=True)
    assert (o[:, :, :90] == 0).all() and (lse[:, :, :90] == -np.inf).all()
    assert np.isfinite(lse[:, :, 90:]).all()
    check(o, q, k, v, causal=True)


@everywhere(*registry.KERNELS)
def test_queries_without_keys_stay_zero_beside_nan(on: Place) -> None:
    """Their tile holds values that others see; NaN among those must not reach them."""
    q, k, v = arrays(20, 10)
    v[...] = np.nan
    o, lse = on.run(q, k, v, causal=True, return_lse=True)
    assert (o[:, :, :10] == 0).all() and (lse[:, :, :10] == -np.inf).all()
    assert np.isnan(o[:, :, 10:]).all()


@everywhere(*registry.KERNELS)
@each("value", [np.nan, np.inf, -np.inf])
def test_nan_in_q_reaches_its_row_alone(on: Place, value: float) -> None:
    q, k, v = arrays(100, 130)
    clean = on.run(q, k, v)
    q[0, 1, 37, 5] = value
    o = on.run(q, k, v)
    touched = np.isnan(o).any(-1)
    assert touched[0, 1, 37] and touched.sum() == 1
    if not on.quantizes:  # there a head shares one scale
        np.testing.assert_array_equal(o[~touched], clean[~touched])


@everywhere(*registry.KERNELS)
def test_nan_in_k_reaches_the_queries_that_see_it(on: Place) -> None:
    q, k, v = arrays(130, 130)
    k[0, 1, 77, 3] = np.nan
    o, lse = on.run(q, k, v, causal=True, return_lse=True)
    seen = np.zeros((1, 2, 130), bool)
    seen[0, 1, 77:] = True
    np.testing.assert_array_equal(np.isnan(o).any(-1), seen)
    np.testing.assert_array_equal(np.isnan(lse), seen)


@everywhere(*EXACT)
@each("value", [np.nan, np.inf, -np.inf])
def test_nan_in_v_reaches_whom_it_may(on: Place, value: float) -> None:
    """Every query that sees it; beyond those, at most queries of the tile of keys."""
    length = 300 if on.is_emulated else 600
    key = length - 23
    q, k, v = arrays(length, length)
    v[0, 1, key, 3] = value
    o = on.run(q, k, v, causal=True)
    bad = ~np.isfinite(o)
    assert bad[0, 1, key:, 3].all(), "the queries that see it"
    assert not bad[0, 0].any(), "another head"
    assert not np.delete(bad, 3, axis=-1).any(), "another column"
    if on.is_numpy or on.kernel == "scalar":
        assert not bad[0, 1, :key].any(), "exact here: a hidden value is never multiplied"
    else:
        assert not bad[0, 1, : key // 128 * 128].any(), "queries whose tiles end before it"


@everywhere(*registry.KERNELS)
def test_keys_that_nobody_sees_do_not_leak(on: Place) -> None:
    """Top-left causal with more keys than queries: the last keys are hidden from all."""
    q, k, v = arrays(70, 200)
    clean = on.run(q, k[:, :, :70], v[:, :, :70], causal="top-left")
    for hidden_k, hidden_v in ((np.nan, np.inf), (60000.0, -60000.0)):
        k[:, :, 70:], v[:, :, 70:] = hidden_k, hidden_v
        got = on.run(q, k, v, causal="top-left")
        if on.is_numpy:  # other tiles, other bits
            check(got, q, k, v, causal="top-left")
        else:
            np.testing.assert_array_equal(got, clean, err_msg=on.kernel)


@everywhere(*EXACT)
@each("scale", [0.0, -0.125, 3.0])
def test_any_finite_scale(on: Place, scale: float) -> None:
    q, k, v = arrays(90, 110)
    check(on.run(q, k, v, softmax_scale=scale), q, k, v, softmax_scale=scale)


@everywhere(*EXACT)
def test_large_scores(on: Place) -> None:
    """Scores past 1e4: exp of them overflows, exp of differences does not."""
    q, k, v = arrays(90, 110)
    q, k = (x * np.float16(60) for x in (q, k))
    o = on.run(q, k, v, softmax_scale=1.0)
    assert np.isfinite(o).all()
    check(o, q, k, v, softmax_scale=1.0)


@everywhere(*registry.KERNELS)
def test_invariants(on: Place) -> None:
    q, k, v = arrays(100, 150)
    ones = on.run(q, k, np.ones_like(v), causal=True)
    assert np.abs(ones[:, :, :].astype(np.float64) - 1).max() <= 2**-10
    constant = np.broadcast_to(v[:, :, :1], v.shape).copy()  # whatever the weights
    tolerance = 0.07 if on.quantizes else 2**-9
    got = on.run(q, k, constant).astype(np.float64)
    assert np.abs(got - constant[:, :, :1]).max() <= tolerance * np.abs(constant).max()
    first = on.run(q, k, v)
    np.testing.assert_array_equal(first, on.run(q, k, v), "the same bits twice")


@everywhere(*EXACT)
def test_one_query_many_keys(on: Place) -> None:
    q, k, v = arrays(1, 3_000 if on.is_emulated else 20_000, heads=1)
    check(on.run(q, k, v), q, k, v)


def off_by_a_byte(x: np.ndarray, xp: Any) -> Any:
    base = xp.zeros(1 + x.nbytes, np.uint8)
    base[1:] = xp.asarray(x.reshape(-1).view(np.uint8))
    memory = base[1:] if xp is np else base[1:].data
    return xp.ndarray(x.shape, x.dtype, memory)


@everywhere(*EXACT)
def test_out_beside_its_inputs(on: Place) -> None:
    """q, k, v and o as neighbours in one array: their spans overlap, their elements do not."""
    q, k, v = arrays(50, 50)
    packed = on.xp.stack([on.xp.asarray(x) for x in (q, k, v, q)], axis=3)
    views = [packed[:, :, :, i] for i in range(4)]
    on.attention(*views[:3], out=views[3])
    host = on.to_host(packed)
    check(host[:, :, :, 3], q, k, v)
    np.testing.assert_array_equal(host[:, :, :, 0], q)


@everywhere(*EXACT)
def test_out_is_written_in_place(on: Place) -> None:
    """Between guards, as every second row of a wider array that starts an element late."""
    q, k, v = arrays(50, 60)
    base = on.xp.full((1, 2, 100, 70), np.nan, np.float16)
    out = base[:, :, ::2, 1:65]
    assert on.attention(*(on.xp.asarray(x) for x in (q, k, v)), out=out) is out
    host = on.to_host(base)
    check(host[:, :, ::2, 1:65], q, k, v)
    host[:, :, ::2, 1:65] = np.nan
    assert np.isnan(host).all(), "nothing else was written"


# ---- what a query does not see -------------------------------------------------------------------

ODD_KEYS = Mod("kv_idx % 2 == 1", lambda b, h, q_idx, kv_idx: kv_idx % 2 == 1)
NOTHING = Mod("q_idx < 0", lambda b, h, q_idx, kv_idx: (q_idx < 0) & (kv_idx >= 0))


def hiding(name: str, q: np.ndarray, k: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """A rule that hides some keys from all queries of a head, and where it does: (B, Hq, Skv)."""
    (batch, heads, seqlen_q, _), seqlen_kv = q.shape, k.shape[2]
    offset = seqlen_kv - seqlen_q
    keys = np.broadcast_to(np.arange(seqlen_kv), (batch, heads, seqlen_kv))
    rng = np.random.default_rng(1)
    if name == "causal":
        return {"causal": "top-left"}, keys >= seqlen_q
    if name == "window left":
        return {"window": (5, -1)}, keys < offset - 5
    if name == "both sides":
        return {"window": (9, 4), "causal": "top-left"}, keys >= seqlen_q
    if name == "mask_mod":
        return {"mask_mod": ODD_KEYS}, keys % 2 == 0
    one = {"mask of keys": 1, "mask of heads": heads, "mask of queries": heads}[name]
    seen = rng.random((batch, one, 1, seqlen_kv)) < 0.6
    if name == "mask of queries":
        seen = seen & (rng.random((batch, one, seqlen_q, 1)) < 0.8)
        seen[:, :, 0] = False
    return {"mask": seen}, np.broadcast_to(~seen.any(2), keys.shape)


HIDING = (
    *("causal", "window left", "both sides", "mask_mod"),
    *("mask of keys", "mask of heads", "mask of queries"),
)


@everywhere(*RULED)
@every_tile_and("float16", "float32")
@each("name", HIDING)
def test_hidden_keys_do_not_leak(on: Place, dtype: str, name: str, size: str) -> None:
    """What no query of a head sees may hold anything, also if other heads of its group see it."""
    q, k, v = sized(on, size, dtype=dtype)
    rules, hidden = hiding(name, q, k)
    group = q.shape[1] // k.shape[1]
    clean = on.run(q, k, v, **rules)
    check(clean, q, k, v, **rules)
    from_all = hidden.reshape(*k.shape[:2], group, -1).all(2)
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[from_all], bad_v[from_all] = np.nan, np.inf
    assert_alike(on, on.run(q, bad_k, bad_v, **rules), clean)
    bad_v[hidden[:, ::group]] = np.nan
    got = on.run(q, k, bad_v, **rules)
    assert_alike(on, got[:, ::group], clean[:, ::group])


def assert_alike(on: Place, got: np.ndarray, expected: np.ndarray) -> None:
    """The same bits on a GPU; NumPy leaves hidden keys out, and adds up in another order."""
    if on.is_numpy:
        atol = 1e-5 if got.dtype == np.float32 else 2e-3
        np.testing.assert_allclose(*(x.astype(np.float32) for x in (got, expected)), atol=atol)
    else:
        np.testing.assert_array_equal(got, expected, err_msg=on.kernel)


@everywhere(*RULED)
@every_tile
@each("sink", [False, True])
@each("name", ["mask", "mask_mod", "window", "bias"])
def test_queries_that_see_nothing(on: Place, name: str, sink: bool, size: str) -> None:
    q, k, v = sized(on, size)
    (batch, heads, seqlen_q, _), seqlen_kv = q.shape, k.shape[2]
    rules: dict[str, Any] = {
        "mask": {"mask": np.zeros((batch, 1, seqlen_q, seqlen_kv), bool)},
        "mask_mod": {"mask_mod": NOTHING},
        "window": {"window": (0, 0), "causal": "top-left"},
        "bias": {"bias": np.full((1, heads, 1, seqlen_kv), -np.inf, np.float32)},
    }[name]
    if name == "window":  # the first half of the queries have no keys to their left
        k, v = k[:, :, : seqlen_q // 2], v[:, :, : seqlen_q // 2]
        nothing = np.arange(seqlen_q) >= seqlen_q // 2
    else:
        nothing = np.ones(seqlen_q, bool)
    logits = np.linspace(-2, 2, heads, dtype=np.float32)
    rules |= {"sink": logits} if sink else {}
    o, lse = on.run(q, k, v, return_lse=True, **rules)
    assert (o[:, :, nothing] == 0).all()
    expected = logits[:, None] if sink else np.full((heads, 1), -np.inf)
    expected = np.broadcast_to(expected, lse.shape[1:])[:, nothing]
    np.testing.assert_allclose(lse[:, :, nothing], expected[None].repeat(batch, 0), rtol=1e-6)
    check(o, q, k, v, **rules)


@everywhere(*RULED)
def test_nothing_but_a_sink(on: Place) -> None:
    logits = np.array([1.5, -3.0], np.float32)
    for seqlen_q, seqlen_kv, batch in ((5, 0, 1), (0, 5, 1), (0, 0, 1), (5, 7, 0), (40, 0, 3)):
        q, k, v = arrays(seqlen_q, seqlen_kv, batch=batch)
        o, lse = on.run(q, k, v, sink=logits, window=(3, 3), return_lse=True)
        assert o.shape == q.shape and lse.shape == q.shape[:3]
        assert (o == 0).all()
        np.testing.assert_allclose(lse, np.broadcast_to(logits[:, None], lse.shape), rtol=1e-6)


@everywhere(*RULED)
@every_tile
def test_a_sink_of_minus_infinity_is_none(on: Place, size: str) -> None:
    q, k, v = sized(on, size)
    none = np.full(q.shape[1], -np.inf, np.float32)
    rules = {"causal": True, "window": (40, -1)}
    o, lse = on.run(q, k, v, return_lse=True, sink=none, **rules)
    check(o, q, k, v, **rules)
    _, expected = reference.oracle(q, k, v, **rules)
    np.testing.assert_allclose(lse, expected, rtol=1e-4, atol=1e-4)


# ---- packed sequences ----------------------------------------------------------------------------

LENGTHS = ((0, 5), (70, 90), (1, 1), (33, 0), (0, 0), (3, 200), (65, 64))


def pack(
    lengths: tuple[tuple[int, int], ...], heads: int = 4, heads_kv: int = 2, **more: Any
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """q, k, v (total, H, D) and both cu_seqlens."""
    bounds = np.cumsum([(0, 0), *lengths], axis=0, dtype=np.int32)
    q, k, v = arrays(*map(int, bounds[-1]), heads=heads, heads_kv=heads_kv, **more)
    packed = [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v)]
    return packed, {"cu_seqlens_q": bounds[:, 0].copy(), "cu_seqlens_k": bounds[:, 1].copy()}


@everywhere(*RULED)
@each("dtype", DTYPES, emulated=["float32", "bfloat16"])
@each(
    "rules",
    [{}, {"causal": True}, {"causal": "top-left"}, {"window": (9, 2)}],
    emulated=[{"causal": True}, {"window": (9, 2)}],
)
def test_neighbours_in_a_packed_batch_do_not_leak(on: Place, rules: dict, dtype: str) -> None:
    for lengths in (LENGTHS, ((1, 90), (1, 300), (0, 7), (2, 40))):
        operands, bounds = pack(lengths, dtype=dtype)
        clean = on.run(*operands, **bounds, **rules)
        check(clean, *operands, **bounds, **rules)
        for n, (count, _) in enumerate(lengths):
            if on.is_emulated and n % 3:
                continue
            rows, keys = (slice(*x[n : n + 2]) for x in bounds.values())
            poisoned = [
                np.full_like(x, value)
                for x, value in zip(operands, (np.nan, np.inf, np.nan), strict=True)
            ]
            for x, original, own in zip(poisoned, operands, (rows, keys, keys), strict=True):
                x[own] = original[own]
            if count:
                got = on.run(*poisoned, **bounds, **rules)
                np.testing.assert_array_equal(got[rows], clean[rows])


@everywhere(*RULED)
def test_packed_batches_of_nothing(on: Place) -> None:
    for lengths in ((), ((0, 0),), ((0, 7), (0, 3)), ((5, 0), (3, 0))):
        operands, bounds = pack(lengths)
        logits = np.array([1, 2, 3, 4], np.float32)
        o, lse = on.run(*operands, **bounds, return_lse=True, sink=logits)
        assert o.shape == operands[0].shape and lse.shape == operands[0].shape[1::-1]
        assert (o == 0).all()
        np.testing.assert_allclose(lse, np.broadcast_to(logits[:, None], lse.shape), rtol=1e-6)
        _, lse = on.run(*operands, **bounds, return_lse=True)
        assert (lse == -np.inf).all()


# ---- NaN where it belongs ------------------------------------------------------------------------


@everywhere(*RULED)
@every_tile
@each("name", ["window", "mask", "mask_mod", "top-left"])
def test_nan_in_q_and_k_reaches_who_attends(on: Place, name: str, size: str) -> None:
    q, k, v = sized(on, size)
    (batch, heads, seqlen_q, _), seqlen_kv = q.shape, k.shape[2]
    offset = 0 if name == "top-left" else seqlen_kv - seqlen_q
    i, j = np.arange(seqlen_q)[:, None] + offset, np.arange(seqlen_kv)
    mask = np.random.default_rng(2).random((batch, 1, seqlen_q, seqlen_kv)) < 0.5
    rules, seen = {
        "window": ({"window": (20, 3)}, (i - 20 <= j) & (j <= i + 3)),
        "mask": ({"mask": mask}, mask),
        "mask_mod": ({"mask_mod": ODD_KEYS}, (j % 2 == 1) & (i >= 0)),
        "top-left": ({"causal": "top-left", "window": (30, -1)}, (i - 30 <= j) & (j <= i)),
    }[name]
    seen = np.broadcast_to(seen, (batch, heads, seqlen_q, seqlen_kv))
    clean = on.run(q, k, v, **rules)
    bad_query, bad_key = seqlen_q // 2, (offset + seqlen_q // 2) | 1
    q[0, 1, bad_query, 5] = np.nan
    k[-1, 0, bad_key, 3] = np.inf
    k[-1, 0, bad_key, 4] = np.nan
    o, lse = on.run(q, k, v, return_lse=True, **rules)
    expected = np.zeros(seen.shape[:3], bool)
    expected[0, 1, bad_query] = seen[0, 1, bad_query].any()
    expected[-1, : heads // k.shape[1]] |= seen[-1, : heads // k.shape[1], :, bad_key]
    np.testing.assert_array_equal(np.isnan(o).all(-1), expected)
    np.testing.assert_array_equal(np.isnan(o).any(-1), expected)
    np.testing.assert_array_equal(np.isnan(lse), expected)
    np.testing.assert_array_equal(o[~expected], clean[~expected])


# ---- numbers at their limits ---------------------------------------------------------------------


_HILL = np.where(np.arange(110) % 7 == 3, 3e4, -3e4).astype(np.float32)
#: What makes scores past ten thousand, of 90 queries and 110 keys.
FAR = {
    "bias": {"bias": _HILL},
    "bias, downwards": {"bias": -np.abs(_HILL) * np.linspace(1, 2, 90, dtype=np.float32)[:, None]},
    "alibi": {"alibi_slopes": np.array([300.0, -300.0], np.float32)},
    "score_mod": {
        "score_mod": Mod(
            "score + 20000.0f * (kv_idx / 40)",
            lambda score, b, h, q_idx, kv_idx: score + score.dtype.type(2e4) * (kv_idx // 40),
        )
    },
    "softcap": {"softcap": 2e4, "softmax_scale": 500.0},
}


@everywhere(*RULED)
@each("dtype", DTYPES, emulated=["float32", "float16"])
@each("name", FAR, emulated=["bias", "softcap"])
def test_scores_past_ten_thousand(on: Place, name: str, dtype: str) -> None:
    q, k, v = arrays(90, 110, dtype=dtype)
    rules: dict[str, Any] = FAR[name]
    o, lse = on.run(q, k, v, return_lse=True, **rules)
    assert np.isfinite(o.astype(np.float32)).all() and np.isfinite(lse).all()
    if dtype != "float32":
        check(o, q, k, v, **rules)
        return
    # One key has all the weight in most rows. Naive attention copies its value, and so sets a
    # limit of nothing; products of split factors are off by a few units in the last place.
    plain = {n: x.python if isinstance(x, Mod) else x for n, x in rules.items()}
    expected, naive = reference.oracle(q, k, v, **plain)[0], reference.naive(q, k, v, **plain)
    allowed = 2.0**-20 * np.abs(v).max() + 4 * np.abs(naive - expected).max()
    assert np.abs(o - expected).max() <= allowed


@everywhere(*EXACT)
@each("kind", ["outliers", "constant", "large"])
def test_inputs_far_from_normal(on: Place, kind: Any) -> None:
    q, k, v = reference.make_inputs(kind, batch=1, heads=2, seqlen=130, head_dim=64, seqlen_kv=200)
    check(on.run(q, k, v, causal=True), q, k, v, causal=True)
    if kind == "constant":  # all scores of a row alike: the mean
        mean = v.astype(np.float64).mean(2, keepdims=True)
        assert np.abs(on.run(q, k, v) - mean).max() <= 2**-10


@everywhere(*EXACT)
@each("dim", [1, 64, 128], emulated=[1])
def test_one_query_one_key(on: Place, dim: int) -> None:
    q, k, v = arrays(1, 1, dim, batch=2, heads=3)
    o, lse = on.run(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(o, v)
    scores = (q.astype(np.float64) * k.astype(np.float64)).sum(-1) / np.sqrt(dim)
    np.testing.assert_allclose(lse, scores, rtol=1e-5, atol=1e-5)


@everywhere(*RULED)
@each("dtype", DTYPES, emulated=["float16"])
def test_one_query_a_hundred_thousand_keys(on: Place, dtype: str) -> None:
    keys = 4_000 if on.is_emulated else 100_000
    q, k, v = arrays(1, keys, heads=4, heads_kv=1, dtype=dtype)
    for rules in ({}, {"window": (keys * 7 // 10, -1)}, {"mask_mod": ODD_KEYS}):
        o, lse = on.run(q, k, v, return_lse=True, **rules)
        check(o, q, k, v, **rules)
        plain = {n: x.python if isinstance(x, Mod) else x for n, x in rules.items()}
        np.testing.assert_allclose(lse, reference.oracle(q, k, v, **plain)[1], atol=1e-3)


# ---- the same bits -------------------------------------------------------------------------------


@everywhere(*RULED)
@every_tile_and(*DTYPES)
def test_the_same_bits_again(on: Place, dtype: str, size: str) -> None:
    q, k, v = sized(on, size, dtype=dtype)
    slopes = np.linspace(0, 0.1, q.shape[1], dtype=np.float32)
    rules = {"causal": True} | ({} if on.is_emulated else {"alibi_slopes": slopes})
    first = on.run(q, k, v, return_lse=True, **rules)
    for _ in range(20 if on.kind == "gpu" else 2):  # emulated, under other schedules
        again = on.run(q, k, v, return_lse=True, **rules)
        assert [x.tobytes() for x in first] == [x.tobytes() for x in again]


@everywhere(*RULED)
@each("dtype", DTYPES, emulated=["bfloat16"])
@each("causal", [False, True, "top-left"], emulated=[True])
def test_batch_invariant(on: Place, causal: Any, dtype: str) -> None:
    """Alone, among others, and packed: one sequence, the same bits."""
    rules: dict[str, Any] = {
        "causal": causal,
        "batch_invariant": True,
        "return_lse": True,
        "window": (120, -1),
        "sink": np.linspace(-1, 1, 8, dtype=np.float32),
    }
    lengths = ((65, 200), (1, 700), (300, 20), (128, 128), (0, 9), (2, 64))
    if on.is_emulated:
        lengths = ((65, 200), (1, 300), (0, 9))
    (q, k, v), bounds = pack(lengths, heads=8, heads_kv=2, dtype=dtype)
    packed_o, packed_lse = on.run(q, k, v, **bounds, **rules)
    for n in range(len(lengths)):
        rows, keys = (slice(*x[n : n + 2]) for x in bounds.values())
        one = [
            np.ascontiguousarray(x[s].swapaxes(0, 1)[None])
            for x, s in ((q, rows), (k, keys), (v, keys))
        ]
        alone_o, alone_lse = on.run(*one, **rules)
        np.testing.assert_array_equal(packed_o[rows].swapaxes(0, 1), alone_o[0])
        np.testing.assert_array_equal(packed_lse[:, rows], alone_lse[0])
        others = [np.concatenate([x, x[::-1] * x.dtype.type(2), x, x, x]) for x in one]
        among_o, among_lse = on.run(*others, **rules)
        np.testing.assert_array_equal(among_o[[0, 2, 3, 4]], alone_o.repeat(4, 0))
        np.testing.assert_array_equal(among_lse[[0, 2, 3, 4]], alone_lse.repeat(4, 0))
