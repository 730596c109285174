"""Dropout by kernels, on a GPU or emulated: the same mask in each, whatever the tile.

Gradients under dropout: ``test_gradients.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases_dropout import RNG, mask, shown_by_output
from cases_edges import TILES, arrays, check, sized
from places import PACKED, RULED, Place, each, everywhere

from flashcore_cupy.cpu import reference

P = 0.3
DROP: dict[str, Any] = {"dropout_p": P, "rng": RNG}


@everywhere(*RULED)
@each("size", TILES)
@each("rules", [{}, {"causal": True}, {"window": (60, 20), "softcap": 5.0}])
def test_output(on: Place, size: str, rules: dict[str, Any]) -> None:
    q, k, v = sized(on, size)
    o, lse = on.run(q, k, v, return_lse=True, **DROP, **rules)
    check(o, q, k, v, **DROP, **rules)
    _, expected = reference.oracle(q, k, v, **rules)
    np.testing.assert_allclose(lse, expected, atol=2e-3, rtol=1e-5)


@everywhere(*RULED)
@each("dtype", ["float16", "bfloat16", "float32"])
@each("lengths", [(1, 130), (17, 16), (63, 65), (130, 1), (129, 127), (65, 190)])
def test_every_kernel_has_the_same_mask(on: Place, dtype: str, lengths: tuple[int, int]) -> None:
    """Read off the output, at tails of queries and keys."""
    shape = (2, 2, *lengths)
    kind = arrays(1, 1, dtype=dtype)[0].dtype
    shown = shown_by_output(lambda *x: on.run(*x, **DROP), shape, P, kind)
    np.testing.assert_array_equal(shown, mask(shape, P))


@everywhere(*RULED)
@each("dim", [32, 64, 96, 128, 192, 256])
def test_head_dims(on: Place, dim: int) -> None:
    q, k, v = arrays(150, 200, dim, heads=4, heads_kv=2)
    check(on.run(q, k, v, **DROP, causal=True), q, k, v, **DROP, causal=True)


@everywhere(*RULED)
@each("queries", [1, 5, 16])
def test_grouped_heads_in_one_tile(on: Place, queries: int) -> None:
    """Neighbouring rows are queries of other heads; keys are shared out."""
    q, k, v = arrays(queries, 3008, heads=16, heads_kv=2)
    check(on.run(q, k, v, **DROP), q, k, v, **DROP)


@everywhere(*RULED)
@each("rules", [
    {"mask": True, "bias": True},
    {"sink": True, "alibi_slopes": True},
])  # fmt: skip
def test_with_other_rules(on: Place, rules: dict[str, Any]) -> None:
    q, k, v = arrays(90, 128, heads=4, heads_kv=2)
    rng = np.random.default_rng(0)
    made = {
        "mask": rng.random((4, 90, 128)) > 0.3,
        "bias": rng.standard_normal((90, 128)).astype(np.float16),
        "sink": rng.standard_normal(4).astype(np.float32),
        "alibi_slopes": rng.random(4).astype(np.float32) / 10,
    }
    given = DROP | {name: made[name] for name in rules}
    check(on.run(q, k, v, **given), q, k, v, **given)


@everywhere(*PACKED)
@each("rules", [{}, {"causal": True}])
def test_packed_batches(on: Place, rules: dict[str, Any]) -> None:
    lengths = ((0, 5), (33, 0), (77, 100), (130, 64), (1, 1), (200, 90))
    q_starts, k_starts = (np.cumsum([0, *x]).astype(np.int32) for x in zip(*lengths, strict=True))
    rng = np.random.default_rng(0)
    q = rng.standard_normal((q_starts[-1], 4, 64)).astype(np.float16)
    k, v = (rng.standard_normal((k_starts[-1], 2, 64)).astype(np.float16) for _ in range(2))
    given = DROP | rules | {"cu_seqlens_q": q_starts, "cu_seqlens_k": k_starts}
    check(on.run(q, k, v, **given), q, k, v, **given)


@everywhere(*RULED)
def test_scores_far_from_zero(on: Place) -> None:
    """Rows that are computed again, key by key."""
    q, k, v = arrays(20, 70)
    q, k = q * np.float16(60), k * np.float16(60)
    given = DROP | {"softmax_scale": 3e3}
    check(on.run(q, k, v, **given), q, k, v, **given)


@everywhere(*RULED)
def test_seed_and_offset_from_an_array(on: Place) -> None:
    """It is read at the launch, by the kernel."""
    q, k, v = arrays(40, 70)
    expected = {rng: on.run(q, k, v, dropout_p=P, rng=rng) for rng in (RNG, (7, 0), (7, 1))}
    assert len({x.tobytes() for x in expected.values()}) == 3, "each draws anew"
    for rng, o in expected.items():
        given = np.array(rng, np.uint64)
        for array in (given, given.view(np.int64)):
            np.testing.assert_array_equal(on.run(q, k, v, dropout_p=P, rng=array), o)
    rng = on.xp.array((1, 2), np.uint64)
    bound = on.launched(q, k, v, dropout_p=P, rng=rng)
    for values, o in expected.items():
        rng[:] = on.xp.asarray(np.array(values, np.uint64))
        bound.launch()
        np.testing.assert_array_equal(on.to_host(bound.arrays["o"]), o)


@everywhere(*RULED)
@each("gate", ["qk", "softmax", "pv"])
def test_gates(on: Place, gate: str) -> None:
    """Scores and the softmax are what dropout gets; gate pv has the mask."""
    q, k, v = arrays(70, 90)
    got = on.run(q, k, v, gate=gate, **DROP)
    if gate == "pv":
        expected = reference.gate_uniform(q, k, v, **DROP)
        np.testing.assert_allclose(got.astype("f8"), expected, atol=2e-3)
    else:
        np.testing.assert_array_equal(got, on.run(q, k, v, gate=gate))


@everywhere(*RULED)
def test_without_it_bits_are_the_same(on: Place) -> None:
    q, k, v = arrays(70, 90)
    plain = on.run(q, k, v)
    np.testing.assert_array_equal(on.run(q, k, v, dropout_p=0.0, rng=RNG), plain)
    np.testing.assert_array_equal(on.run(q, k, v, dropout_p=2.0**-20), plain)


def test_batch_invariance(on: Place) -> None:
    """A sequence at the same place gives the same bits in a smaller batch."""
    for kernel in ("mma_sm80", "wgmma_sm90"):
        if not on.takes(kernel):
            continue
        q, k, v = arrays(70, 90, batch=3)
        given = DROP | {"batch_invariant": True}
        whole = on.by(kernel).run(q, k, v, **given)
        alone = on.by(kernel).run(q[:1], k[:1], v[:1], **given)
        np.testing.assert_array_equal(whole[:1], alone)


def test_refused_on_a_gpu(on: Place) -> None:
    if on.kind != "gpu":
        pytest.skip("needs an array on a GPU")
    q, k, v = (on.xp.asarray(x) for x in arrays(5, 7))
    strided = on.xp.zeros(4, np.uint64)[::2]
    with pytest.raises(ValueError, match="rng: is not contiguous"):
        on.attention(q, k, v, dropout_p=P, rng=strided)
    with pytest.raises(TypeError, match="rng: a CuPy array while q is a NumPy array"):
        on.attention(*arrays(5, 7), kernel="auto", dropout_p=P, rng=on.xp.zeros(2, np.uint64))
