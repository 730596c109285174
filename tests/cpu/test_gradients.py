"""Gradients in NumPy: the oracle against finite differences, the tiled path against the oracle."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from cases_gradients import (
    Rules,
    asked,
    central_difference,
    check,
    extras,
    operands,
    random,
    run,
)
from cases_reference import CAUSAL, DTYPES, STRIDES, repeatable, strided, tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore_cupy import attention
from flashcore_cupy.backward import attention_backward
from flashcore_cupy.check import verify_gradients
from flashcore_cupy.cpu import reference, reference_gradients
from flashcore_cupy.cpu.reference import make_inputs
from flashcore_cupy.problem.gradients import INPUTS, Gradients
from flashcore_cupy.problem.rules import RULES

B, H, SQ, SKV = 2, 2, 4, 5
EXTRAS = extras(B, H, SQ, SKV)


def in_float64(**sizes: int) -> list[np.ndarray]:
    usual = {"batch": B, "heads": H, "seqlen": SQ, "seqlen_kv": SKV, "head_dim": 2, "head_dim_v": 3}
    return operands(dtype=np.float64, **(usual | sizes))


# --- the oracle -----------------------------------------------------------------------------------


def test_every_rule_is_tried() -> None:
    tried = {name for rules in EXTRAS.values() for name in rules}
    assert tried >= {rule.name for rule in RULES} - {"block_mask"}  # which has none yet
    assert {*INPUTS, "mod_args"} == {name[1:] for name in Gradients._fields}


@pytest.mark.parametrize("name", EXTRAS)
def test_the_oracle_is_the_slope_of_the_loss(name: str) -> None:
    """Central differences in float64, element by element, of o and of the log-sum-exp."""
    q, k, v = in_float64()
    do, dlse = random(B, H, SQ, 3, dtype=np.float64, seed=5), random(B, H, SQ, seed=6)
    rules = {n: as_float64(x) for n, x in EXTRAS[name].items()}
    inputs = {"q": q, "k": k, "v": v, **rules}
    found = reference_gradients.oracle(do, **inputs, dlse=dlse, wrt=asked(rules))
    assert set(found) == set(asked(rules))

    def loss(**changed: np.ndarray) -> float:
        o, lse = reference.oracle(**(inputs | changed))
        return float((o * do).sum() + (lse * dlse).sum(where=np.isfinite(lse)))

    for asked_for, got in found.items():
        expected = central_difference(lambda x, n=asked_for: loss(**{n: x}), inputs[asked_for])
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-9, err_msg=asked_for)


def as_float64(x: Any) -> Any:
    is_number = isinstance(x, np.ndarray) and x.dtype != np.bool_
    return x.astype(np.float64) if is_number else x


def test_roundings_are_of_what_is_added() -> None:
    """With one key, terms cancel: o is v, and P is 1, as exact as the log-sum-exp."""
    q, k, v = in_float64(seqlen_kv=1)
    do = random(B, H, SQ, 3, dtype=np.float64, seed=5)
    for factor in (1, 1000):
        exact = reference_gradients.oracle(do, q * factor, k, v)
        found = reference_gradients.roundings(do, q * factor, k, v)
        assert np.abs(exact["q"]).max() < 1e-15
        lse = np.abs(q * factor @ k.swapaxes(2, 3)) * 2**-0.5
        unit = 2.0**-22 * np.maximum(1, lse)
        terms = 2 * unit * (np.abs(do) @ np.abs(v).swapaxes(2, 3)) * np.abs(k) * 2**-0.5
        np.testing.assert_allclose(found["q"], terms, rtol=1e-12)
        values = (unit * np.abs(do)).sum((1, 2))[:, None, None]
        np.testing.assert_allclose(found["v"], values, rtol=1e-12)


# --- the rule of acceptance -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_accepted(dtype: Any) -> None:
    """Rounded once, the truth is right; an error of a few units in the last place is not."""
    q, k, v = operands(seqlen=70, seqlen_kv=90, heads=4, heads_kv=2, batch=2, dtype=dtype)
    do, dlse = random(2, 4, 70, 8, dtype=dtype, seed=5), random(2, 4, 70, seed=6)
    rules: Rules = {"sink": random(4) + 3, "bias": random(70, 90, dtype=dtype), "softcap": 2.0}
    wrt = asked(rules)
    expected = verify_gradients.expect(do, q, k, v, dlse=dlse, wrt=wrt, **rules)
    exact = {name: one.values for name, one in expected.each.items()}

    def faults(**changed: np.ndarray) -> str:
        rounded = {
            name: x.astype(np.float32 if name == "dsink" else dtype)
            for name, x in (exact | changed).items()
        }
        return expected.faults(Gradients(**rounded))

    assert faults() == ""
    wrong = {"float16": 2.0**-6, "bfloat16": 2.0**-3, "float32": 2.0**-16}[dtype.name]
    for name, x in exact.items():
        assert faults(**{name: x * (1 + wrong)}).startswith(f"{name}: max error")
        one = x.copy()
        one.flat[3] = np.nan
        assert faults(**{name: one}).startswith(f"{name}: 1 NaN or infinite values misplaced")
    mistakes: dict[str, dict[str, Any]] = {
        "no dlse": {},
        "no softcap": {"dlse": dlse, "softcap": 0.0},
        "no sink": {"dlse": dlse, "sink": np.full(4, -np.inf)},
        "no bias": {"dlse": dlse, "bias": np.zeros_like(rules["bias"])},
        "top-left": {"dlse": dlse, "causal": "top-left"},
    }
    for changes in mistakes.values():
        wrong = reference_gradients.oracle(do, q, k, v, wrt=wrt, **(rules | changes))
        assert all(faults(**{f"d{name}": wrong[name]}) for name in ("q", "k"))


# --- the tiled path -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXTRAS)
def test_every_rule_in_tiles(name: str, dtype: Any) -> None:
    batch, heads, seqlen, seqlen_kv = 2, 4, 37, 75
    rules = dict(extras(batch, heads, seqlen, seqlen_kv)[name])
    if "bias" in rules and name != "all":
        rules["bias"] = rules["bias"].astype(dtype)
    q, k, v = operands(heads, 2, seqlen, seqlen_kv, 16, 24, batch, dtype)
    with tiles(16, 64):
        got = check(q, k, v, dlse=random(batch, heads, seqlen, seed=6), **rules)
    inputs = {"q": q, "k": k, "v": v, **rules}
    for wanted in asked(rules):
        x = getattr(got, f"d{wanted}")
        assert x.shape == inputs[wanted].shape and x.dtype == inputs[wanted].dtype


LENGTHS = (1, 63, 64, 65, 127, 128, 129, 192)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_lengths_around_those_of_tiles(seqlen: int, causal: Any) -> None:
    for seqlen_kv in LENGTHS:
        with tiles(64, 64):
            check(*operands(1, 1, seqlen, seqlen_kv, 16, 16, dtype=np.float16), causal=causal)


@pytest.mark.parametrize(("seqlen", "seqlen_kv"), [(0, 0), (0, 5), (5, 0), (1, 1), (2, 1), (1, 2)])
def test_next_to_nothing(seqlen: int, seqlen_kv: int) -> None:
    for rules in ({}, {"causal": True}, {"sink": random(4)}, {"bias": random(1, 1)}):
        got = check(*operands(4, 2, seqlen, seqlen_kv, 4, 3, batch=2), **rules)
        assert all(np.isfinite(x).all() for x in got if x is not None)


@pytest.mark.parametrize("batch", [0, 1])
def test_no_batch(batch: int) -> None:
    got = run(*operands(batch=batch), bias=random(1, 1, 13))
    assert got.dq.shape == (batch, 2, 9, 8) and got.dbias.shape == (1, 1, 13)
    assert batch or not got.dbias.any()


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_grouped_heads_are_added(group: int) -> None:
    q, k, v = operands(2 * group, 2, 20, 30, 8, 8, batch=2)
    got = check(q, k, v)
    whole = run(q, np.repeat(k, group, 1), np.repeat(v, group, 1))
    for name in ("dk", "dv"):
        parts = getattr(whole, name).reshape(2, 2, group, 30, 8).sum(2)
        np.testing.assert_allclose(getattr(got, name), parts, atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(1, 1), (7, 64), (64, 7), (192, 128), (512, 1)]
)
def test_head_dims(head_dim: int, head_dim_v: int) -> None:
    with tiles(16, 64):
        check(*operands(2, 1, 33, 40, head_dim, head_dim_v), causal=True)


@pytest.mark.parametrize("kind", reference.INPUT_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_all_kinds(kind: Any, dtype: Any) -> None:
    inputs = make_inputs(
        kind, batch=1, heads=4, heads_kv=2, seqlen=130, seqlen_kv=200, head_dim=32, dtype=dtype
    )
    for causal in (False, True):
        check(*inputs, causal=causal)


def test_each_subset_of_gradients() -> None:
    """Each has the same bits, whatever else is asked for."""
    rules: Rules = {"bias": random(2, 9, 13), "sink": random(2), "alibi_slopes": random(2)}
    whole = run(*operands(), **rules)
    for names in [("q",), ("k",), ("v",), ("k", "q"), ("bias",), ("sink",), ("alibi_slopes", "v")]:
        got = run(*operands(), wrt=names, **rules)
        for field in Gradients._fields:
            x, y = getattr(got, field), getattr(whole, field)
            assert (x is None) if field[1:] not in names else x.tobytes() == y.tobytes()


def test_the_gradient_of_the_log_sum_exp_alone() -> None:
    q, k, v = operands()
    dlse, nothing = random(1, 2, 9, seed=6), np.zeros((1, 2, 9, 8), np.float32)
    got = check(q, k, v, do=nothing, dlse=dlse, sink=random(2))
    assert not got.dv.any() and got.dq.any()
    both = check(q, k, v, dlse=dlse, sink=random(2))
    without = check(q, k, v, sink=random(2))
    np.testing.assert_allclose(both.dq, got.dq + without.dq, atol=1e-5)


# --- where the arrays lie -------------------------------------------------------------------------


@pytest.mark.parametrize("how", STRIDES)
def test_any_strides(how: str) -> None:
    """Cut out of NaN, and written into NaN: neither gets in, nor is what lies around written."""
    q, k, v = operands(4, 2, 21, 34, 8, 16, batch=2)
    do, dlse = random(2, 4, 21, 16, seed=5), random(2, 4, 21, seed=6)
    plain = run(q, k, v, do=do, dlse=dlse)
    cut = [strided(x, how) for x in (do, q, k, v)]
    o, lse = attention(q, k, v, return_lse=True)
    per_row = [strided(x[..., None], how)[..., 0] for x in (lse, dlse)]
    out = [strided(np.zeros_like(x), how) for x in (q, k, v)]
    if how in ("every second", "reversed", "last axis first"):  # as the last axis of out may not be
        out = [strided(np.zeros_like(x), "padded") for x in (q, k, v)]
    around = [np.isnan(x.base) if x.base is not None else None for x in out]
    got = attention_backward(*cut, strided(o, how), per_row[0], dlse=per_row[1], out=tuple(out))
    for x, y in zip(got[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(x, y)
    for x, was_nan in zip(out, around, strict=True):
        assert was_nan is None or np.isnan(x.base)[was_nan].all()


def test_bshd_is_bhsd_turned() -> None:
    q, k, v = operands(4, 2, 21, 34, 8, 16, batch=2)
    do = random(2, 4, 21, 16, seed=5)
    turned = [x.transpose(0, 2, 1, 3) for x in (q, k, v, do)]
    got = check(*turned[:3], do=turned[3], layout="bshd", causal=True)
    for x, y in zip(got[:3], run(q, k, v, do=do, causal=True)[:3], strict=True):
        np.testing.assert_array_equal(x.transpose(0, 2, 1, 3), y)


def test_views_of_a_fused_projection() -> None:
    """q, k, v, and their gradients, side by side in one array each."""
    qkv, dqkv = random(2, 30, 3, 4, 8), np.full((2, 30, 3, 4, 8), np.nan, np.float32)
    q, k, v = (qkv[:, :, n] for n in range(3))
    out = tuple(dqkv[:, :, n] for n in range(3))
    got = check(q, k, v, layout="bshd", causal=True, out=out)
    assert all(x is y for x, y in zip(got, out, strict=False)) and np.isfinite(dqkv).all()


def test_broadcast_views_as_autograd_makes_them() -> None:
    q, k, v = operands()
    ones = np.broadcast_to(np.float32(1), (1, 2, 9, 8))
    per_row = np.broadcast_to(np.float32(0.5), (1, 2, 9))
    got = check(q, k, v, do=ones, dlse=per_row)
    again = run(q, k, v, do=ones.copy(), dlse=per_row.copy())
    assert all(x.tobytes() == y.tobytes() for x, y in zip(got[:3], again[:3], strict=True))


# --- torch's own derivatives of the formula -------------------------------------------------------


def by_torch(do: Any, q: Any, k: Any, v: Any, dlse: Any, rules: Rules) -> dict[str, np.ndarray]:
    """Differentiate the formula, all in float64, written with torch's own operations."""
    import torch

    inputs = {"q": q, "k": k, "v": v} | {n: rules[n] for n in asked(rules) if n not in "qkv"}
    leaves = {
        name: torch.tensor(x.astype(np.float64), requires_grad=True) for name, x in inputs.items()
    }
    group = q.shape[1] // k.shape[1]
    keys, values = (leaves[name].repeat_interleave(group, 1) for name in "kv")
    (_, _, n, d), m = q.shape, k.shape[2]
    scores = torch.einsum("bhid,bhjd->bhij", leaves["q"], keys) / d**0.5
    place = torch.arange(n)[:, None] + (0 if rules.get("causal") == "top-left" else m - n)
    away = place - torch.arange(m)[None]
    if rules.get("softcap"):
        scores = rules["softcap"] * torch.tanh(scores / rules["softcap"])
    if "alibi_slopes" in rules:
        slopes = leaves["alibi_slopes"]
        scores = (
            scores - (slopes if slopes.ndim == 2 else slopes[None])[..., None, None] * away.abs()
        )
    if "bias" in rules:
        scores = scores + leaves["bias"]
    left, right = rules.get("window", (-1, -1))
    hidden = (away < 0) & bool(rules.get("causal"))
    hidden = hidden | ((away > left) & (left >= 0)) | ((-away > right) & (right >= 0))
    if "mask" in rules:
        hidden = hidden | ~torch.tensor(rules["mask"])
    scores = scores.masked_fill(hidden, -np.inf)
    sink = leaves["sink"] if "sink" in rules else torch.full((q.shape[1],), -np.inf).double()
    sinks = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    everything = torch.cat([scores, sinks], -1)
    p = torch.softmax(everything, -1)[..., :-1]
    loss = (p @ values * torch.tensor(do.astype(np.float64))).sum()
    loss = loss + (torch.logsumexp(everything, -1) * torch.tensor(dlse)).sum()
    loss.backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("none", "causal", "causal at the top left", "window and causal", "softcap", "sink"),
        *("slopes of batches", "slopes at the top left", "bias of heads and keys", "bias, sink"),
        "softcap, slopes, causal",
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_agrees(name: str, dtype: Any) -> None:
    batch, heads, seqlen, seqlen_kv = 2, 4, 19, 33  # each query sees a key: torch has NaN else
    choices = extras(batch, heads, seqlen, seqlen_kv)
    choices["bias, sink"] = choices["bias"] | choices["sink"] | {"mask": choices["mask"]["mask"]}
    rules = choices[name]
    q, k, v = operands(heads, 2, seqlen, seqlen_kv, 8, 12, batch, dtype)
    do, dlse = random(batch, heads, seqlen, 12, dtype=dtype, seed=5), random(2, 4, 19, seed=6)
    expected = by_torch(do, q, k, v, dlse, rules)
    exact = reference_gradients.oracle(do, q, k, v, dlse=dlse, wrt=asked(rules), **rules)
    got = run(q, k, v, do=do, dlse=dlse, **rules)
    for wanted, x in expected.items():
        np.testing.assert_allclose(exact[wanted], x, rtol=1e-9, atol=1e-12)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * np.abs(x).max() + 1e-6}
        if dtype == np.float16:
            tolerance = {"rtol": 2e-2, "atol": 4e-3 * np.abs(x).max()}
        np.testing.assert_allclose(getattr(got, f"d{wanted}"), x, **tolerance)


