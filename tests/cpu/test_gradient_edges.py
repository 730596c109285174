"""Gradients at the edges: NaN, rows and keys that see nothing, packed batches, parts of a whole."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cases_gradients import asked, bent, check, extras, operands, random, run, sees_some
from cases_reference import CAUSAL, DTYPES, tiles

from flashcore_cupy import attention
from flashcore_cupy.backward import attention_backward
from flashcore_cupy.cpu import parallel
from flashcore_cupy.problem.gradients import Gradients, by_result

NAN = float("nan")


def same_bits(x: Gradients, y: Gradients) -> bool:
    pairs = zip(x, y, strict=True)
    return all(
        (a is None) is (b is None) and (a is None or a.tobytes() == b.tobytes()) for a, b in pairs
    )


# --- what is hidden -------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_leaks_out_of_what_nobody_sees(dtype: Any, poison: float) -> None:
    """Keys that are hidden from all queries, and queries that see no key, hold what they like."""
    seqlen, seqlen_kv = 40, 150
    mask = np.random.default_rng(1).random((2, 2, seqlen, seqlen_kv)) > 0.5
    hidden, blind = np.s_[:, :, 60:75], np.s_[:, :, 7:12]
    mask[..., 60:75], mask[:, :, 7:12] = False, False
    rules = {"mask": mask, "bias": random(2, 2, seqlen, seqlen_kv), "softcap": 3.0}
    rules |= {"score_mod": bent, "alibi_slopes": random(2), "sink": random(2)}
    arrays = operands(2, 2, seqlen, seqlen_kv, 16, 8, 2, dtype)
    do, dlse = random(2, 2, seqlen, 8, dtype=dtype, seed=5), random(2, 2, seqlen, seed=6)
    with tiles(16, 64):
        clean = run(*arrays, do=do, dlse=dlse, **rules)
        q, k, v = (x.copy() for x in arrays)
        bias, do = rules["bias"].copy(), do.copy()
        k[hidden] = v[hidden] = q[blind] = do[blind] = poison
        bias[..., 60:75] = poison
        got = check(q, k, v, do=do, dlse=dlse, **(rules | {"bias": bias}))
    for x, y in zip(got[:6], clean[:6], strict=True):  # sums of what is seen go in another order
        np.testing.assert_allclose(*(z.astype(np.float32) for z in (x, y)), rtol=1e-5, atol=1e-5)
    assert not got.dk[hidden].any() and not got.dv[hidden].any() and not got.dq[blind].any()
    assert not got.dbias[blind].any() and not got.dbias[..., 60:75].any()


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_reaches_what_depends_on_it_and_no_more(name: str, causal: bool) -> None:
    q, k, v = operands(1, 1, 40, 40, 16, 16)
    given = {"q": q, "k": k, "v": v, "do": random(1, 1, 40, 16, seed=5)}
    given[name] = given[name].copy()
    given[name][0, 0, 21, 3] = NAN
    sees = np.tril(np.ones((40, 40), bool)) if causal else np.ones((40, 40), bool)
    if name in ("q", "do"):  # of a query: its own row, and the keys that it sees
        queries, keys = np.arange(40) == 21, sees[21]
    else:  # of a key: queries that see it, and what these see
        queries = sees[:, 21]
        keys = sees[queries].any(0)
    with tiles(16, 64):
        got = check(**given, causal=causal)
    np.testing.assert_array_equal(np.isnan(got.dq).any(-1)[0, 0], queries)
    np.testing.assert_array_equal(np.isnan(got.dk).any(-1)[0, 0], keys)
    np.testing.assert_array_equal(np.isnan(got.dv).any(-1)[0, 0], keys & (name != "v"))


def test_a_query_without_keys_has_its_sink_alone() -> None:
    """There lse is the sink, and o is 0: the sink gets dlse, and nothing gets anything else."""
    q, k, v = operands(2, 1, 6, 3)
    sink, dlse = random(2, seed=3), random(1, 2, 6, seed=6)
    o, lse = attention(q, k, v, return_lse=True, causal=True, sink=sink)
    assert not o[:, :, :3].any() and (lse[0, :, :3] == sink[:, None]).all()
    got = check(q, k, v, dlse=dlse, causal=True, sink=sink)
    assert not got.dq[:, :, :3].any()
    nothing = check(q[:, :, :3], k[:, :, :0], v[:, :, :0], dlse=dlse[:, :, :3], sink=sink)
    np.testing.assert_allclose(nothing.dsink, dlse[0, :, :3].sum(1), rtol=1e-6)


def test_sinks_of_no_weight() -> None:
    inputs = operands(seqlen=20)  # of which 7 see no key
    plain = run(*inputs, causal=True)
    got = check(*inputs, causal=True, sink=np.full(2, -np.inf, np.float32))
    assert same_bits(got._replace(dsink=None), plain) and not got.dsink.any()


def test_biases_that_hide() -> None:
    """-inf in a bias, or from a score_mod, is a weight of 0, for whole rows, too."""
    hides = np.random.default_rng(3).random((9, 13)) > 0.5
    hides[4] = True
    bias = np.where(hides, -np.inf, 0).astype(np.float32)
    got = check(*operands(), bias=bias)
    masked = run(*operands(), mask=~hides)
    for x, y in zip(got[:3], masked[:3], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert not got.dbias[hides].any() and not got.dq[:, :, 4].any()

    def mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return np.where(hides[i, j], -np.inf, score)

    assert same_bits(run(*operands(), score_mod=mod), got._replace(dbias=None))


# --- far away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1e-30, 1e-3, 1.0, 50.0, 1e8, 1e30, 3e38])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e3])
def test_softcaps_of_all_sizes(cap: float, factor: float) -> None:
    q, k, v = operands(1, 1, 20, 30, 16, 16)
    got = check(q * np.float32(factor), k, v, softcap=cap)
    assert all(np.isfinite(x).all() for x in got[:3])
    if cap >= 1e30:
        plain = run(q * np.float32(factor), k, v)
        for x, y in zip(got[:3], plain[:3], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_a_softcap_that_is_reached_leaves_next_to_no_gradient() -> None:
    """1 - tanh^2 is 4e-18 at 20 caps, which is no difference of floats."""
    q, k, v = (np.ones((1, 1, n, 1), np.float32) for n in (1, 2, 2))
    k[..., 1, :], v[..., 1, :] = -1, 2
    got = check(q * 20, k, v, softmax_scale=1.0, softcap=1.0, do=q)
    p = 1 / (1 + np.exp(-2.0))  # scores 1 and -1
    expected = 20 * p * (1 - p) * 4 * np.exp(-40.0)
    np.testing.assert_allclose(np.abs(got.dk), np.full((1, 1, 2, 1), expected), rtol=1e-5)


def test_large_numbers() -> None:
    """Scores of 1e4, values near float32's largest."""
    q, k, v = operands(1, 1, 30, 40, 16, 16)
    check(q * 100, k * 100, v)
    got = check(q, k, v * np.float32(1e37), do=random(1, 1, 30, 16, seed=5) * np.float32(1e-30))
    assert np.isfinite(got.dq).all() and np.abs(got.dq).max() > 1e5
    check(q, k, v, bias=np.float32([-500]))  # all scores far below those of keys that are not there


