"""Scores of any size that float32 holds: o and LSE are right, in every kernel, with every rule.

A tile's exponents subtract the maximum: where it is far from 0 its rounding may not show. Most
scores here are exact, so that nothing but the softmax is tried: q has two columns, and k.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_edges import SIZES, pack, sized
from places import EXACT, RULED, Place, each, everywhere

from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.cpu import reference
from flashcore_cupy.problem.attention_problem import DTYPES

NUMPY_SIZES = ("few blocks", "clusters")  # its tiles are the same for all


def sized_like(*sizes: str, emulated: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    """Each size with each dtype."""
    by_numpy = [size for size in sizes if size in NUMPY_SIZES]
    return each(
        "size, dtype",
        itertools.product(sizes, DTYPES),
        numpy=itertools.product(by_numpy, DTYPES),
        emulated=emulated,
    )


ONCE = [
    *(("few blocks", "float16"), ("few blocks", "float32"), ("decode", "float16")),
    *(("enough", "float16"), ("grouped", "bfloat16")),
]
every_size = sized_like(*SIZES, emulated=ONCE)
two_sizes = sized_like(
    *("few blocks", "enough"),
    emulated=[("enough", "float16")],
)
four_sizes = sized_like(
    *("decode", "few blocks", "enough", "clusters"),
    emulated=[
        *(("few blocks", "bfloat16"), ("decode", "float16"), ("enough", "float16")),
        *(("clusters", "bfloat16"), ("few blocks", "float32")),
    ],
)
TOLERANCE = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2e-6}


def normal(on: Place, size: str, dtype: str, dim: int = 64) -> list[np.ndarray]:
    return sized(on, size, dtype=dtype, dim=dim, multiple=16)  # that masks take


def operands(on: Place, size: str, dtype: str, dim: int = 64) -> list[np.ndarray]:
    """Zeros for q and k, N(0, 1) for v."""
    q, k, v = normal(on, size, dtype, dim)
    return [np.zeros_like(q), np.zeros_like(k), v]


def levels(on: Place, size: str, dtype: str, dim: int = 64) -> list[np.ndarray]:
    """Products of -2 to 2: in every other row they rise from tile to tile, in the others they fall.

    Tiles of both ends have two of them.
    """
    q, k, v = operands(on, size, dtype, dim)
    keys = k.shape[2]
    q[..., 3] = np.where(np.arange(q.shape[1] * q.shape[2]) % 2, 1, -1).reshape(q.shape[1:3])
    k[..., 3] = np.clip(np.arange(keys) * 7 // keys - 3, -2, 2)
    k[:, :, [0, keys - 1], 3] = 0
    return [q, k, v]


_KNOWN: dict[bytes, tuple[Any, ...]] = {}


def wanted(q: Any, k: Any, v: Any, **rules: Any) -> tuple[Any, ...]:
    """The oracle's o and LSE, and the naive o; once for all kernels that a test goes through."""
    rules = {n: x.python if isinstance(x, Mod) else x for n, x in rules.items()}
    given = [x for x in (q, k, v, *rules.values()) if isinstance(x, np.ndarray)]
    others = [(n, x) for n, x in rules.items() if not isinstance(x, np.ndarray)]
    digest = hashlib.sha256(repr((others, [(x.shape, x.dtype) for x in given])).encode())
    for x in given:
        digest.update(np.ascontiguousarray(x).view(np.uint8))
    key = digest.digest()
    if key not in _KNOWN:
        if len(_KNOWN) >= 24:
            _KNOWN.clear()
        oracle, naive = reference.oracle, reference.naive
        if "cu_seqlens_q" in rules:
            oracle, naive = reference.oracle_varlen, reference.naive_varlen
        _KNOWN[key] = *oracle(q, k, v, **rules), naive(q, k, v, **rules)
    return _KNOWN[key]


def right(on: Place, q: Any, k: Any, v: Any, **rules: Any) -> None:
    """O by the acceptance rule, and the LSE to 1e-6 of itself."""
    o, lse = on.run(q, k, v, return_lse=True, **rules)
    expected, expected_lse, naive = wanted(q, k, v, **rules)
    comparison = reference.compare(o, expected, naive)
    assert comparison.ok, comparison.reason
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-5)


