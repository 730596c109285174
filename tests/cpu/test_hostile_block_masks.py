"""Block masks from arguments that nobody should pass, and from arrays that lie anyhow."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import numpy as np
import pytest
from helpers import gpu_skip_reason
from noted_launches import Array

from flashcore_cupy import BlockMask, attention, block_mask, explain
from flashcore_cupy.cpu.emulator import build
from flashcore_cupy.problem.attention_problem import MAX_SEQLEN

SIZES: dict[str, Any] = {"seqlen_q": 200, "seqlen_kv": 300, "block": (64, 128)}
GRID = np.random.default_rng(0).random((1, 1, 4, 3)) < 0.6
MADE = BlockMask.from_grid(GRID, **SIZES)
COUNTS, INDICES = (MADE.arrays[f"full_kv_{name}"] for name in ("num_blocks", "indices"))


def given() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((2, 4, n, 32)).astype(np.float16) for n in (200, 300, 300)]


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def full(counts: Any = COUNTS, indices: Any = INDICES, **changes: Any) -> BlockMask:
    return BlockMask.from_lists(None, None, counts, indices, **(SIZES | changes))


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


# --- what is refused ------------------------------------------------------------------------------

_DIRECT = {"full_kv_num_blocks": zeros(1, 1, 2), "full_kv_indices": zeros(1, 1, 2, 3)}


def flex(**changes: Any) -> Any:
    lists = {"kv_num_blocks": zeros(1, 1, 4), "kv_indices": zeros(1, 1, 4, 3)}
    sizes = {"BLOCK_SIZE": (64, 128), "seq_lengths": (200, 300)}
    return types.SimpleNamespace(**(lists | sizes | changes))


REFUSED: dict[str, Any] = {
    "seqlen_q: got True; use an int": lambda: full(seqlen_q=True),
    "seqlen_kv: got 1099511627776; use an int from 0 to": lambda: full(seqlen_kv=2**40),
    "heads: got 2147483648; use an int from 0 to": lambda: block_mask(causal, heads=2**31, **SIZES),
    "full_kv_num_blocks: got dtype >i4, of other bytes; use int32": lambda: full(
        COUNTS.astype(">i4")
    ),
    # What from_grid, from_csr and from_intervals reckon with.
    "seqlen_q: got 'a'; use an int": lambda: BlockMask.from_grid(GRID, seqlen_q="a", seqlen_kv=300),
    "seqlen_q: got -5; use an int from 0": lambda: BlockMask.from_grid(
        GRID, seqlen_q=-5, seqlen_kv=300
    ),
    "seqlen_kv: got None; use an int": lambda: BlockMask.from_csr(
        zeros(5), zeros(2), seqlen_q=200, seqlen_kv=None
    ),
    "seqlen_q: got 200.0; use an int": lambda: BlockMask.from_intervals(
        zeros(200, 1, 2), seqlen_q=200.0, seqlen_kv=300
    ),
    # The class itself.
    "kv_num_blocks: got no lists": lambda: BlockMask({}, (200, 300)),
    "arrays: got None; use a dict of some of kv_num_blocks": lambda: BlockMask(None, (200, 300)),
    r"arrays: got \['full_kv_num_block'\]; use a dict": lambda: BlockMask(
        {"full_kv_num_block": zeros(1, 1, 2)}, (200, 300)
    ),
    "full_kv_num_blocks: got none with full_kv_indices": lambda: BlockMask(
        {"full_kv_indices": zeros(1, 1, 2, 3)}, (200, 300)
    ),
    "full_kv_num_blocks: got dtype float64; use int32": lambda: BlockMask(
        _DIRECT | {"full_kv_num_blocks": np.zeros((1, 1, 2))}, (200, 300)
    ),
    r"block: got \(100, 100\); use": lambda: BlockMask(_DIRECT, (200, 300), (100, 100)),
    r"seqlens: got 200; use \(Sq, Skv\)": lambda: BlockMask(_DIRECT, 200),
    r"mod_args: got \[1\]; use a dict of names": lambda: BlockMask(
        _DIRECT, (200, 300), mod_args=[1]
    ),
    # What only looks like one of torch's.
    r"block_mask\.seq_lengths: got \(200,\); use": lambda: BlockMask.from_flex(
        flex(seq_lengths=(200,))
    ),
    r"block_mask\.seq_lengths: got 200; use": lambda: BlockMask.from_flex(flex(seq_lengths=200)),
    "block: got 'ab'; use": lambda: BlockMask.from_flex(flex(BLOCK_SIZE="ab")),
    # Arrays in two places.
    "indices: a CuPy array while indptr is a NumPy array": lambda: BlockMask.from_csr(
        zeros(5), Array((2,), "int32"), **SIZES
    ),
    "full_kv_indices: a CuPy array while full_kv_num_blocks is a NumPy": lambda: full(
        indices=Array((1, 1, 4, 3), "int32")
    ),
    # Of a rule.
    "stream: is of a GPU, but NumPy asks this rule": lambda: block_mask(causal, stream=5, **SIZES),
    r"mod_args\['x'\]: got list; use a": lambda: block_mask(
        lambda b, h, q_idx, kv_idx, x: q_idx > 3, mod_args={"x": [1, 2]}, **SIZES
    ),
    "mod_args: got 5; use a dict of names": lambda: attention(
        *given(),
        block_mask=full(mask_mod=lambda b, h, i, j, x: i > j, mod_args={"x": np.ones(3)}),
        mod_args=5,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_it_is_refused_by_name(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        REFUSED[message]()


@pytest.mark.skipif(gpu_skip_reason() is None, reason="there is a GPU to ask it")
def test_an_expression_needs_a_gpu() -> None:
    with pytest.raises(TypeError, match="mask_mod: got a str, which a GPU asks, and there is none"):
        block_mask("q_idx >= kv_idx", **SIZES)


def test_the_longest_lengths_are_taken() -> None:
    counts, indices = np.ones((1, 1, 2), np.int32), np.zeros((1, 1, 2, 1), np.int32)
    made = full(counts, indices, seqlen_q=100, seqlen_kv=MAX_SEQLEN)
    assert 0 < made.density < 1e-6


def test_the_class_gives_lists_all_of_their_axes() -> None:
    lists = {name: x[0, 0] for name, x in _DIRECT.items()}
    made = BlockMask(lists, [np.int64(200), 300], [128, 128])
    assert made.seqlens == (200, 300) and made.block == (128, 128) and made.shape == (1, 1, 2, 3)
    assert not attention(*given(), block_mask=made).any()


# --- arrays that lie anyhow -----------------------------------------------------------------------


def _packed(kind: list[tuple[str, str]]) -> np.ndarray:
    records = np.zeros(INDICES.shape, kind)
    records["b"] = INDICES
    return records["b"]


LIES: dict[str, Any] = {
    "steps of 5 bytes": lambda: (COUNTS, _packed([("a", "i1"), ("b", "i4")])),
    "steps of 12 bytes": lambda: (COUNTS, _packed([("b", "i4"), ("c", "i8")])),
    "backwards": lambda: (COUNTS, INDICES[..., ::-1].copy()[..., ::-1]),
    "columns first": lambda: (np.asfortranarray(COUNTS), np.asfortranarray(INDICES)),
    "repeated": lambda: (
        np.broadcast_to(COUNTS, (2, 4, 4)),
        np.broadcast_to(INDICES, (2, 4, 4, 3)),
    ),
    "much room": lambda: (
        np.minimum(COUNTS, 1),
        np.broadcast_to(INDICES[..., :1], (1, 1, 4, 2**31 + 5)),
    ),
    "counts beyond the room": lambda: (np.full_like(COUNTS, 2**31 - 1), INDICES),
    "negative counts": lambda: (np.full_like(COUNTS, -(2**31)), INDICES),
    "indices of all kinds": lambda: (
        np.full_like(COUNTS, 9),
        np.broadcast_to(np.array([2**31 - 1, -(2**31), 3, 1, -1, 1], np.int32), (1, 1, 4, 6)),
    ),
}


@pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or "")
@pytest.mark.parametrize("name", LIES)
def test_numpy_and_a_kernel_read_the_same_lists(name: str) -> None:
    counts, indices = LIES[name]()
    made = full(counts, indices)
    want = np.zeros((4, 3), bool)
    for row in range(4):
        n = max(0, min(int(counts[0, 0, row]), indices.shape[3]))
        listed = indices[0, 0, row, :n]
        want[row, [int(k) for k in listed if 0 <= k < 3]] = True
    np.testing.assert_array_equal(made.to_dense()[0, 0] == 2, want)
    dense = np.kron(want, np.ones((64, 128), bool))[:200, :300]
    q, k, v = given()
    by_mask = attention(q, k, v, mask=dense).astype(np.float32)
    for how in ({}, {"kernel": "mma_sm80"}):
        got = attention(q, k, v, block_mask=made, **how).astype(np.float32)
        assert np.abs(got - by_mask).max() < 4e-3


def test_a_list_with_much_room_is_looked_at_as_far_as_it_is_long() -> None:
    room = np.broadcast_to(np.int32(2), (1, 1, 4, 10**12))
    assert full(np.array([[[1, 0, 1, 0]]], np.int32), room).density == 2 / 12


def test_intervals_of_none() -> None:
    """For queries without any, and for no queries at all."""
    q, k, v = given()
    for queries, n in ((200, 0), (0, 2)):
        made = BlockMask.from_intervals(zeros(queries, n, 2), seqlen_q=queries, seqlen_kv=300)
        o, lse = attention(q[:, :, :queries], k, v, block_mask=made, return_lse=True)
        assert not o.any() and np.isneginf(lse).all()
        assert "blocks" in explain(q[:, :, :queries], k, v, block_mask=made, kernel="mma_sm80")


# --- copies ---------------------------------------------------------------------------------------


def test_copies_are_the_same_mask() -> None:
    intervals = np.sort(np.random.default_rng(2).integers(0, 300, (2, 4, 200, 4)), axis=3)
    made = [
        full(),
        block_mask(causal, **SIZES),
        BlockMask.from_intervals(intervals.reshape(2, 4, 200, 2, 2).astype(np.int32), **SIZES),
    ]
    q, k, v = given()
    for mask in made:
        want = attention(q, k, v, block_mask=mask)
        for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
            assert repr(again) == repr(mask)
            np.testing.assert_array_equal(attention(q, k, v, block_mask=again), want)