def test_beyond_the_inputs_dtype_is_infinity() -> None:
    q, k, v = operands(1, 1, 100, 1, dtype=np.float16)
    got = check(q, k, v, do=np.full((1, 1, 100, 8), 6e4, np.float16))
    assert np.isposinf(got.dv).all()


# --- packed batches -------------------------------------------------------------------------------

LENGTHS = (
    [(0, 0), (5, 9), (40, 0), (0, 7), (33, 70), (1, 1), (0, 0)],
    [(20, 20)],
    [(0, 5), (3, 0)],
)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda pairs: f"{len(pairs)} sequences")
@pytest.mark.parametrize("causal", CAUSAL)
def test_packed_sequences_are_those_of_single_calls(lengths: Any, causal: Any) -> None:
    count, heads = len(lengths), 4
    at_q, at_k = (np.cumsum([0, *x]) for x in zip(*lengths, strict=True))
    q, k, v = (
        random(n, h, 8, seed=seed)
        for seed, (n, h) in enumerate([(at_q[-1], heads), (at_k[-1], 2), (at_k[-1], 2)])
    )
    do, dlse = random(at_q[-1], heads, 8, seed=5), random(heads, at_q[-1], seed=6)
    rules = {"alibi_slopes": random(count, heads, seed=7), "sink": random(heads), "causal": causal}
    rules |= {"score_mod": bent, "mask_mod": sees_some, "window": (30, -1), "softcap": 4.0}
    got = check(q, k, v, do=do, dlse=dlse, cu_seqlens_q=at_q, cu_seqlens_k=at_k, **rules)
    sinks = np.zeros(heads)
    for n, (rows, keys) in enumerate(zip(pairwise(at_q), pairwise(at_k), strict=True)):
        rows, keys = slice(*rows), slice(*keys)
        one = [x[s].swapaxes(0, 1)[None] for x, s in ((q, rows), (k, keys), (v, keys), (do, rows))]
        own = {"alibi_slopes": rules["alibi_slopes"][n], "score_mod": _of_sequence(bent, n)}
        alone = run(*one[:3], do=one[3], dlse=dlse[None, :, rows], **(rules | own))
        for name, s in (("dq", rows), ("dk", keys), ("dv", keys)):
            np.testing.assert_array_equal(
                getattr(got, name)[s], getattr(alone, name)[0].swapaxes(0, 1)
            )
        np.testing.assert_allclose(got.dalibi_slopes[n], alone.dalibi_slopes, rtol=1e-6)
        sinks += alone.dsink
    np.testing.assert_allclose(got.dsink, sinks, atol=1e-5)