# --- problems at random ---------------------------------------------------------------------------


@st.composite
def problems(draw: Any) -> tuple[dict[str, Any], Rules]:
    heads_kv = draw(st.integers(1, 2))
    heads, batch = heads_kv * draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seqlen, seqlen_kv = draw(st.integers(0, 80)), draw(st.integers(0, 150))
    dims = draw(st.sampled_from((1, 8, 33, 64))), draw(st.sampled_from((1, 16, 40)))
    dtype = draw(st.sampled_from(DTYPES))
    arrays = operands(heads, heads_kv, seqlen, seqlen_kv, *dims, batch, dtype)
    do = random(batch, heads, seqlen, dims[1], dtype=dtype, seed=5)
    rules: Rules = {"causal": draw(st.sampled_from(CAUSAL))}
    choices = extras(batch, heads, seqlen, seqlen_kv)
    for name in draw(st.lists(st.sampled_from(sorted(choices)), max_size=4, unique=True)):
        rules = choices[name] | rules
    rules["window"] = draw(st.tuples(st.integers(-1, 60), st.integers(-1, 60)))
    rules["layout"] = draw(st.sampled_from(("bhsd", "bshd")))
    if draw(st.booleans()):
        rules["dlse"] = random(batch, heads, seqlen, seed=6)
    views = [strided(x, draw(st.sampled_from(STRIDES))) for x in (do, *arrays)]
    if rules["layout"] == "bshd":
        views = [x.transpose(0, 2, 1, 3) for x in views]
    return dict(zip(("do", "q", "k", "v"), views, strict=True)), rules


@settings(repeatable, max_examples=100)
@given(problems(), st.sampled_from([(16, 64), (64, 64), (64, 1024)]))
def test_drawn_problems(problem: tuple[dict[str, Any], Rules], tile: tuple[int, int]) -> None:
    arrays, rules = problem
    with tiles(*tile):
        check(**arrays, **rules)
