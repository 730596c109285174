"""Which calls ask their mask_mod ahead, for lists of blocks, and what they say of it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from noted_launches import Array

from flashcore_cupy import explain
from flashcore_cupy.problem.attention_problem import AttentionProblem, contiguous_problem
from flashcore_cupy.problem.mods import Mods
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.select import selector

ARCH = "sm_90a"
CAUSAL = "q_idx >= kv_idx"
AHEAD = {"own_lists": True}


def problem(
    *sizes: int, causal: bool = False, mask_mod: str | None = CAUSAL, **rules: Any
) -> AttentionProblem:
    """Of batch, heads, length and columns; mask_mod is its rule unless others are given."""
    found = contiguous_problem(*(sizes or (2, 32, 8192, 64)), causal=causal)
    if "mask" in rules:
        shape = rules["mask"]
        rules["mask"] = Array(shape, "bool")
        rules["mask"].address = 0  # type: ignore[attr-defined]
    described = describe_rules(found.scores, found.dtype, mask_mod=mask_mod, **rules)
    return replace(found, rules=described)


select = functools.partial(selector.select, arch=ARCH)


def is_ahead(asked: AttentionProblem, **how: Any) -> bool:
    found = select(asked, **how)
    sources = [config.source for config in found.configs]
    assert found.config.tile.own_lists == (sources[0] == "block_mask.cu")
    assert found.config.tile.own_lists == (found.seen(asked).rules.block_mask is not None)
    told = "\n".join(found.explained(ARCH))
    assert ("mask_mod: asked ahead" in told) == found.config.tile.own_lists
    assert ("mask_mod: asked score by score" in told) != found.config.tile.own_lists
    return found.config.tile.own_lists


# --- which calls do -------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 32, 8192, 64), (2, 16, 8192, 128)], ids=str)
@pytest.mark.parametrize("kernel", ["auto", "mma_sm80", "wgmma_sm90"])
def test_calls_that_were_measured_do(sizes: Any, kernel: str) -> None:
    assert is_ahead(problem(*sizes), kernel=kernel)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "ahead"),
    [
        (1, 16, 8192, True),
        (1, 15, 8192, False),  # of as many heads what they save is lost again
        (1, 16, 2**16, True),
        (1, 15, 2**16, False),
        (4, 16, 2048, True),
        (4, 15, 2048, False),  # so few queries that a list takes as long as all
        (16, 16, 1024, True),
        (15, 16, 1024, False),  # so few scores that two more launches count
        (1, 16, 2**22, False),  # lists that take more memory than the output
    ],
)
def test_the_sizes_decide(batch: int, heads: int, length: int, ahead: bool) -> None:
    assert is_ahead(problem(batch, heads, length, 128)) == ahead


@pytest.mark.parametrize(
    ("mask_mod", "lists"),
    [
        ("kv_idx < 100", (1, 1)),
        ("table[h] < kv_idx", (1, 32)),
        ("kv_idx % (b+1) == 0", (32, 1)),
        ("b == h", (32, 32)),
        ("bh + b_ + hb + _h0 > 3", (1, 1)),
        ("kv_idx /*b*/ > 3", (32, 1)),  # it only may ask
    ],
)
def test_lists_are_shared_by_what_a_rule_does_not_ask_for(mask_mod: str, lists: Any) -> None:
    asked = problem(32, 32, 1024, 64, mask_mod=mask_mod)
    listed = select(asked, overrides=AHEAD).seen(asked).rules.block_mask
    assert listed is not None and (listed.batches, listed.heads) == lists
    assert is_ahead(asked) == (lists != (32, 32))
    mods = Mods("score + b * h", mask_mod)
    assert (mods.mask_asks("b"), mods.mask_asks("h")) == (lists[0] > 1, lists[1] > 1)


@pytest.mark.parametrize(
    ("shape", "lists"),
    [((8192, 8192), (1, 1)), ((2, 1, 1, 8192), (2, 1)), ((32, 1, 1), (1, 32))],
)
def test_a_mask_beside_it_may_tell_heads_apart(shape: Any, lists: Any) -> None:
    asked = problem(mask=shape)
    listed = select(asked, overrides=AHEAD).seen(asked).rules.block_mask
    assert listed is not None and (listed.batches, listed.heads) == lists
    assert is_ahead(asked) == (lists[1] == 1)


def test_scores_that_positions_hide_are_none() -> None:
    assert is_ahead(problem(causal=True))
    assert not is_ahead(problem(1, 24, 8192, 64, causal=True))
    assert not is_ahead(problem(window=(1024, 0)))


def test_promises_go_first() -> None:
    asked = problem()
    assert not is_ahead(replace(asked, batch_invariant=True))
    assert not is_ahead(replace(asked, gate="qk"))
    q, k, v = (replace(x, shape=(1, 32, 8192, 64)) for x in (asked.q, asked.k, asked.v))
    assert not is_ahead(replace(asked, q=q, k=k, v=v, sequences=3))


def test_a_call_without_a_mask_mod_is_left_alone() -> None:
    for asked in (problem(mask_mod=None), problem(mask_mod=None, mask=(8192, 8192))):
        found = select(asked)
        assert not found.config.tile.own_lists and found.why_unlisted is None
        assert not any("ahead" in line for line in found.explained(ARCH))


# --- overrides ------------------------------------------------------------------------------------


def test_config_decides_otherwise() -> None:
    few = problem(1, 1, 200, 64)
    assert not is_ahead(few)
    assert is_ahead(few, overrides=AHEAD)
    assert is_ahead(replace(few, batch_invariant=True), overrides=AHEAD)
    assert is_ahead(few, overrides=AHEAD | {"block_n": 32}, kernel="mma_sm80")
    assert not is_ahead(problem(), overrides={"own_lists": False})
    assert select(problem(mask_mod=None, mask=(8192, 8192)), overrides=AHEAD).config.tile.own_lists


def test_a_tile_that_goes_without_lists_has_the_kernel_ask() -> None:
    changes: dict[str, object] = {"block_n": 16, "num_stages": 1}
    assert is_ahead(problem(), kernel="mma_sm80", overrides=changes)
    tile = {"block_m": 96, "warps_m": 2, "num_stages": 1}
    found = select(problem(), kernel="mma_sm80", overrides=tile)
    assert "with a block mask a warp has 16, 32 or 64 rows" in str(found.why_unlisted)
    with pytest.raises(ValueError, match="with a block mask a warp has"):
        select(problem(), kernel="mma_sm80", overrides=tile | AHEAD)
    assert not is_ahead(problem(1, 64, 8192, 64), kernel="cluster_sm90")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"mask_mod": None}, "there is none"),
        ({"sequences": 2}, "a packed batch have no common lists"),
        ({"kernel": "cluster_sm90"}, "kernel 'cluster_sm90': has no own_lists"),
        ({"kernel": "scalar", "mask_mod": None}, "there is none"),
    ],
)
def test_lists_of_nothing_are_refused(how: dict[str, Any], message: str) -> None:
    kernel, sequences = how.pop("kernel", "auto"), how.pop("sequences", None)
    asked = replace(problem(1, 32, 100, 64, **how), sequences=sequences)
    with pytest.raises(ValueError, match=message):
        select(asked, kernel=kernel, overrides=AHEAD)


def test_a_block_mask_has_lists_already() -> None:
    asked = problem(1, 32, 100, 64)
    listed = select(asked, overrides=AHEAD).seen(asked)
    passed = listed.rules.block_mask._replace(made=False)
    with_mask = replace(asked, rules=replace(asked.rules, block_mask=passed))
    assert not select(with_mask).config.tile.own_lists
    with pytest.raises(ValueError, match="the block mask that is passed has lists already"):
        select(with_mask, overrides=AHEAD)


def test_arrays_of_numpy_take_it_with_a_kernel() -> None:
    q = np.zeros((1, 2, 100, 64), np.float16)
    told = explain(q, q, q, mask_mod=CAUSAL, kernel="mma_sm80", config=AHEAD)
    assert "own_lists" in told and "mask_mod: asked ahead, block by block" in told
    with pytest.raises(ValueError, match="config: own_lists=1 is not bool"):
        explain(q, q, q, mask_mod=CAUSAL, kernel="mma_sm80", config={"own_lists": 1})
