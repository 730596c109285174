"""Calls that ask their mask_mod ahead, for lists of blocks that their own kernels walk over.

Keys that no query of a batch's and a head's sees are NaN, in k and in v: so are all of an empty
block, unless heads that share k and v see them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cases_edges import check
from drawn_blocks import poisoned_keys
from places import Place, each, everywhere

from flashcore_cupy.cpu import reference

KERNELS = ("mma_sm80", "wgmma_sm90")
AHEAD = {"own_lists": True}
B, HEADS, HEADS_KV, SQ, SKV = 2, 4, 2, 300, 421
DOCUMENT = np.sort(np.random.default_rng(0).integers(0, 4, (B, SKV))).astype(np.int32)
b, h, i, j = np.ogrid[:B, :HEADS, :SQ, :SKV]
#: Expressions, and what they hide of the scores (B, Hq, Sq, Skv).
MODS: dict[str, tuple[str, Any]] = {
    "all alike": ("q_idx >= kv_idx || kv_idx < 50", (i >= j) | (j < 50)),
    "of a head": ("kv_idx / 60 % 4 == h || kv_idx == 0", (j // 60 % 4 == h) | (j == 0)),
    "of a batch": (
        "document[b * 421 + q_idx] == document[b * 421 + kv_idx]",
        DOCUMENT[b, i] == DOCUMENT[b, j],
    ),
    "of both": (
        "(b + h) % 2 ? kv_idx > 200 : q_idx < 130",
        np.where((b + h) % 2, j > 200, i < 130),
    ),
    "nothing hidden": ("kv_idx >= 0", j >= 0),
    "all hidden": ("kv_idx < 0", j < 0),
}


def given(seed: int = 5, dtype: str = "float16", dim: int = 64) -> tuple[np.ndarray, ...]:
    sizes = {"batch": B, "heads": HEADS, "heads_kv": HEADS_KV, "seqlen": SQ, "seqlen_kv": SKV}
    return reference.make_inputs("normal", seed=seed, head_dim=dim, dtype=dtype, **sizes)


def rule(name: str) -> dict[str, Any]:
    arrays = {"mod_args": {"document": DOCUMENT}} if "document" in MODS[name][0] else {}
    return {"mask_mod": MODS[name][0], **arrays}


def placed(on: Place, rules: dict[str, Any]) -> dict[str, Any]:
    """The same with arrays of mods where the kernel runs."""
    own = {name: on.xp.asarray(x) for name, x in rules.get("mod_args", {}).items()}
    return rules | ({"mod_args": own} if own else {})


def visible(
    name: str, causal: Any = False, window: tuple[int, int] = (-1, -1), mask: Any = True, **_: Any
) -> np.ndarray:
    at = i + (0 if causal == "top-left" else SKV - SQ)
    left, right = window[0], 0 if causal else window[1]
    near = ((j <= at + right) | (right < 0)) & ((j >= at - left) | (left < 0))
    return np.broadcast_to(MODS[name][1] & near & mask, (B, HEADS, SQ, SKV))


def checked(on: Place, name: str, *, tile: Any = None, **rules: Any) -> None:
    seen = visible(name, **rules)
    q, k, v = given()
    k, v = (poisoned_keys(x, seen, HEADS_KV) for x in (k, v))
    config = {"config": AHEAD | (tile or {})}
    got, lse = on.run(q, k, v, return_lse=True, **placed(on, rule(name)), **config, **rules)
    check(got, q, k, v, mask=seen, **{n: x for n, x in rules.items() if n == "softcap"})
    empty = ~seen.any(axis=3)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (got[empty] == 0).all()


@each("name", MODS)
@each("tile", (None, {"block_n": 48}), emulated=(None,))
@everywhere(*KERNELS)
def test_against_the_oracle(on: Place, name: str, tile: Any) -> None:
    checked(on, name, tile=tile)


@each(
    "rules",
    (
        {"causal": True},
        {"causal": "top-left"},  # which hides the last keys from all queries
        {"window": (90, -1), "softcap": 5.0},
        {"mask": np.random.default_rng(1).random((B, 1, SQ, SKV)) < 0.6},
        {"mask": np.random.default_rng(2).random((HEADS, 1, SKV)) < 0.6},
    ),
)
@each("name", ("all alike", "of a batch", "of both"))
@everywhere(*KERNELS)
def test_beside_other_rules_that_hide_keys(on: Place, name: str, rules: Any) -> None:
    checked(on, name, **rules)


@everywhere(*KERNELS)
def test_a_mask_alone(on: Place) -> None:
    mask = np.random.default_rng(3).random((B, HEADS, SQ, SKV)) < 0.01
    mask[:, :, 128:256, 128:256] = True
    mask[:, 1, :128] = False
    q, k, v = given()
    k, v = (poisoned_keys(x, mask, HEADS_KV) for x in (k, v))
    check(on.run(q, k, v, mask=mask, config=AHEAD), q, k, v, mask=mask)


@everywhere(*KERNELS)
def test_beside_rules_that_change_scores_or_drop_keys(on: Place) -> None:
    """The same bits are dropped, and scores change alike: as by the kernel that asks the rule."""
    q, k, v = given()
    rules = rule("of a head") | {"score_mod": "score + table[h]", "dropout_p": 0.3, "rng": (3, 4)}
    rules["mod_args"] = {"table": np.arange(4, dtype=np.float32)}
    rules = placed(on, rules)
    ahead, asked = (on.run(q, k, v, config=c, **rules) for c in (AHEAD, {"own_lists": False}))
    assert np.abs(ahead.astype("f4") - asked.astype("f4")).max() < 2e-3 * np.abs(v).max()


@each("gate", ("qk", "softmax"))
@everywhere(*KERNELS)
def test_gates(on: Place, gate: str) -> None:
    got = on.run(*given(), gate=gate, config=AHEAD, **rule("all alike"))
    seen = visible("all alike")
    np.testing.assert_array_equal(got[~seen], -np.inf if gate == "qk" else 0.0)
    assert np.isfinite(got[seen]).all()


@everywhere(*KERNELS)
def test_each_launch_makes_the_lists_anew_and_gives_the_same_bits(on: Place) -> None:
    q, k, v = given()
    first, then = (np.arange(SKV, dtype=np.int32) // n for n in (100, 150))
    text = "document[q_idx] == document[kv_idx]"
    table = on.xp.asarray(first)
    bound = on.launched(q, k, v, mask_mod=text, mod_args={"document": table}, config=AHEAD)
    assert (
        [step.config.source for step in bound.steps][:2] == ["block_mask.cu", "tile_lists.cu"]
        if on.is_emulated
        else len(bound.steps) == 3
    )
    once = on.to_host(bound.arrays["o"]).copy()
    bound.arrays["kv_num_blocks"][...] = bound.arrays["kv_indices"][...] = -1
    bound.launch(next(on.schedules)) if on.is_emulated else bound.launch()
    np.testing.assert_array_equal(on.to_host(bound.arrays["o"]), once)
    check(once, q, k, v, mask=(first[:SQ, None] == first)[None, None])
    table[...] = on.xp.asarray(then)
    bound.launch()
    check(on.to_host(bound.arrays["o"]), q, k, v, mask=(then[:SQ, None] == then)[None, None])


def test_nothing_is_read_that_nobody_has_written(on: Place) -> None:
    if not on.is_emulated:  # which watches each byte
        return
    for kernel in KERNELS:
        bound = on.by(kernel).launched(*given(), config=AHEAD, **rule("of both"))
        bound.launch(checking=True)
