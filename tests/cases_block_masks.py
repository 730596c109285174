"""Block masks: drawn lists against a dense mask in float64, and keys that must not be read.

Every key that no query sees is NaN, in k and in v: so is all of every empty block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cases_edges import check
from drawn_blocks import FULL, RULE, Drawn, drawn, poisoned_keys, rule
from places import Place, each, everywhere

from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.cpu import reference
from flashcore_cupy.problem.block_mask import BlockMask
from flashcore_cupy.select import registry

KERNELS = ("mma_sm80", "wgmma_sm90")
BLOCKS = ((128, 128), (64, 64), (64, 128), (128, 64))
#: Tiles that a block mask gets by itself, and others, which blocks do not divide.
TILES: dict[str, dict[str, Any]] = {
    "few blocks": {},
    "enough": {"batch_invariant": True},
    "wide": {"batch_invariant": True, "config": {"block_n": 128}},
    "odd": {"batch_invariant": True, "config": {"block_n": 48}},
}
MASK_MOD = Mod(RULE, rule)


def checked(
    on: Place, mask: Drawn, heads: tuple[int, int] = (2, 2), *, batch: int = 1, dim: int = 64,
    stray: bool = False, dtype: str = "float16", tile: str = "few blocks", **rules: Any,
) -> np.ndarray:  # fmt: skip
    """Compare a call with the oracle's, by a dense mask; return the output."""
    rng = np.random.default_rng(5)
    sizes = {"batch": batch, "heads": heads[0], "heads_kv": heads[1], "head_dim": dim}
    lengths = {"seqlen": mask.seqlens[0], "seqlen_kv": mask.seqlens[1]}
    q, k, v = reference.make_inputs("normal", **sizes, **lengths, dtype=dtype)
    dense = mask.dense(heads[0])
    seen = dense & _seen_by_position(mask.seqlens, **rules)
    k, v = (poisoned_keys(x, seen, heads[1]) for x in (k, v))
    block_mask = mask.mask(on.xp, rng, stray=stray)
    how = {} if on.is_numpy else TILES[tile]
    got, lse = on.run(
        q, k, v, block_mask=block_mask, mask_mod=MASK_MOD, return_lse=True, **how, **rules
    )
    check(got, q, k, v, mask=dense, **rules)
    empty = ~np.broadcast_to(seen, (batch, *seen.shape[1:])).any(axis=3)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (got[empty] == 0).all()
    return got


def _seen_by_position(
    seqlens: tuple[int, int], causal: bool = False, window: tuple[int, int] = (-1, -1), **_: Any
) -> np.ndarray:
    i, j = np.ogrid[: seqlens[0], : seqlens[1]]
    at = i + seqlens[1] - seqlens[0]
    return ((j <= at) | (not causal)) & ((j >= at - window[0]) | (window[0] < 0))


@each("block", BLOCKS)
@each("lists", ((1, 1), (2, 1), (1, 4), (2, 2)), numpy=((2, 2),))
@each("seqlens", ((300, 421), (128, 256), (129, 65)), numpy=((300, 421),))
@each("tile", TILES, numpy=("few blocks",))
@each("dim", (64, 128), numpy=(64,))
@everywhere(*KERNELS)
def test_drawn_lists(
    on: Place,
    block: tuple[int, int],
    lists: tuple[int, int],
    seqlens: tuple[int, int],
    tile: str,
    dim: int,
) -> None:
    rng = np.random.default_rng(sum(block) + sum(lists) + sum(seqlens))
    checked(on, drawn(rng, seqlens, block, lists), (4, 2), batch=2, tile=tile, dim=dim)


@each("tile", ("few blocks", "enough"), numpy=("few blocks",))
@everywhere(*KERNELS)
def test_indices_and_counts_out_of_range_are_left_out(on: Place, tile: str) -> None:
    rng = np.random.default_rng(11)
    checked(on, drawn(rng, (300, 300), (64, 64)), stray=True, tile=tile)


@each("causal", (True, False))
@each("window", ((90, -1), (-1, -1)))
@everywhere(*KERNELS)
def test_positions_hold_beside_the_lists(on: Place, causal: bool, window: tuple[int, int]) -> None:
    rng = np.random.default_rng(12)
    mask = drawn(rng, (300, 333), (128, 64), shares=(0.3, 0.3, 0.4))
    checked(on, mask, causal=causal, window=window, tile="enough")


