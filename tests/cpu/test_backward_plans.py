"""Plans, explanations and gates of gradients on NumPy arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_gradients import bent, operands, random
from cases_rules import ASKED
from drawn_blocks import RULE, Drawn, drawn

import flashcore_cupy
from flashcore_cupy import attention
from flashcore_cupy.backward import attention_backward, explain_backward, plan_backward
from flashcore_cupy.check import verify, verify_backward
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.problem.attention_problem import AttentionProblem, contiguous_problem
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.gradients import contiguous_gradients
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.select.backward import select_backward

SIZES = {"heads": 4, "heads_kv": 2, "seqlen": 33, "seqlen_kv": 47, "batch": 2}


def arrays(dtype: Any = np.float16, **rules: Any) -> dict[str, np.ndarray]:
    q, k, v = operands(**SIZES, dtype=dtype)
    o, lse = attention(q, k, v, return_lse=True, **rules)
    return {"do": random(*o.shape, dtype=dtype, seed=5), "q": q, "k": k, "v": v, "o": o, "lse": lse}


# --- explanations and plans -----------------------------------------------------------------------


def test_an_explanation_says_what_a_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_80")
    given = arrays()
    said = explain_backward(**given)
    assert said == "NumPy arrays: tiled gradients on the CPU, fp32 accumulation"
    given["do"] = np.broadcast_to(np.float16(1), given["do"].shape)
    lines = explain_backward(**given, kernel="bwd_sm80", wrt=("k",)).splitlines()
    assert lines[0].startswith("bwd_sm80 on sm_80, dk, dv: 128x32 tile, 4 warps")
    assert lines[1] == "NumPy arrays: emulated on the CPU"
    assert lines[2].startswith("copied do: ") and len(lines) == 3
    assert flashcore_cupy.explain_backward is explain_backward


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no o": ({"o": None}, TypeError, "o: got NoneType"),
    "wrt": ({"wrt": "q"}, TypeError, "wrt: got 'q'"),
    "a rule": ({"window": (1,)}, ValueError, "window: got"),
    "a gate": ({"gate": "pv"}, ValueError, "gate: got 'pv'"),
    "out": ({"out": {"dk": np.zeros(3, np.float16)}}, ValueError, "out.dk: got shape"),
    "a kernel of the forward pass": ({"kernel": "mma_sm80"}, ValueError, "kernel: got 'mma_sm80'"),
    "a kernel that cannot": (
        {
            "kernel": "bwd_sm90",
            "mod_args": {"x": np.ones(47, np.float32)},
            "wrt": ("mod_args.x",),
            "score_mod": "score * x[h]",
        },
        ValueError,
        "kernel 'bwd_sm90': ",
    ),
    "a tile": ({"kernel": "bwd_sm80", "config": {"block_k": 3}}, ValueError, "config: unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_call_refuses_is_not_explained_or_planned(name: str) -> None:
    arguments, error, message = REFUSED[name]
    for function in (attention_backward, explain_backward, plan_backward):
        given = arrays() | {"kernel": "bwd_sm80"} | arguments
        with pytest.raises(error) as raised:
            function(**given)
        assert str(raised.value).startswith(message)


def test_names_of_no_argument_are_told_from_the_function() -> None:
    for function in (explain_backward, plan_backward):
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) has no argument 'is_caus"):
            function(**arrays(), is_causal=True)
    with pytest.raises(TypeError, match=r"plan_backward\(\) has no argument 'stream'"):
        plan_backward(**arrays(), stream=None)


def test_a_plan_on_numpy_arrays_is_of_a_kernel() -> None:
    with pytest.raises(TypeError, match="kernel='bwd_sm80', that is emulated on NumPy arrays"):
        plan_backward(**arrays())
    out = {"dv": np.full((2, 2, 47, 8), np.nan, np.float16)}
    bound = plan_backward(**arrays(), kernel="bwd_sm80", wrt=("v",), out=out, causal=True)
    assert bound.gradients.dv is out["dv"] and bound.gradients.dq is None
    names = [config.source for config in bound.selection.configs]
    assert names == ["bwd_rows.cu", "bwd_sm80.cu"]


# --- lists of a block mask ------------------------------------------------------------------------


def listed_plan(
    kernel: str,
    seqlens: tuple[int, int],
    block: tuple[int, int],
    lists: tuple[int, int],
    **rules: Any,
) -> tuple[Any, Drawn]:
    """A plan of gradients, and the mask that it has."""
    rng = np.random.default_rng(4)
    draw = drawn(rng, seqlens, block, lists, unseen=1)
    made = draw.mask(np, rng, stray=True)
    sizes = SIZES | {"seqlen": seqlens[0], "seqlen_kv": seqlens[1]}
    q, k, v = operands(**sizes, dtype=np.float16)
    o, lse = np.zeros_like(q), np.zeros(q.shape[:3], np.float32)
    given = {"do": o, "q": q, "k": k, "v": v, "o": o, "lse": lse}
    return plan_backward(**given, block_mask=made, kernel=kernel, **rules), draw


def test_lists_are_made_right_before() -> None:
    bound, _ = listed_plan("bwd_sm80", (300, 333), (64, 128), (2, 4), mask_mod=RULE)
    found = [(step.entry, step.grid) for step in bound.steps]
    blocks_of_keys, blocks_of_queries = -(-333 // 128), -(-300 // 128)
    assert found == [
        ("bwd_rows", found[0][1]),
        ("tile_lists", 8 * blocks_of_keys),
        ("tile_lists", 8 * blocks_of_queries),
        ("bwd_sm80", 4 * blocks_of_keys),
        ("bwd_sm80", 8 * blocks_of_queries),
    ]
    bound, _ = listed_plan("bwd_sm90", (300, 333), (64, 128), (2, 1), mask_mod=RULE)
    found = [(step.entry, step.grid) for step in bound.steps]
    assert found[1:] == [("tile_lists", 6), ("tile_lists", 6), ("bwd_sm90", 12), ("bwd_sm90", 24)]
    bias = np.zeros((4, 300, 333), np.float16)
    bound, _ = listed_plan(
        "bwd_sm80", (300, 333), (64, 128), (1, 1), mask_mod=RULE, bias=bias, wrt=("bias", "k")
    )
    assert [step.entry for step in bound.steps] == [
        *("bwd_rows", "tile_lists", "tile_lists", "bwd_sm80", "bwd_sm80_bias")
    ]
    assert [step.params["m_blocks"] for step in bound.steps[1:3]] == [3, 3]


LISTS = ASKED["blocks"]["block_mask"]
#: Head dims, what is beside a block mask, and the kernel that its gradients get.
CHOSEN = {
    "alone": (64, {}, "bwd_sm90"),
    "wider": (128, {"softcap": 2.0}, "bwd_sm90"),
    "a rule of mixed blocks": (64, {"mask_mod": "kv_idx != 3"}, "bwd_sm90"),
    "wide heads": (192, {}, "bwd_sm80"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_which_kernel_a_block_mask_gets(name: str) -> None:
    dim, rules, kernel = CHOSEN[name]
    plain = contiguous_problem(1, 2, 64, dim, dtype="float16")
    described = describe_rules(ScoreShape(1, 2, 64, 64), "float16", block_mask=LISTS, **rules)
    got = select_backward(contiguous_gradients(replace(plain, rules=described)), "sm_90a")
    assert got.name == kernel and got.keys is not None
    assert got.queries is not None and got.scale is None, "two passes"
    told = [line for line in got.explained("sm_90a") if line.startswith("block mask: ")]
    assert len(told) == 2


@pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or "")
@pytest.mark.parametrize("block", [(64, 128), (128, 64)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("kernel", "lists"), [("bwd_sm80", (1, 2)), ("bwd_sm90", (2, 4))])
def test_what_lists_hold(
    block: tuple[int, int], causal: bool, kernel: str, lists: tuple[int, int]
) -> None:
    """Tiles that have a block which is not empty, but for those that all positions hide."""
    seqlens = 300, 333
    bound, draw = listed_plan(kernel, seqlens, block, lists, mask_mod=RULE, causal=causal)
    bound.launch()
    i, j = np.ogrid[:300, :333]
    near = (j <= i + 33) if causal else np.ones(seqlens, bool)
    states = draw.elements(1) + 2 * draw.elements(2)
    for name, config in (("keys", bound.selection.keys), ("queries", bound.selection.queries)):
        own, other = config.tile.block_m, config.tile.block_n
        entries = bound.arrays[f"{name}_tile_entries"].view(np.uint32)
        counts = bound.arrays[f"{name}_tile_counts"].view(np.int32)
        for at in np.ndindex(counts.shape):
            of_head, seen, own_block = states[at[:2]], near, block[0]
            if name == "keys":
                of_head, seen, own_block = of_head.T, near.T, block[1]
            first = at[2] * own
            rows = of_head[first : first + own], seen[first : first + own]
            met = np.flatnonzero(rows[1].any(axis=0)) // other
            wanted = []
            for tile in range(met.min(), met.max() + 1) if len(met) else ():
                of_tile = rows[0][:, tile * other : (tile + 1) * other]
                assert (of_tile == of_tile[:, :1]).all(), "a tile of the other side is of one block"
                blocks = [
                    (nth, int(of_tile[n * own_block - first if n * own_block > first else 0, 0]))
                    for nth, n in enumerate(
                        range(first // own_block, -(-(first + len(of_tile)) // own_block))
                    )
                ]
                if any(state for _, state in blocks):
                    wanted.append((tile, [state for _, state in blocks]))
            got = []
            for word, bits in entries[at][: counts[at]]:
                own_states = [int(bits) >> 8 * n & 3 for n in range(4)]
                got.append(
                    (int(word) & 2**31 - 1, own_states[: len(wanted[0][1]) if wanted else 0])
                )
            assert got == wanted, (name, at)


# --- gates ----------------------------------------------------------------------------------------


def scores_and_visible(given: dict[str, np.ndarray], *, causal: bool) -> tuple[Any, Any]:
    k = given["k"].astype("f8").repeat(2, axis=1)
    scores = given["q"].astype("f8") @ k.swapaxes(2, 3) / np.sqrt(8)
    i, j = np.indices(scores.shape[2:])
    seen = j <= i + 47 - 33 if causal else np.ones(scores.shape[2:], bool)
    return scores, np.broadcast_to(seen, scores.shape)


@pytest.mark.parametrize("causal", [False, True])
def test_dp_and_ds(causal: bool) -> None:
    given = arrays(causal=causal) | {"dlse": random(2, 4, 33, seed=9)}
    scores, seen = scores_and_visible(given, causal=causal)
    dp = given["do"].astype("f8") @ given["v"].astype("f8").repeat(2, axis=1).swapaxes(2, 3)
    got = attention_backward(**given, causal=causal, gate="dp")
    assert got.dtype == np.float32 and got.shape == (2, 4, 33, 47)
    np.testing.assert_allclose(got, np.where(seen, dp, 0), rtol=1e-6, atol=1e-6)
    p = np.where(seen, np.exp(scores - given["lse"][..., None]), 0)
    delta = (given["do"].astype("f8") * given["o"]).sum(-1) - given["dlse"]
    got = attention_backward(**given, causal=causal, gate="ds", wrt=("k",))
    np.testing.assert_allclose(got, p * (dp - delta[..., None]), rtol=1e-5, atol=1e-6)


def test_ds_is_of_the_scores_before_their_rules() -> None:
    rules = {"softcap": 1.5, "score_mod": bent}
    given = arrays(np.float32, **rules)
    ds = attention_backward(**given, **rules, gate="ds")
    keys = given["k"].repeat(2, axis=1)
    dq = attention_backward(**given, **rules, wrt=("q",)).dq
    np.testing.assert_allclose(ds @ keys / np.sqrt(np.float32(8)), dq, rtol=1e-4, atol=1e-5)


def test_what_is_hidden_has_no_stage() -> None:
    """Queries without keys and keys without queries, whatever they hold."""
    given = arrays(window=(-1, 3), causal="top-left")
    given = {name: x.copy() for name, x in given.items()}
    for name in ("k", "v"):
        given[name][:, :, 40:] = np.nan
    for gate in ("dp", "ds"):
        got = attention_backward(**given, window=(-1, 3), causal="top-left", gate=gate)
        assert np.isfinite(got).all() and not got[..., 40:].any() and got.any()


# --- how they are checked -------------------------------------------------------------------------


def problem(**changes: Any) -> AttentionProblem:
    sizes = {"batch": 2, "heads": 4, "seqlen": 33, "head_dim": 8, "heads_kv": 2, "seqlen_kv": 47}
    return contiguous_problem(**(sizes | changes))


@pytest.mark.parametrize("gate", ["dp", "ds"])
@pytest.mark.parametrize("drop", [{}, {"dropout_p": 0.3, "rng": (5, 2)}])
def test_a_stage_is_held_to_the_accuracy_of_fp32(gate: Any, drop: dict[str, Any]) -> None:
    given = arrays(causal=True, **drop)
    rules = {"causal": True, "softmax_scale": None, **drop}
    got = attention_backward(**given, causal=True, gate=gate, **drop)
    check = verify_backward.check_stage(problem(causal=True), gate, given, got, rules)
    assert check.ok and check.comparison.allowed_error < 1e-3 * np.abs(got).max()
    for change in (1.001 * got, np.where(got == got.max(), got + 0.01, got)):
        wrong = verify_backward.check_stage(problem(causal=True), gate, given, change, rules)
        assert not wrong.ok and wrong.reason.startswith(f"{gate}: max error")
    (hidden,) = np.argwhere(got[0, 0, 0] == 0)[:1]
    got[0, 0, 0, hidden] = np.nan
    wrong = verify_backward.check_stage(problem(causal=True), gate, given, got, rules)
    assert "1 NaN or infinite values misplaced" in wrong.reason


def test_a_sample_is_of_whole_heads() -> None:
    asked = problem(batch=3)
    every = [(b, h) for b in range(3) for h in range(2)]
    assert verify_backward.sample_heads(asked) == every
    per_head = 2 * 33 * 47
    for count in (1, 2, 4):
        chosen = verify_backward.sample_heads(asked, budget=per_head * count)
        assert len(set(chosen)) == count and chosen == sorted(chosen) and chosen[0] == (0, 0)
        assert count == 1 or chosen[-1] == (2, 1)
    assert verify_backward.sample_heads(asked, budget=1) == [(0, 0)]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_sample_with_dropout(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads keep their numbers, which a mask depends on."""
    monkeypatch.setattr(verify_backward, "SCORE_BUDGET", count * 2 * 33 * 47)
    asked = problem()
    asked = replace(asked, rules=describe_rules(asked.scores, asked.dtype, dropout_p=0.3))
    rules = {"dropout_p": 0.3, "rng": verify.RNG}
    given = arrays(**rules)
    known = verify_backward.expect(asked, given, ("q", "k", "v"))
    assert known.heads == [(0, 0), (0, 1), (1, 0), (1, 1)][: min(count, 4)]
    got = attention_backward(**given, **rules)._asdict()
    assert known.judge(got).ok
    got["dv"][known.heads[-1]][3, 5] += 1
    check = known.judge(got)
    assert not check.ok and check.each["dv"].worst_index == (*known.heads[-1], 3, 5)