# ---- no rules ------------------------------------------------------------------------------------

#: What q and k hold in their column, and the scale; None is 1/8.
EQUAL: dict[str, list[tuple[float, float, float | None]]] = {
    "float16": [(448, -1880, None), (448, 1880, None), (64000, -64000, None), (64000, 64000, None)],
    "bfloat16": [(448, -1880, None), (3e5, -3e5, None), (3e6, 3e6, None), (1e15, -1e15, None)],
    "float32": [(448, 1880, None), (3e5, -3e5, None), (-3e6, -3e6, None), (1e15, 1e15, None)],
}
#: A product of 1 or 3 makes any score.
SCALED = [(1.0, sign * level, scale) for sign in (-1, 1) for level, scale in ((1, 1e10), (3, 1e38))]


@everywhere(*EXACT)
@every_size
def test_equal_scores_give_the_mean(on: Place, size: str, dtype: str) -> None:
    q, k, v = operands(on, size, dtype)
    for a, b, scale in on.few(*EQUAL[dtype], *SCALED):
        q[..., 3], k[..., 3] = a, b
        right(on, q, k, v, softmax_scale=0.125 if scale is None else scale)


@everywhere(*EXACT)
@every_size
def test_maxima_that_rise_and_fall_from_tile_to_tile(on: Place, size: str, dtype: str) -> None:
    q, k, v = levels(on, size, dtype)
    for scale in on.few(1e4, 1e6, 5e6, 1e10, 1e30, 8e37):
        right(on, q, k, v, softmax_scale=scale)
        right(on, q, k, v, softmax_scale=scale, causal=True)