@each("dim, dtype", ((256, "bfloat16"), (80, "float16"), (64, "float32")))
@everywhere(*KERNELS)
def test_head_dims_and_dtypes(on: Place, dim: int, dtype: str) -> None:
    if on.is_numpy or dtype in registry.KERNELS[on.kernel].dtypes:
        rng = np.random.default_rng(13)
        checked(on, drawn(rng, (200, 260), (64, 128)), dim=dim, dtype=dtype, tile="enough")


@each("rules", ({"softcap": 5.0}, {"dropout_p": 0.3, "rng": (3, 4)}))
@everywhere(*KERNELS)
def test_other_rules_beside_it(on: Place, rules: dict[str, Any]) -> None:
    rng = np.random.default_rng(14)
    checked(on, drawn(rng, (300, 260), (128, 128)), tile="enough", **rules)


@everywhere(*KERNELS)
def test_a_mask_is_asked_in_mixed_blocks_alone(on: Place) -> None:
    rng = np.random.default_rng(15)
    mask = drawn(rng, (200, 256), (64, 64))
    q, k, v = reference.make_inputs(
        "normal", batch=1, heads=2, head_dim=64, seqlen=200, seqlen_kv=256
    )
    allowed = rng.random((1, 1, 200, 256)) < 0.5
    got = on.run(q, k, v, block_mask=mask.mask(on.xp, rng), mask=allowed)
    full, listed = (mask.elements(state) for state in (FULL, None))
    check(got, q, k, v, mask=listed & (full | allowed))


@everywhere(*KERNELS)
def test_far_scores_are_left_to_the_lists_too(on: Place) -> None:
    """Rows that are computed again, key by key, see what the lists let them see."""
    rng = np.random.default_rng(16)
    mask = drawn(rng, (150, 200), (64, 64))
    q, k, v = reference.make_inputs(
        "normal", batch=1, heads=1, head_dim=64, seqlen=150, seqlen_kv=200
    )
    block_mask = mask.mask(on.xp, rng)
    got = on.run(q, k, v, block_mask=block_mask, mask_mod=MASK_MOD, softmax_scale=2.0**33)
    check(got, q, k, v, mask=mask.dense(1), softmax_scale=2.0**33)


@each("gate", ("qk", "softmax"))
@everywhere(*KERNELS)
def test_gates_show_hidden_keys_as_hidden(on: Place, gate: str) -> None:
    rng = np.random.default_rng(17)
    mask = drawn(rng, (140, 200), (64, 64))
    q, k, v = reference.make_inputs(
        "normal", batch=1, heads=1, head_dim=64, seqlen=140, seqlen_kv=200
    )
    got = on.run(q, k, v, block_mask=mask.mask(on.xp, rng), mask_mod=MASK_MOD, gate=gate)
    hidden = -np.inf if gate == "qk" else 0.0
    np.testing.assert_array_equal(got[~mask.dense(1)], hidden)
    assert np.isfinite(got[mask.dense(1)]).all()


@everywhere(*KERNELS)
def test_intervals(on: Place) -> None:
    rng = np.random.default_rng(18)
    ends = np.sort(rng.integers(0, 300, (1, 2, 200, 4)).astype(np.int32))
    intervals = ends.reshape(1, 2, 200, 2, 2)
    made = BlockMask.from_intervals(
        on.xp.asarray(intervals), seqlen_q=200, seqlen_kv=300, block=(64, 64)
    )
    q, k, v = reference.make_inputs(
        "normal", batch=1, heads=2, head_dim=64, seqlen=200, seqlen_kv=300
    )
    j = np.arange(300)
    dense = ((j >= intervals[..., :1]) & (j < intervals[..., 1:])).any(axis=3)
    check(on.run(q, k, v, block_mask=made), q, k, v, mask=dense)


@everywhere(*KERNELS)
def test_a_plan_reads_the_lists_at_each_launch(on: Place) -> None:
    if on.is_numpy:  # which has no plans
        return
    rng = np.random.default_rng(19)
    q, k, v = reference.make_inputs(
        "normal", batch=1, heads=1, head_dim=64, seqlen=140, seqlen_kv=200
    )
    first, then = (drawn(rng, (140, 200), (64, 64)) for _ in range(2))
    block_mask, other = (mask.mask(on.xp, rng) for mask in (first, then))
    bound = on.launched(q, k, v, block_mask=block_mask, mask_mod=MASK_MOD)
    once = on.to_host(bound.arrays["o"]).copy()
    bound.launch()
    np.testing.assert_array_equal(on.to_host(bound.arrays["o"]), once)
    check(once, q, k, v, mask=first.dense(1))
    for name, x in other.arrays.items():
        block_mask.arrays[name][...] = x
    bound.launch()
    check(on.to_host(bound.arrays["o"]), q, k, v, mask=then.dense(1))
