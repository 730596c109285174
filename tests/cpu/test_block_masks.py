"""Block masks on NumPy arrays, and how they are made and checked."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_block_masks import *  # noqa: F403
from drawn_blocks import RULE, drawn, operands, poisoned_keys, rule, with_its_rule

from flashcore_cupy import (
    BlockMask,
    attention,
    attention_backward,
    block_mask,
    explain,
    explain_backward,
)
from flashcore_cupy.block_masks import _asked
from flashcore_cupy.cpu import reference
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.cpu.emulator.run import Grid, launch
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.listed_blocks import LISTS
from flashcore_cupy.select.block_launch import empty_lists, launch_of

SIZES: dict[str, Any] = {"seqlen_q": 200, "seqlen_kv": 300, "block": (64, 128)}


# --- made from ------------------------------------------------------------------------------------


def test_a_grid_and_sparse_rows_say_the_same() -> None:
    grid = np.random.default_rng(0).random((2, 4, 4, 3)) < 0.4
    by_grid = BlockMask.from_grid(grid, **SIZES)
    np.testing.assert_array_equal(by_grid.to_dense(), grid * 2)
    counts = grid.sum(axis=3)
    ends = np.cumsum(counts.reshape(-1)).reshape(counts.shape)
    first = ends[..., :1] - counts[..., :1]
    indptr = np.concatenate([first, ends], axis=3 - 1).astype(np.int32)
    indices = np.nonzero(grid)[3].astype(np.int32)
    by_rows = BlockMask.from_csr(indptr, indices, **SIZES)
    np.testing.assert_array_equal(by_rows.to_dense(), by_grid.to_dense())
    none = BlockMask.from_csr(np.zeros(5, np.int32), np.zeros(0, np.int32), **SIZES)
    assert none.density == 0 and (attention(*operands(), block_mask=none) == 0).all()


def test_rows_that_reach_behind_the_indices_are_cut() -> None:
    indptr = np.array([0, 2, 10**6, -5, 1], np.int32)
    made = BlockMask.from_csr(indptr, np.array([1, 2], np.int32), **SIZES)
    assert made.to_dense()[0, 0].tolist() == [[0, 2, 2], [0, 0, 0], [0, 0, 0], [0, 2, 0]]


def test_intervals_of_queries_and_of_blocks_of_queries() -> None:
    of_blocks = np.array([[[0, 128]], [[100, 300]], [[5, 5]], [[128, 200]]], np.int32)
    made = BlockMask.from_intervals(of_blocks, **SIZES)
    assert made.to_dense()[0, 0].tolist() == [[2, 0, 0], [1, 2, 2], [0, 0, 0], [0, 1, 0]]
    of_queries = np.repeat(of_blocks, 64, axis=0)[:200]
    again = BlockMask.from_intervals(of_queries, **SIZES)
    np.testing.assert_array_equal(again.to_dense(), made.to_dense())
    q, k, v = operands()
    np.testing.assert_array_equal(
        attention(q, k, v, block_mask=made), attention(q, k, v, block_mask=again)
    )


def test_torchs_block_mask_is_taken_by_its_attributes() -> None:
    rng = np.random.default_rng(1)
    mask = drawn(rng, (200, 300), (64, 128))
    lists = dict(zip(LISTS, mask.lists(rng), strict=True))
    flex = types.SimpleNamespace(
        **lists, BLOCK_SIZE=(64, 128), seq_lengths=(200, 300), mask_mod=lambda b, h, q, k: q >= k
    )
    q, k, v = operands()
    got = attention(q, k, v, block_mask=flex, mask_mod=rule)
    expected, _ = reference.oracle(q, k, v, mask=mask.dense(4))
    naive = reference.naive(q, k, v, mask=mask.dense(4))
    assert reference.compare(got, expected, naive).ok
    with pytest.raises(ValueError, match="block_mask: has mixed blocks, and no rule"):
        attention(q, k, v, block_mask=flex)


# --- from a rule ----------------------------------------------------------------------------------


def test_a_rule_that_is_kept() -> None:
    made = block_mask(rule, heads=4, **SIZES)
    assert made.shape == (1, 4, 4, 3)
    q, k, v = operands()
    np.testing.assert_array_equal(
        attention(q, k, v, block_mask=made), attention(q, k, v, mask_mod=rule)
    )


@pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or "")
@pytest.mark.parametrize("by", ["mask_mod", "mask"])
def test_the_kernel_finds_what_numpy_finds(by: str) -> None:
    document = (np.arange(300) // 90).astype(np.int32)

    def same(b: Any, h: Any, q_idx: Any, kv_idx: Any, document: Any) -> Any:
        return (document[q_idx] == document[kv_idx]) | ((h == 1) & (kv_idx < 128))

    expected = block_mask(same, heads=2, mod_args={"document": document}, **SIZES)
    scores, args, mask = ScoreShape(1, 2, 200, 300), {"document": document}, None
    text = "document[q_idx] == document[kv_idx] || (h == 1 && kv_idx < 128)"
    if by == "mask":
        q_idx, kv_idx, h = np.arange(200)[:, None], np.arange(300), np.arange(2)[:, None, None]
        mask, args, text = same(0, h, q_idx, kv_idx, document)[None], {}, None
    asked = _asked(scores, (64, 128), text, mask, args)
    made = empty_lists(asked, np.zeros)
    addresses = {name: x.ctypes.data for name, x in made.items()}
    if mask is not None:
        addresses["mask"] = mask.ctypes.data
    one = launch_of(asked, addresses, [x.ctypes.data for x in args.values()])
    assert one is not None
    library = build.library(build.Source.of(one.config, "sm_90a"))
    grid = Grid(one.grid, one.config.threads, one.config.smem_bytes)
    launch(library, one.entry, one.params.tobytes(), grid, keep=(made, mask, args))
    lists = BlockMask(made, (200, 300), (64, 128))
    np.testing.assert_array_equal(lists.to_dense(), expected.to_dense())


# --- what is shown and refused --------------------------------------------------------------------


def test_a_mask_is_shown_as_a_picture() -> None:
    made = block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, seqlen_q=300, seqlen_kv=300)
    lines = repr(made).splitlines()
    assert lines[0].endswith("lists of 1 x 1 heads; 66.7% computed, 33.3% mixed")
    assert lines[1:] == ["|▒  |", "|█▒ |", "|██▒|"]
    wide = block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, seqlen_q=1, seqlen_kv=64 * 999)
    assert max(map(len, repr(wide).splitlines()[1:])) <= 50


def _lists(**changes: Any) -> BlockMask:
    given = {
        "full_kv_num_blocks": np.zeros((1, 1, 4), np.int32),
        "full_kv_indices": np.zeros((1, 1, 4, 3), np.int32),
    }
    return BlockMask.from_lists(**(given | SIZES | changes))


WRONG: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    r"block: got \(32, 128\); use \(queries, keys\), each 64 or 128": (
        {"block": (32, 128)},
        ValueError,
    ),
    "full_kv_num_blocks: has 4 blocks of queries; these lengths have 5": (
        {"seqlen_q": 257},
        ValueError,
    ),
    "full_kv_indices: got dtype int64; use int32": (
        {"full_kv_indices": np.zeros((1, 1, 4, 3), np.int64)},
        TypeError,
    ),
    r"full_kv_indices: got shape \(1, 2, 4, 3\); use that of full_kv_num_blocks": (
        {"full_kv_indices": np.zeros((1, 2, 4, 3), np.int32)},
        ValueError,
    ),
    "full_kv_indices: got none with full_kv_num_blocks": ({"full_kv_indices": None}, ValueError),
    "kv_num_blocks: got no lists": (
        {"full_kv_indices": None, "full_kv_num_blocks": None},
        ValueError,
    ),
    "seqlen_q: got 2.5; use an int": ({"seqlen_q": 2.5}, TypeError),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_lists_are_refused(message: str) -> None:
    changes, kind = WRONG[message]
    with pytest.raises(kind, match=message):
        _lists(**changes)


def test_a_mask_of_other_sizes_is_refused() -> None:
    q, k, v = operands()
    with pytest.raises(ValueError, match=r"block_mask: is of \(Sq, Skv\) = \(200, 300\)"):
        attention(q[:, :, :100], k, v, block_mask=_lists())
    counts, indices = np.zeros((3, 1, 4), np.int32), np.zeros((3, 1, 4, 3), np.int32)
    three = _lists(full_kv_num_blocks=counts, full_kv_indices=indices)
    with pytest.raises(ValueError, match="lists of 3 batches, but q has 2"):
        attention(q, k, v, block_mask=three)
    turned = {"full_kv_num_blocks": counts.reshape(1, 3, 4)}
    turned["full_kv_indices"] = indices.reshape(1, 3, 4, 3)
    with pytest.raises(ValueError, match="lists of 3 heads, but q has 4"):
        attention(q, k, v, block_mask=_lists(**turned))
    with pytest.raises(TypeError, match=r"block_mask: got dict; use flashcore_cupy\.block_mask"):
        attention(q, k, v, block_mask={})
    with pytest.raises(ValueError, match="its intervals are of 2 heads, but q has 4"):
        own = BlockMask.from_intervals(np.zeros((1, 2, 200, 1, 2), np.int32), **SIZES)
        attention(q, k, v, block_mask=own)


def test_what_has_no_block_mask_says_so() -> None:
    q, k, v = operands()
    with pytest.raises(ValueError, match="kernel 'wmma_fused_64': has no block_mask"):
        explain(q, k, v, block_mask=_lists(), kernel="wmma_fused_64")
    with pytest.raises(ValueError, match="kernel 'cluster_sm90': has no block_mask"):
        explain(q, k, v, block_mask=_lists(), kernel="cluster_sm90")
    told = explain(q, k, v, block_mask=_lists(), kernel="mma_sm80")
    assert ", blocks, " in told and "a launch ahead lists tiles of 32 queries and 128 keys" in told


def test_gradients_are_those_of_the_dense_mask() -> None:
    q, k, v = operands()
    made, dense = with_its_rule()
    o, lse = attention(q, k, v, block_mask=made, return_lse=True)
    k, v = (poisoned_keys(x, dense, 2) for x in (k, v))
    got = attention_backward(q, q, k, v, o, lse, block_mask=made)
    want = attention_backward(q, q, k, v, o, lse, mask=dense)
    for x, y in zip(got[:3], want[:3], strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x.astype("f4"), y.astype("f4"), atol=2e-3)


def test_kernels_of_gradients_walk_over_lists() -> None:
    q, k, v = operands()
    o, lse = attention(q, k, v, return_lse=True)
    made = replace(with_its_rule()[0], mask_mod=RULE)

    def explained(**rules: Any) -> str:
        given = {"block_mask": made, "kernel": "bwd_sm80"} | rules
        return explain_backward(q, q, k, v, o, lse, **given)

    lines = explained().splitlines()
    assert ", blocks, mask_mod, " in lines[0] and lines[0].startswith("bwd_sm80 on sm_90a, dk, dv:")
    assert [line.partition(";")[0] for line in lines if line.startswith("block mask:")] == [
        "block mask: a launch ahead lists tiles of 32 queries and 128 keys",
        "block mask: a launch ahead lists tiles of 128 queries and 32 keys",
    ]
    assert ", blocks, " in explained(mod_args={f"x{n}": np.ones(3, np.float32) for n in range(8)})
    for changes in ({"block_n": 96}, {"block_m": 128, "warps_m": 1}, {"block_m": 48, "warps_m": 1}):
        with pytest.raises(ValueError, match="with a block mask block_n and a warp's own rows are"):
            explained(config=changes)
    with pytest.raises(ValueError, match="touches more than 4 of the block mask's blocks of 64"):
        explained(config={"block_m": 320, "warps_m": 5})
    with pytest.raises(ValueError, match="kernel 'bwd_sm90_wide': has no block_mask"):
        explained(kernel="bwd_sm90_wide")
    with pytest.raises(ValueError, match="block_mask: is of"):
        explained(block_mask=_lists(seqlen_kv=400))
    function = replace(made, mask_mod=rule)
    with pytest.raises(TypeError, match="mask_mod: got a Python function"):
        explained(block_mask=function)


def test_no_blocks_at_all() -> None:
    q, k, v = operands()
    for lengths in ((0, 300), (200, 0), (0, 0)):
        made = block_mask(rule, seqlen_q=lengths[0], seqlen_kv=lengths[1])
        assert made.to_dense().size == 0 and "BlockMask" in repr(made)
        given = q[:, :, : lengths[0]], k[:, :, : lengths[1]], v[:, :, : lengths[1]]
        o, lse = attention(*given, block_mask=made, return_lse=True)
        assert o.shape == given[0].shape and not o.any() and np.isneginf(lse).all()
        found = attention_backward(o, *given, o, lse, block_mask=made)
        assert not any(x.any() for x in found[:3])


def test_an_expression_has_its_operands() -> None:
    assert RULE  # is of the cases
    made = block_mask(
        lambda b, h, q_idx, kv_idx, first: kv_idx >= first[0],
        mod_args={"first": np.array([130])},
        **SIZES,
    )
    with pytest.raises(ValueError, match="the block mask's rule has an array 'first', too"):
        attention(*operands(), block_mask=made, mod_args={"first": np.array([1])})