@everywhere(*EXACT)
@every_size
def test_far_rows_leave_their_neighbours_as_they_are(on: Place, size: str, dtype: str) -> None:
    """Every third row is far from zero; the others get the bits that they get beside zeros."""
    q, k, v = normal(on, size, dtype)
    keys = k.shape[2]
    k[..., 3] = np.clip(np.arange(keys) * 7 // keys - 3, -2, 2) * 1024
    q[..., 3] = 0
    q[:, :, ::3] = 0
    beside_zeros = on.run(q, k, v, return_lse=True)
    q[:, :, ::3, 3] = 32768
    right(on, q, k, v)
    near = np.arange(q.shape[2]) % 3 > 0
    for got, expected in zip(on.run(q, k, v, return_lse=True), beside_zeros, strict=True):
        np.testing.assert_array_equal(got[:, :, near], expected[:, :, near])


#: Tiles of other forms: two and four warps that share the scores of their rows, O in 16 columns.
DIMS = [
    *(("float16", dim) for dim in (16, 32, 80, 128, 192, 256, 512)),
    *(("float32", dim) for dim in (32, 128, 256)),
]


@everywhere("mma_sm80", "wgmma_sm90")
@each("dtype, dim", DIMS, emulated=[x for x in DIMS if x[1] in (80, 128, 192, 512)])
def test_other_head_dims(on: Place, dtype: str, dim: int) -> None:
    for size in ("few blocks", "enough") if on.kind == "gpu" else ("few blocks",):
        q, k, v = levels(on, size, dtype, dim)
        for scale in on.few(1e6, 1e10, 8e37):
            right(on, q, k, v, softmax_scale=scale, causal=True)
        if not on.is_emulated:  # where it would be another build
            right(on, q, k, v, softmax_scale=-1e10)  # scores of another unit


#: A GPU multiplies and adds with one rounding. The emulator does where the kernel says so, which
#: the exponents of the fast kernels do not: further from zero their weights are off, and in float32
#: that shows before.
FAR_EMULATED = (10, 12)


@everywhere(*EXACT)
@sized_like(*SIZES, emulated=[pair for pair in ONCE if pair[1] != "float32"])
def test_small_differences_far_from_zero(on: Place, size: str, dtype: str) -> None:
    """Scores of an offset and 0 to 4, all exact: the weights are those of 0 to 4."""
    q, k, v = operands(on, size, dtype)
    q[..., 5], k[..., 5] = 1, np.arange(k.shape[2]) * 3 % 5
    # In log2 units, 2^22.5 at most: a 2^-1.5 of rounding.
    for exponent in FAR_EMULATED if on.is_emulated else (12, 16, 18, 20, 21, 22):
        for sign in (-1, 1):
            q[..., 3], k[..., 3] = sign * 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
            right(on, q, k, v, softmax_scale=1.0)


@everywhere(*EXACT)
@every_size
def test_the_largest_of_scores_far_apart_gives_its_value(on: Place, size: str, dtype: str) -> None:
    q, k, v = normal(on, size, dtype)
    times = 3000 if dtype == "float16" else 1e5
    q, k = ((x.astype(np.float32) * times).astype(x.dtype) for x in (q, k))
    scores = np.sort(reference.gate_scores(q, k, v), -1)
    clear = scores[..., -1] - scores[..., -2] > 1e-5 * np.abs(scores).max()
    assert clear.mean() > 0.9, "else the order of the sums decides"
    expected, expected_lse, _ = wanted(q, k, v)
    o, lse = on.run(q, k, v, return_lse=True)
    assert np.isfinite(o).all()
    error = np.abs(o.astype(np.float64) - expected)[clear]
    assert error.max() <= TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(lse, expected_lse, rtol=4e-6)


@everywhere(*EXACT)
@two_sizes
def test_stages_of_scores_far_from_zero(on: Place, size: str, dtype: str) -> None:
    q, k, v = levels(on, size, dtype)
    for scale in on.few(1e4, 1e10, 8e37):
        scores = on.run(q, k, v, softmax_scale=scale, gate="qk")
        expected = reference.gate_scores(q, k, v, softmax_scale=scale)
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
        p = on.run(q, k, v, softmax_scale=scale, gate="softmax")
        expected = reference.gate_probabilities(q, k, v, softmax_scale=scale)
        np.testing.assert_allclose(p, expected, rtol=0, atol=TOLERANCE[dtype])


# ---- rules ---------------------------------------------------------------------------------------

#: Beside products of -2 to 2, scaled by 2^33 unless said otherwise: with slopes of 2^30 exact, too.
RULES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 100.0},
    "softcap, wide": {"softcap": 2e10},
    "alibi": {"alibi_slopes": 2.0**30},
    "alibi, scores near 0": {"alibi_slopes": 2.0**30, "softmax_scale": 1.0},
    "score_mod": {"score_mod": Mod("score * 1e10f", lambda s, *_: s * s.dtype.type(1e10))},
    "score_mod, offset": {
        "score_mod": Mod("score - 1048576", lambda s, *_: s - s.dtype.type(1048576)),
        "softmax_scale": 1.0,
    },
    "mask_mod": {"mask_mod": Mod("kv_idx % 3 != 1", lambda b, h, i, j: j % 3 != 1)},
    "window": {"window": (90, 20)},
    "negative scale": {"softmax_scale": -(2.0**33)},
    "scale of 0": {"softmax_scale": 0.0},
    "sink below": {"sink": -(2.0**34)},
    "sink at the maximum": {"sink": 2.0**34},
    "sink above": {"sink": 1e30},
    "sink at 0": {"sink": 0.0},
}
#: Nothing else is compiled for these; for the last, see FAR_EMULATED.
LIKE_OTHERS = (
    "softcap",
    "alibi, scores near 0",
    "score_mod",
    "scale of 0",
    "sink below",
    "sink at 0",
    "score_mod, offset",
)


@everywhere(*RULED)
@four_sizes
@each("name", RULES, emulated=[name for name in RULES if name not in LIKE_OTHERS])
def test_rules_on_scores_far_from_zero(on: Place, size: str, dtype: str, name: str) -> None:
    q, k, v = levels(on, size, dtype)
    rules = {"softmax_scale": 2.0**33} | RULES[name]
    for array in ("alibi_slopes", "sink"):
        if array in rules:
            rules[array] = np.full(q.shape[1], rules[array], np.float32)
    right(on, q, k, v, **rules)


