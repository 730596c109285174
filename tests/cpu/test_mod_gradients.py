"""Gradients of mod_args on NumPy arrays, and which arrays have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_gradients import NOT_OF_THE_ORACLE, Rules, central_difference, operands, random
from cases_reference import tiles

from flashcore_cupy import attention, attention_backward, explain_backward
from flashcore_cupy.check import verify_gradients
from flashcore_cupy.cpu import reference, reference_gradients
from flashcore_cupy.problem.gradients import Gradients, by_result, gathered
from flashcore_cupy.problem.mod_elements import indices

B, H, SQ, SKV = 2, 4, 5, 7
Mod = Callable[..., Any]

#: Formulas of arrays x (H,), y (B, H) and w (3,); an index may be any function of b and h.
MODS: dict[str, Mod] = {
    "added": lambda s, b, h, i, j, x, y, w: s + x[h] * (j - i),
    "a factor": lambda s, b, h, i, j, x, y, w: s * y[b, h],
    "one for all": lambda s, b, h, i, j, x, y, w: w[0] + s * w[2] + w[2] * w[2] * j,
    "affine": lambda s, b, h, i, j, x, y, w: s * x[3 - h] + w[2 * b] * np.sin(s),
    "any index": lambda s, b, h, i, j, x, y, w: s * x[h // 2] + y[b][(h * h) % 4] * i,
    "from behind": lambda s, b, h, i, j, x, y, w: s * x[-1] + y[-1, h] * i * j,
    "the same twice": lambda s, b, h, i, j, x, y, w: s * x[h] + x[h % 2] * x[0] * j,
    "bent": lambda s, b, h, i, j, x, y, w: np.where(i > j, np.tanh(x[h] * s), s + np.exp(w[1])),
    "in place": lambda s, b, h, i, j, x, y, w: in_place(s, x[h], y[b, 1] * (j > 2)),
    "of the shape": lambda s, b, h, i, j, x, y, w: s * x[h] * (len(x) + y.shape[0] + w.size),
    "no use": lambda s, b, h, i, j, x, y, w: s * 2,
    "a branch": lambda s, b, h, i, j, x, y, w: s * x[h] if abs(w[0]) > 0 and h else s,
}
RULES: dict[str, Rules] = {
    "alone": {},
    "causal": {"causal": True, "sink": random(H, seed=9)},
    "behind others": {"softcap": 0.9, "bias": random(SQ, SKV, seed=12)},
    "dropout": {"dropout_p": 0.3, "rng": (5, 2), "window": (3, 2)},
    "a mask of one": {"mask_mod": lambda b, h, i, j, x, y, w: (j + i > 2) | (x[h] > 1)},
}
WRT = ("mod_args.x", "mod_args.y", "mod_args.w")


def in_place(score: Any, x: Any, y: Any) -> Any:
    score *= x
    score += y
    return score


def arrays(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    shapes = {"x": (H,), "y": (B, H), "w": (3,)}
    return {n: random(*s, seed=20 + i).astype(dtype) for i, (n, s) in enumerate(shapes.items())}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODS)
def test_the_oracle_is_the_slope_of_the_loss(name: str, rule: str) -> None:
    """Central differences in float64, element by element."""
    q, k, v = operands(H, 2, SQ, SKV, 2, 3, B, np.float64)
    do, dlse = random(B, H, SQ, 3, dtype=np.float64, seed=5), random(B, H, SQ, seed=6)
    given = {"score_mod": MODS[name], **RULES[rule]}
    mod_args = arrays(np.float64)
    found = reference_gradients.oracle(
        do, q, k, v, dlse=dlse, wrt=("q", *WRT), mod_args=mod_args, **given
    )

    def loss(mod_args: dict[str, np.ndarray]) -> float:
        o, lse = reference.oracle(q, k, v, mod_args=mod_args, **given)
        return float((o * do).sum() + (lse * dlse).sum(where=np.isfinite(lse)))

    for array, x in mod_args.items():
        expected = central_difference(lambda x, n=array: loss(mod_args | {n: x}), x)
        got = found[f"mod_args.{array}"]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=5e-9, err_msg=array)


def run(wrt: Any = WRT, sizes: Any = (H, 2, 37, 75, 16, 24, B), **arguments: Any) -> Gradients:
    """Forward and backward, judged against the oracle."""
    *sizes, dtype = (*sizes, np.float16) if len(sizes) < 8 else sizes
    q, k, v = operands(*sizes, dtype)
    forward = {n: x for n, x in arguments.items() if n not in ("out", "score_mod_grad")}
    o, lse = attention(q, k, v, return_lse=True, **forward)
    do = random(*o.shape, dtype=dtype, seed=5)
    got = attention_backward(do, q, k, v, o, lse, wrt=wrt, **arguments)
    asks = {n: x for n, x in arguments.items() if n not in NOT_OF_THE_ORACLE}
    faults = verify_gradients.expect(do, q, k, v, wrt=wrt, **asks).faults(got)
    assert not faults, faults
    return got


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_in_tiles(name: str, dtype: Any) -> None:
    mod_args, wrt = arrays(dtype), ("q", "v", *WRT)
    with tiles(16, 64):
        got, again = (run(wrt, score_mod=MODS[name], mod_args=mod_args) for _ in range(2))
    assert list(got.dmod_args) == ["x", "y", "w"] and got.dk is None
    for array, x in mod_args.items():
        found = got.dmod_args[array]
        assert found.shape == x.shape and found.dtype == x.dtype
        assert found.tobytes() == again.dmod_args[array].tobytes()
    assert any(x.any() for x in got.dmod_args.values()) == (name != "no use")


def test_what_nobody_reads_has_zeros() -> None:
    got = run(("mod_args.w",), score_mod=MODS["one for all"], mod_args=arrays())
    assert (
        got.dmod_args["w"][1] == 0 and got.dmod_args["w"][2] != 0 and list(got.dmod_args) == ["w"]
    )
    assert got.dq is None


def test_an_array_without_axes_of_its_own() -> None:
    arguments = {"score_mod": lambda s, b, h, i, j, x: s * x[()], "mod_args": {"x": np.array(2.0)}}
    assert run(("mod_args.x",), **arguments).dmod_args["x"].shape == ()


def test_batches_of_a_packed_call() -> None:
    q, k, v = (random(30, 2, 8, seed=n) for n in range(3))
    starts = np.array([0, 12, 12, 30], np.int32)
    rules: Rules = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    rules |= {
        "score_mod": lambda s, b, h, i, j, x: s * x[b] + x[0] * j,
        "mod_args": {"x": random(3)},
    }
    o, lse = attention(q, k, v, return_lse=True, **rules)
    do = random(*o.shape, seed=5)
    got = attention_backward(do, q, k, v, o, lse, wrt=("mod_args.x",), **rules)
    expected = verify_gradients.expect(do, q, k, v, wrt=("mod_args.x",), **rules)
    assert not expected.faults(got) and got.dmod_args["x"][1] == 0


def test_bshd() -> None:
    q, k, v = (x.swapaxes(1, 2) for x in operands(H, 2, 9, 13, 8, 8, B))
    rules: Rules = {"score_mod": MODS["added"], "mod_args": arrays()}
    do = random(*q.shape, seed=5)
    turned = [attention(q, k, v, layout="bshd", return_lse=True, **rules)]
    (o, lse) = turned[0]
    got = attention_backward(do, q, k, v, o, lse, layout="bshd", wrt=WRT, **rules)
    faults = verify_gradients.expect(do, q, k, v, layout="bshd", wrt=WRT, **rules).faults(got)
    assert not faults, faults


def test_a_derivative_by_the_score_that_is_given() -> None:
    rules: Rules = {"score_mod": MODS["bent"], "mod_args": arrays()}
    plain = run(("mod_args.x", "q"), **rules)
    q, k, v = operands(H, 2, 37, 75, 16, 24, B, np.float16)
    o, lse = attention(q, k, v, return_lse=True, **rules)
    do = random(*o.shape, dtype=np.float16, seed=5)
    wrt = ("mod_args.x", "q")
    given = attention_backward(
        do, q, k, v, o, lse, wrt=wrt, score_mod_grad=lambda s, *at, **x: s * 0, **rules
    )
    np.testing.assert_array_equal(plain.dmod_args["x"], given.dmod_args["x"])
    assert plain.dq.any() and not given.dq.any()


# --- where results go -----------------------------------------------------------------------------


def test_results_that_are_given() -> None:
    rules: Rules = {"score_mod": MODS["a factor"], "mod_args": arrays(np.float16)}
    wrt = ("q", "mod_args.y")
    plain = run(wrt, **rules)
    room = np.full((B, H), np.nan, np.float32)
    for out in (
        {"dmod_args": {"y": room}},
        Gradients(dmod_args={"y": room}),
        (None, room),
        {"dmod_args.y": room},
    ):
        room[:] = np.nan
        got = run(wrt, out=out, **rules)
        assert got.dmod_args["y"] is room and got.dq is not None
        np.testing.assert_array_equal(room.astype(np.float16), plain.dmod_args["y"])


def test_they_are_added_to() -> None:
    """By parts of the keys, in float32."""
    rules: Rules = {"mod_args": arrays()}
    q, k, v = operands(H, 2, 9, 13, 8, 8, B)
    o, lse = attention(q, k, v, score_mod=MODS["added"], return_lse=True, **rules)
    do = random(*o.shape, seed=5)
    wanted = verify_gradients.expect(do, q, k, v, wrt=WRT, score_mod=MODS["added"], **rules)
    sums = {name: np.full(x.shape, 3, np.float32) for name, x in arrays().items()}
    for keys in (slice(0, 4), slice(4, 13)):
        attention_backward(
            *(do, q, k[:, :, keys], v[:, :, keys], o, lse),
            wrt=WRT, out={"dmod_args": sums}, accumulate=True,
            score_mod=lambda s, b, h, i, j, first=keys.start, **x: MODS["added"](
                s, b, h, i, j + first, **x
            ),
            **rules,
        )  # fmt: skip
    found = gathered({f"dmod_args.{name}": x - 3 for name, x in sums.items()})
    assert not wanted.faults(found) and (sums["y"] == 3).all()


def test_names_of_results() -> None:
    found = Gradients(dq=1, dmod_args={"x": 2, "y": None})
    assert by_result(found) == {"dq": 1, "dmod_args.x": 2}
    assert gathered(by_result(found)) == Gradients(dq=1, dmod_args={"x": 2})
    assert gathered({"dk": 1}).dmod_args is None


# --- what has none --------------------------------------------------------------------------------

GOOD_INDICES = {
    "score * x[h]": ("h",),
    "x[0] + x[ 2 * h\n + 1 ] * score - x[0]": ("0", "2 * h + 1"),
    "score + x[b * 4 + h] /* x[kv_idx] */ // x[q_idx]\n": ("b * 4 + h",),
    "score + x[h % 2u]*yx[kv_idx] + x2[q_idx] + 1.0f*x [(h)]": ("h % 2u", "(h)"),
    "score": (),
}
WORKS = "; index it by b, h and integers, give what differs by query or key as bias=, or "
UNKNOWN = "whose gradient is not known, because of"
BAD_INDICES = {
    "score + x[kv_idx]": f"score_mod reads x[kv_idx], {UNKNOWN} kv_idx",
    "score + x[h + q_idx]": f"score_mod reads x[h + q_idx], {UNKNOWN} q_idx",
    "score + x[y[h]]": f"score_mod reads x[y[h]], {UNKNOWN} y",
    "score * x[int(score)]": f"score_mod reads x[int(score)], {UNKNOWN} int",
    "score + *x.data": "score_mod uses it whole",
    "score + f(x)": "score_mod uses it whole",
}


@pytest.mark.parametrize("text", GOOD_INDICES)
def test_indices_of_an_expression(text: str) -> None:
    assert indices(text, "x") == GOOD_INDICES[text]


@pytest.mark.parametrize("text", BAD_INDICES)
def test_indices_that_have_no_gradient(text: str) -> None:
    q, k, v = operands()
    rules: Rules = {"score_mod": text, "mod_args": {"x": random(20), "y": np.arange(2)}}
    with pytest.raises(ValueError) as caught:
        attention_backward(
            q, q, k, v, q, random(1, 2, 9), wrt=("mod_args.x",), kernel="bwd_sm80", **rules
        )
    assert str(caught.value).startswith(f"mod_args['x']: {BAD_INDICES[text]}{WORKS}")
    # Without that gradient nobody minds.
    explain_backward(q, q, k, v, q, random(1, 2, 9), kernel="bwd_sm80", **rules)


_X = {"x": random(20)}


def factor(s: Any, b: Any, h: Any, i: Any, j: Any, x: Any) -> Any:
    return s * x[0]


REFUSED: dict[str, tuple[Any, Rules, type[Exception], str]] = {
    "by the key": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s + x[j]}, ValueError,
        "mod_args['x']: score_mod reads it at an array of shape (1, 13), where its gradient is not "
        "known" + WORKS,
    ),
    "by query and key": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s + x[(i + j) % 20]}, ValueError,
        "mod_args['x']: score_mod reads it at an array of shape (9, 13)",
    ),
    "a slice": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s + x[:1]}, ValueError,
        "mod_args['x']: score_mod reads it at slice",
    ),
    "whole": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s + x, "mod_args": {"x": random(1)}}, TypeError,
        "score_mod: its derivative by mod_args is not known, because of mod_args['x'], which it "
        "uses whole",
    ),
    "its sum": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s + x.sum()}, TypeError,
        "score_mod: its derivative by mod_args is not known, because of mod_args['x'].sum",
    ),
    "a plain array": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s + np.asarray(x)[h]}, TypeError,
        "score_mod: its derivative by mod_args is not known, because of mod_args['x']",
    ),
    "integers": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s + x[h], "mod_args": {"x": np.arange(3)}},
        TypeError, "mod_args['x']: got dtype int64, which has no gradient; use one of float16, ",
    ),
    "of a mask": (
        "x", {"mask_mod": lambda b, h, i, j, x: j > x[h]}, ValueError,
        "mod_args['x']: has no gradient without a score_mod, which may use it",
    ),
    "another name": (
        "y", {"score_mod": lambda s, b, h, i, j, x: s}, ValueError,
        "wrt: asks for the gradient of mod_args.y, which is not given",
    ),
    "out of nothing": (
        "x", {"score_mod": factor, "out": {"dmod_args": [1]}}, TypeError,
        "out.dmod_args: got",
    ),
    "out of another shape": (
        "x", {"score_mod": factor, "out": {"dmod_args": {"x": random(3)}}},
        ValueError, "out.dmod_args.x: got shape (3,)",
    ),
    "out of another array": (
        "x", {"score_mod": factor, "out": {"dmod_args": {"y": random(3)}}},
        ValueError, "out: has 'dmod_args.y'; wrt asks for dmod_args.x",
    ),
    "out with gaps": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s * x[0, 0],
              "mod_args": {"x": random(2, 3)}, "out": {"dmod_args": {"x": random(3, 2).T}}},
        ValueError, "out.dmod_args.x: its last axis is not contiguous",
    ),
    "out of padded rows": (
        "x", {"score_mod": lambda s, b, h, i, j, x: s * x[0, 0],
              "mod_args": {"x": random(2, 3)}, "out": {"dmod_args": {"x": random(2, 4)[:, :3]}}},
        ValueError, "out.dmod_args.x: it is not C-contiguous (strides (16, 4) bytes)",
    ),
    "the array as out": (
        "x", {"score_mod": factor, "mod_args": _X,
              "out": {"dmod_args": _X}},
        ValueError, "out.dmod_args.x: overlaps mod_args['x'] in memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    array, rules, error, message = REFUSED[name]
    rules = {"mod_args": _X} | rules
    q, k, v = operands()
    forward = {n: x for n, x in rules.items() if n != "out"}
    o, lse = attention(q, k, v, return_lse=True, **forward)
    with pytest.raises(error) as caught:
        attention_backward(q, q, k, v, o, lse, wrt=(f"mod_args.{array}",), **rules)
    assert str(caught.value).startswith(message)


def test_names_in_wrt() -> None:
    q, k, v = operands()
    rest: Rules = {"score_mod": MODS["added"], "mod_args": arrays()}
    for wrt, message in {
        ("mod_args",): "wrt: got 'mod_args'; choose some of 'q', 'k', 'v',",
        ("mod_args.x", "mod_args.x"): "wrt: got ('mod_args.x', 'mod_args.x'); name each input once",
    }.items():
        with pytest.raises(ValueError) as caught:
            attention_backward(q, q, k, v, q, random(1, 2, 9), wrt=wrt, **rest)
        assert str(caught.value).startswith(message)


def test_hopper_s_kernel_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashcore_cupy.cpu.host_gradients.target_without_gpu", lambda: "sm_90a")
    q, k, v = operands(H, 2, 64, 64, 64, 64, B, np.float16)
    rules: Rules = {"score_mod": "score * x[h]", "mod_args": arrays()}
    given = (q, q, k, v, q, random(B, H, 64))
    assert "bwd_sm90" in explain_backward(*given, kernel="bwd_sm90", **rules)
    with pytest.raises(ValueError, match="has no gradients of mod_args"):
        explain_backward(*given, kernel="bwd_sm90", wrt=("q", "mod_args.x"), **rules)
    assert "bwd_sm80" in explain_backward(*given, kernel="bwd_sm80", wrt=("mod_args.x",), **rules)