def _of_sequence(mod: Any, number: int) -> Any:
    return lambda score, b, *at: mod(score, number, *at)


# --- parts of a whole -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_keys_add_up(dtype: Any) -> None:
    """As in a ring of GPUs: o and lse are of all keys, each call has some of them."""
    q, k, v = operands(4, 2, 30, 90, 8, 8, 2, dtype)
    bias, dlse = random(4, 1, 90), random(2, 4, 30, seed=6)
    do = random(2, 4, 30, 8, dtype=dtype, seed=5)
    whole = check(q, k, v, do=do, dlse=dlse, bias=bias)
    o, lse = attention(q, k, v, bias=bias, return_lse=True)
    out = {f"d{n}": np.zeros(x.shape, np.float32) for n, x in (("q", q), ("k", k), ("v", v))}
    for keys in (slice(0, 20), slice(20, 64), slice(64, 90)):
        some = out | {name: out[name][:, :, keys] for name in ("dk", "dv")}
        arguments = {"bias": bias[..., keys], "out": some, "accumulate": True, "dlse": dlse}
        got = attention_backward(do, q, k[:, :, keys], v[:, :, keys], o, lse, **arguments)
        assert got.dq is out["dq"] and got.dk is some["dk"]
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 3e-6}[np.dtype(dtype).name]
    for name, x in out.items():
        wanted = getattr(whole, name).astype(np.float32)
        np.testing.assert_allclose(x, wanted, rtol=tolerance, atol=tolerance)


def test_adding_to_every_gradient() -> None:
    rules = {"bias": random(9, 13), "sink": random(2), "alibi_slopes": random(2)}
    once = run(*operands(), **rules)
    start = {name: random(*x.shape, seed=4) for name, x in by_result(once).items()}
    out = {name: x.copy() for name, x in start.items()}
    got = run(*operands(), out=out, accumulate=True, **rules)
    for name, x in by_result(got).items():
        assert x is out[name]
        np.testing.assert_allclose(x, start[name] + getattr(once, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["none", "bias of one number", "slopes", "slopes of batches", "all"]
)
def test_same_bits_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rules = extras(2, 4, 50, 130)[name]
    inputs = operands(4, 2, 50, 130, 16, 16, 2)
    results = []
    for cores in (1, 2, 3, 8):
        monkeypatch.setattr(parallel, "cores", lambda n=cores: n)
        with tiles(16, 64):
            results += [run(*inputs, **rules) for _ in range(2)]
    assert all(same_bits(results[0], other) for other in results)


def test_memory_grows_with_the_lengths_and_not_with_their_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: 1)
    peaks = []
    for seqlen in (1024, 4096):
        inputs = operands(1, 1, seqlen, seqlen, 16, 16, dtype=np.float16)
        tracemalloc.start()
        run(*inputs, causal=True, softcap=5.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4 * peaks[0] and peaks[1] < 4096 * 4096


def test_results_of_another_dtype() -> None:
    """Any of them in float32, of 16-bit inputs: what is rounded in the inputs' dtype."""
    inputs = operands(dtype=np.float16)
    bias = random(9, 13, dtype=np.float16)
    plain = run(*inputs, bias=bias)
    out = {
        name: np.empty(x.shape, np.float32) for name, x in plain._asdict().items() if x is not None
    }
    got = check(*inputs, bias=bias, out=out)
    for name in out:
        np.testing.assert_array_equal(getattr(got, name).astype(np.float16), getattr(plain, name))
    assert asked({"bias": bias}) == ("q", "k", "v", "bias")