def test_a_wrong_head_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_backward, "SCORE_BUDGET", 2 * 2 * 33 * 47)
    given = arrays()
    known = verify_backward.expect(problem(), given, ("q", "k", "v"))
    assert known.heads == [(0, 0), (1, 1)]
    got = attention_backward(**given)._asdict()
    check = known.judge(got)
    assert check.ok and (check.heads_checked, check.heads_total) == (2, 4)
    wrong = {name: None if x is None else x.copy() for name, x in got.items()}
    wrong["dq"][0, 3, 5] += 1  # of a head of k and v that is not in the sample
    assert known.judge(wrong).ok
    wrong["dq"][1, 3, 5, 2] += 1
    wrong["dv"][1, 1, 40, 7] += 2
    check = known.judge(wrong)
    assert check.each["dq"].worst_index == (1, 3, 5, 2) and check.each["dk"].ok
    assert check.each["dv"].worst_index == (1, 1, 40, 7)
    assert "dq: max error" in check.reason and "at (1, 3, 5, 2)" in check.reason
    assert check.comparison in (check.each["dq"], check.each["dv"])


# --- wide heads on Hopper -------------------------------------------------------------------------


WIDE: dict[str, tuple[tuple[int, int], dict[str, Any], str, tuple[int, int]]] = {
    "192/128": ((192, 128), {}, "bwd_sm90_wide", (192, 128)),
    "between": ((136, 40), {"causal": True}, "bwd_sm90_wide", (192, 128)),
    "wide values": ((64, 160), {}, "bwd_sm90_wide", (192, 192)),
    "256": ((256, 256), {"window": (9, 0)}, "bwd_sm90_wide", (256, 256)),
    "narrow": ((128, 128), {}, "bwd_sm90", (128, 128)),
    "wider": ((264, 264), {}, "bwd_sm80", (512, 512)),
    "a rule for scores": ((256, 256), {"softcap": 2.0}, "bwd_sm80", (256, 256)),
    "dropout": ((192, 128), {"dropout_p": 0.1, "rng": (1, 2)}, "bwd_sm80", (192, 128)),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("wrt", [("q", "k", "v"), ("q",), ("v",)])
def test_which_kernel_wide_heads_get(name: str, wrt: tuple[str, ...]) -> None:
    (dim, dim_v), rules, kernel, dims = WIDE[name]
    causal = rules.get("causal", False)
    plain = contiguous_problem(1, 2, 100, dim, head_dim_v=dim_v, dtype="float16", causal=causal)
    described = describe_rules(
        ScoreShape(1, 2, 100, 100), "float16", **{n: x for n, x in rules.items() if n != "causal"}
    )
    problem = replace(plain, rules=described)
    got = select_backward(contiguous_gradients(problem, wrt), "sm_90a")
    assert got.name == kernel
    configs = [x for x in (got.keys, got.queries) if x is not None]
    assert {(x.head_dim, x.head_dim_v) for x in configs} == {dims}
    if kernel == "bwd_sm90_wide":
        assert got.keys is not None
        assert got.queries is None and (got.scale is not None) is ("q" in wrt)