@everywhere(*RULED)
@four_sizes
def test_masks_on_scores_far_from_zero(on: Place, size: str, dtype: str) -> None:
    """Also of all keys but those of the lowest level, and of all keys of some rows."""
    q, k, v = levels(on, size, dtype)
    mask = np.random.default_rng(0).random((q.shape[2], k.shape[2])) < 0.5
    right(on, q, k, v, softmax_scale=1e10, mask=mask)
    mask[:] = np.arange(k.shape[2]) < k.shape[2] // 8
    mask[0] = False
    right(on, q, k, v, softmax_scale=1e10, mask=mask)


def biases(kind: str, queries: int, keys: int) -> Iterator[np.ndarray]:
    """Levels up to the largest number; whole rows of the lowest, beside others that have a 0."""
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    largest = float(ml_dtypes.finfo(dtype).max)
    for size in (largest, largest / 1e3):
        steps = np.linspace(-1, 1, 7)[np.arange(keys) * 7 // keys]
        yield np.broadcast_to(size * steps, (1, 1, queries, keys)).astype(dtype)
    whole = np.where(np.tri(queries, keys), 0, -largest)
    whole[:9] = -largest
    yield whole[None, None].astype(dtype)
    whole[..., ::5] = -np.inf  # which hides a key
    yield whole[None, None].astype(dtype)
    yield np.full((1, 1, queries, keys), -largest, dtype)


@everywhere(*RULED)
@each(
    "dtype, kind",
    [(d, kind) for d in DTYPES for kind in dict.fromkeys((d, "float32"))],
    emulated=[("float16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")],
)
@each("size", SIZES, numpy=NUMPY_SIZES, emulated=("decode", "enough", "few blocks"))
def test_a_finite_bias_hides_no_key(on: Place, size: str, dtype: str, kind: str) -> None:
    q, k, v = normal(on, size, dtype)
    for bias in biases(kind, q.shape[2], k.shape[2]):
        right(on, q, k, v, bias=bias)


CAPS = (1e-3, 0.5, 30.0, 128.0, 129.0, 1e4, 1e5, 1e6, 1e8, 1e20, 1e30, 3e38, np.inf)


@everywhere(*RULED)
@two_sizes
def test_a_softcap_is_accurate_relative_to_the_score(on: Place, size: str, dtype: str) -> None:
    """And a usual one in 16 bit to 2^-21 of itself, by which no softmax is off."""
    q, k, v = operands(on, size, dtype)
    rng = np.random.default_rng(0)
    q[..., 3] = rng.standard_normal(q.shape[:3]) * 8  # one column: scores are off by a rounding
    k[..., 3] = rng.standard_normal(k.shape[:3]) * 8
    for cap in on.few(*CAPS):
        got = on.run(q, k, v, softcap=cap, gate="qk")
        expected = reference.gate_scores(q, k, v, softcap=cap)
        usual = dtype != "float32" and cap <= 128
        allowed = 4e-6 * np.abs(expected) + (2.0**-21 * cap if usual else 0)
        if 1e30 < cap < np.inf:  # the ratio to it may be subnormal
            allowed += 2.0**-149 * cap
        assert (np.abs(got - expected) <= allowed).all(), f"cap {cap:g}"
        right(on, q, k, v, softcap=cap)


# ---- packed --------------------------------------------------------------------------------------


@everywhere(*RULED)
@each("dtype", DTYPES)
@each("heads_kv", [1, 8])
@each("lengths", [((3, 700), (1, 90), (2, 40)), ((150, 90), (7, 300), (80, 80))])
def test_packed_scores_far_from_zero(
    on: Place, lengths: tuple[tuple[int, int], ...], heads_kv: int, dtype: str
) -> None:
    (q, k, v), bounds = pack(lengths, heads=8, heads_kv=heads_kv, dtype=dtype)
    q[...], k[...] = 0, 0
    q[..., 3] = np.where(np.arange(len(q)) % 2, 1, -1)[:, None]
    k[..., 3] = (np.arange(len(k)) * 31 // len(k) % 5 - 2)[:, None]
    for scale in (1e4, 1e10):
        right(on, q, k, v, softmax_scale=scale, causal=True, **bounds)
