"""Gradients by kernels, on a GPU or emulated: against float64, at tails, with every rule."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases_gradients import FLOAT32, Rules, asked, operands, random
from drawn_blocks import FULL, RULE, Drawn, drawn, poisoned_keys, poisoned_queries
from kernel_gradients import (
    BRAIN,
    DROP,
    HALF,
    HEADS,
    SINGLE,
    by_kernel,
    check,
    dtype_of,
    gradients,
    runs,
)
from places import Place, each, unchecked_boundaries

from flashcore_cupy import attention
from flashcore_cupy.backward import attention_backward
from flashcore_cupy.check import verify_gradients
from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.problem.gradients import by_result
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS, ROWS

BENT = Mod(
    "q_idx > kv_idx ? tanhf(score) : 0.5f * score",
    lambda score, b, h, i, j: np.where(i > j, np.tanh(score), score * np.float32(0.5)),
)
THIRDS = Mod("(q_idx + 2 * kv_idx + h) % 3 != 0", lambda b, h, i, j: (i + 2 * j + h) % 3 != 0)

DIMS = [(row.kernel, row.dims, row.dtypes[0]) for row in ROWS if row.dims not in [(512, 512)]]
#: Heads that have a wider row.
BETWEEN = [
    ("bwd_sm80", (40, 72), HALF),
    ("bwd_sm90_wide", (136, 40), BRAIN),
    ("bwd_sm90_wide", (200, 248), HALF),
]
FEW = [
    ("bwd_sm90", (64, 64), HALF), ("bwd_sm90", (128, 128), BRAIN), ("bwd_sm80", (192, 128), HALF),
    ("bwd_sm90_wide", (192, 128), HALF), ("bwd_sm90_wide", (256, 256), BRAIN),
    ("bwd_sm80", (256, 256), BRAIN), ("bwd_sm80", (128, 128), SINGLE), *BETWEEN,
]  # fmt: skip


@each("kernel, dims, dtype", [*DIMS, *BETWEEN], emulated=FEW)
@each("drop", [{}, {"dropout_p": 0.2, "rng": (1, 2)}])
def test_head_dims(on: Place, kernel: str, dims: tuple[int, int], dtype: str, drop: Rules) -> None:
    sizes = {"seqlen": 150, "seqlen_kv": 200, "dtype": dtype_of(dtype)}
    sizes |= {"head_dim": dims[0], "head_dim_v": dims[1]}
    if kernel == "bwd_sm90_wide":
        drop = {}  # it has none
    check(on, kernel, sizes, {"causal": True, **drop})


LENGTHS = [
    (1, 1), (1, 63), (64, 64), (65, 63), (63, 65), (127, 129), (129, 127), (192, 64), (1, 200),
    (200, 1), (0, 5), (5, 0),
]  # fmt: skip


@each("kernel", BACKWARD_KERNELS)
@each("lengths", LENGTHS)
@each("causal", [False, True, "top-left"])
def test_lengths(on: Place, kernel: str, lengths: tuple[int, int], causal: Any) -> None:
    sizes = {"seqlen": lengths[0], "seqlen_kv": lengths[1], "dtype": np.dtype(HALF), "batch": 2}
    check(on, kernel, sizes, {"causal": causal} if causal else {}, dlse=True)


S, T = 90, 130
EXTRAS: dict[str, Rules] = {
    "none": {},
    "window": {"window": (20, 9)},
    "window and causal": {"window": (30, -1), "causal": True},
    "softcap": {"softcap": 1.5},
    "slopes": {"alibi_slopes": random(HEADS, seed=8) * FLOAT32.type(0.1), "causal": True},
    "slopes of batches": {"alibi_slopes": random(2, HEADS, seed=8) * FLOAT32.type(0.1)},
    "bias": {"bias": random(2, HEADS, S, T, seed=9, dtype=HALF)},
    "bias of all batches": {"bias": random(1, HEADS, S, T, seed=9), "causal": True},
    "bias of keys": {"bias": random(HEADS, 1, T, seed=9), "softcap": 2.0},
    "bias of queries": {"bias": random(2, 1, S, 1, seed=9, dtype=HALF)},
    "one bias": {"bias": random(1, seed=9)},
    "sink": {"sink": random(HEADS, seed=10), "causal": True},
    "score_mod": {"score_mod": BENT},
    "score_mod and bias": {"score_mod": BENT, "bias": random(S, T, seed=9)},
    "mask": {"mask": np.random.default_rng(7).random((2, HEADS, S, T)) > 0.4},
    "dropout": DROP,
    "dropout from an array": {"dropout_p": 0.6, "rng": np.array((7, 2**40), np.uint64)},
    "dropout, causal": DROP | {"causal": True, "sink": random(HEADS, seed=10)},
    "dropout, softcap, bias": DROP | {"softcap": 1.5, "bias": random(S, T, seed=9)},
    "dropout, slopes": DROP | {"alibi_slopes": random(HEADS, seed=8) * FLOAT32.type(0.1)},
    "mask_mod": {"mask_mod": THIRDS, "window": (60, -1)},
    "all": {
        "softcap": 2.0, "alibi_slopes": random(HEADS, seed=8) * FLOAT32.type(0.1),
        "bias": random(S, T, seed=9), "sink": random(HEADS, seed=10), "score_mod": BENT,
        "mask": np.random.default_rng(7).random((S, T)) > 0.4, "mask_mod": THIRDS, "causal": True,
        **DROP,
    },
}  # fmt: skip
#: Kernels that take packed batches.
PACKS = [name for name, family in BACKWARD_KERNELS.items() if family.takes_packed]
ON_WIDE = ("none", "window", "window and causal", "sink")


def kernels_with(name: str) -> list[str]:
    return [k for k in BACKWARD_KERNELS if k != "bwd_sm90_wide" or name in ON_WIDE]


OF_RULES = [(kernel, name) for name in EXTRAS for kernel in kernels_with(name)]
BY_TURNS = [
    (kernels[n % len(kernels)], name)
    for n, name in enumerate(EXTRAS)
    if (kernels := kernels_with(name))
]


@each("kernel, name", OF_RULES, emulated=BY_TURNS)
def test_rules(on: Place, kernel: str, name: str) -> None:
    sizes = {"seqlen": S, "seqlen_kv": T, "dtype": np.dtype(HALF), "batch": 2, "head_dim": 32}
    check(on, kernel, sizes | {"head_dim_v": 32}, EXTRAS[name])


@each("dim", [32, 64, 128])
@each("mask", ["q", THIRDS, "kv"])
@each("position", [{}, {"causal": True}, {"window": (40, 9)}, {"window": (-1, 9), "softcap": 2.0}])
@each("deterministic", [True, False])
@each("drop", [{}, {}, DROP])
def test_masks_on_hopper(
    on: Place, dim: int, mask: Any, position: Rules, deterministic: bool, drop: Rules
) -> None:
    """At sizes that blocks of 128 keys, and tiles of 64 queries, do not divide."""
    runs(on, "bwd_sm90")
    rules = {**position, **drop}
    if isinstance(mask, Mod):
        rules["mask_mod"] = mask
    elif mask:  # of some batches, whole rows or whole columns; of all, some elements
        hidden = np.random.default_rng(7).random((2, 1, 150, 200)) < 0.4
        rows = hidden[:, :, :, :1] if mask == "q" else hidden[:, :, :1, :]
        rules["mask"] = ~(hidden & (np.random.default_rng(8).random(hidden.shape) < 0.5) | rows)
    sizes = {"seqlen": 150, "seqlen_kv": 200, "head_dim": dim, "head_dim_v": dim, "batch": 2}
    q, k, v = operands(heads=HEADS, heads_kv=2, dtype=np.dtype(HALF), **sizes)
    plain = by_kernel(rules, on_kernel=False)
    o, lse = attention(q, k, v, return_lse=True, **plain)
    do = random(*o.shape, dtype=HALF, seed=5)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    expected = verify_gradients.expect(do, q, k, v, **plain)
    got = gradients(on, "bwd_sm90", given, ("q", "k", "v"), rules, deterministic=deterministic)
    faults = expected.faults(got)
    assert not faults, faults


def visible(draw: Drawn, positions: Rules, mask: Any) -> np.ndarray:
    """Where a query sees a key, by blocks, their rules and positions, (B or 1, heads, Sq, Skv)."""
    dense = draw.dense(HEADS)
    if mask is not None:
        full = np.repeat(draw.elements(FULL), HEADS // draw.states.shape[1], axis=1)
        dense = full | (dense & mask)
    i, j = np.ogrid[: draw.seqlens[0], : draw.seqlens[1]]
    if positions.get("causal") != "top-left":
        i = i + (draw.seqlens[1] - draw.seqlens[0])
    left, right = positions.get("window", (-1, 0 if positions.get("causal") else -1))
    seen = (j <= i + right if right >= 0 else j >= 0) & (j >= i - left if left >= 0 else j >= 0)
    return dense & seen


def check_block_mask(
    on: Place, kernel: str, draw: Drawn, rules: Rules, dims: tuple[int, int], dtype: str, wrt: Any
) -> None:
    """Gradients of a block mask, against the same as a mask of each element.

    What no one sees holds NaN: keys and values, queries and their gradients.
    """
    runs(on, kernel)
    rng = np.random.default_rng(11)
    positions = {name: x for name, x in rules.items() if name in ("causal", "window")}
    mask = rng.random(rules["mask"]) < 0.7 if "mask" in rules else None
    dense = visible(draw, positions, mask)
    others = {name: x for name, x in rules.items() if name != "mask"}
    own: Rules = {"block_mask": draw.mask(on.xp, rng, stray=True), "mask_mod": RULE, **others}
    if mask is not None:
        own["mask"] = mask
    sizes = {"seqlen": draw.seqlens[0], "seqlen_kv": draw.seqlens[1], "batch": 2}
    sizes |= {"head_dim": dims[0], "head_dim_v": dims[1]}
    q, k, v = operands(heads=HEADS, heads_kv=2, dtype=dtype_of(dtype), **sizes)
    k, v = (poisoned_keys(x, dense, 2) for x in (k, v))
    q = poisoned_queries(q, dense)
    plain = others | {"mask": dense}
    o, lse = attention(q, k, v, return_lse=True, **plain)
    do = poisoned_queries(random(*o.shape, dtype=q.dtype, seed=5), dense)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    expected = verify_gradients.expect(do, q, k, v, wrt=wrt, **plain)
    kernel = "bwd_sm80" if on.is_emulated and kernel == "auto" else kernel
    got, again = (gradients(on, kernel, given, wrt, own) for _ in range(2))
    faults = expected.faults(got)
    assert not faults, faults
    for name, x in by_result(got).items():
        assert x.tobytes() == by_result(again)[name].tobytes(), f"{name}: other bits again"


@each("kernel", ["bwd_sm80", "bwd_sm90", "auto"])
@each("block", [(128, 128), (64, 128), (128, 64), (64, 64)])
@each("lists", [(1, 1), (2, 2), (1, HEADS), (2, HEADS), (2, 1)])
@each("seqlens", [(150, 200), (300, 129), (65, 333), (321, 321)])
@each(
    "more",
    [
        {},
        {"causal": True},
        {"mask": (1, 1)},
        {"mask": (2, 1, 1, 1), **DROP},
        {"causal": "top-left", "mask": (1, 1)},
        {"window": (90, 40)},
        {"window": (-1, 20), "softcap": 5.0},
    ],
)
def test_block_masks(
    on: Place,
    kernel: str,
    block: tuple[int, int],
    lists: tuple[int, int],
    seqlens: tuple[int, int],
    more: Rules,
) -> None:
    """A mask and mask_mod are asked in mixed blocks alone; positions hide in all."""
    draw = drawn(np.random.default_rng(7), seqlens, block, lists, unseen=1)
    if "mask" in more:
        shape = *more["mask"][:-2], *seqlens
        more = more | {"mask": shape}
    check_block_mask(on, kernel, draw, more, (64, 64), HALF, ("q", "k", "v"))


#: Rows of several tiles, of kernels that walk over lists.
LISTED = [
    ("bwd_sm80", (32, 32), BRAIN), ("bwd_sm80", (128, 128), HALF), ("bwd_sm80", (192, 128), HALF),
    ("bwd_sm80", (512, 512), HALF), ("bwd_sm80", (64, 64), SINGLE), ("bwd_sm80", (128, 40), SINGLE),
]  # fmt: skip


@each("kernel, dims, dtype", LISTED)
@each("block", [(64, 128), (128, 64)])
def test_tiles_in_lists(
    on: Place, kernel: str, dims: tuple[int, int], dtype: str, block: tuple[int, int]
) -> None:
    draw = drawn(np.random.default_rng(3), (150, 200), block, (1, HEADS), unseen=0)
    check_block_mask(on, kernel, draw, {"causal": True}, dims, dtype, ("q", "k", "v"))


@each("shape", [(2, HEADS, 150, 200), (1, 1, 150, 1), (HEADS, 1, 200)])
@each("block", [(64, 128), (128, 64)])
def test_gradients_of_rules_beside_a_block_mask(
    on: Place, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    """The bias's has lists of its own; those of sinks and slopes come from dQ's."""
    draw = drawn(np.random.default_rng(5), (150, 200), block, (2, 2), unseen=1)
    rules: Rules = {"bias": random(*shape, seed=8), "sink": random(HEADS, seed=9)}
    rules["alibi_slopes"] = np.abs(random(HEADS, seed=10))
    check_block_mask(on, "bwd_sm80", draw, rules, (64, 64), HALF, asked(rules))
    check_block_mask(on, "bwd_sm80", draw, rules, (64, 64), HALF, ("bias",))
    check_block_mask(on, "bwd_sm90", draw, rules, (64, 64), HALF, ("bias", "q"))


LENGTHS_PACKED = (
    ((0, 5), (33, 0), (40, 70), (1, 1), (0, 0), (20, 90)),
    ((130, 257), (64, 128), (0, 3), (200, 61), (65, 1), (5, 0)),
)


def packed(lengths: Any, dim: int, dtype: str, rules: Rules) -> tuple[dict[str, Any], Rules]:
    """The arrays and rules of a packed batch."""
    starts_q, starts_k = (np.cumsum([0, *x]).astype(np.int32) for x in zip(*lengths, strict=True))
    rules = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, **rules}
    q = random(starts_q[-1], HEADS, dim, dtype=dtype, seed=1)
    k, v = (random(starts_k[-1], 2, dim, dtype=dtype, seed=n) for n in (2, 3))
    o, lse = attention(q, k, v, return_lse=True, **by_kernel(rules, on_kernel=False))
    do = random(*o.shape, dtype=dtype, seed=5)
    return {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}, rules


@each(
    "kernel, dtype, dim",
    [
        ("bwd_sm80", HALF, 40), ("bwd_sm80", SINGLE, 40), ("bwd_sm90", HALF, 40),
        ("bwd_sm90", HALF, 64), ("bwd_sm90", HALF, 96), ("bwd_sm90", HALF, 128),
    ],
)  # fmt: skip
@each("causal", [False, True, "top-left"])
@each("rest", [{}, DROP, {"mask_mod": THIRDS}, {"window": (30, 12)}, {"softcap": 2.0}])
@each("deterministic", [True, False])
@each("lengths", LENGTHS_PACKED)
def test_packed_batches(
    on: Place, kernel: str, dtype: str, dim: int, causal: Any, rest: Rules, deterministic: bool,
    lengths: Any,
) -> None:  # fmt: skip
    runs(on, kernel)
    given, rules = packed(lengths, dim, dtype, {"causal": causal, **rest})
    do, q, k, v = (given[name] for name in ("do", "q", "k", "v"))
    expected = verify_gradients.expect(do, q, k, v, **by_kernel(rules, on_kernel=False))
    got = gradients(on, kernel, given, ("q", "k", "v"), rules, deterministic=deterministic)
    faults = expected.faults(got)
    assert not faults, faults


@each("kernel", PACKS)
@each("dim", [64, 96, 128])
@each("causal", [True, False])
@each("rest", [{}, {"window": (20, 7)}, {"mask_mod": THIRDS}])
@each("deterministic", [True, True, False])
@each("wrt", [("q", "k", "v"), ("k",), ("q",)], emulated=[("q", "k", "v"), ("k",), ("q",)])
def test_neighbours_in_a_packed_batch_may_hold_nan(
    on: Place, kernel: str, dim: int, causal: bool, rest: Rules, deterministic: bool, wrt: Any
) -> None:
    """And queries and keys of the sequence itself that meet nobody by position."""
    runs(on, kernel)
    lengths = ((40, 70), (20, 100), (150, 60), (70, 150), (33, 5))
    given, rules = packed(lengths, dim, HALF, {"causal": causal, **rest})
    clean = by_result(gradients(on, kernel, given, wrt, rules, deterministic=deterministic))
    bounds_q, bounds_k = rules["cu_seqlens_q"], rules["cu_seqlens_k"]
    for n, (queries, keys) in enumerate(lengths):
        own_q, own_k = (slice(*bounds[n : n + 2]) for bounds in (bounds_q, bounds_k))
        i, j = np.indices((queries, keys))
        distance = j - i - (keys - queries)
        left, right = rest.get("window", (queries + keys, queries + keys))
        met = (distance >= -left) & (distance <= (0 if causal else right))
        dirty = dict(given)
        for name, own, axis in (
            ("q", own_q, 1),
            ("do", own_q, 1),
            ("k", own_k, 0),
            ("v", own_k, 0),
        ):
            dirty[name] = np.full_like(given[name], [np.nan, np.inf][n % 2])
            kept = np.flatnonzero(met.any(axis)) + own.start
            dirty[name][kept] = given[name][kept]
        got = by_result(gradients(on, kernel, dirty, wrt, rules, deterministic=deterministic))
        for name, x in got.items():
            own = own_q if name == "dq" else own_k
            np.testing.assert_allclose(
                x[own].astype("f4"), clean[name][own].astype("f4"), atol=1e-3, err_msg=name
            )


@each("kernel", PACKS)
@each("deterministic", [True, False])
def test_rows_of_no_sequence_get_zeros(on: Place, kernel: str, deterministic: bool) -> None:
    runs(on, kernel)
    starts = np.array([3, 40, 40, 90], np.int32)
    q, k, v = (random(100, 2, 64, dtype=HALF, seed=n) for n in range(3))
    rules = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    inside = slice(3, 90)
    whole = {name: x - 3 for name, x in rules.items()}
    o, lse = np.zeros_like(q), np.full((2, 100), -np.inf, np.float32)
    o[inside], lse[:, inside] = attention(q[inside], k[inside], v[inside], return_lse=True, **whole)
    do = random(*o.shape, dtype=HALF, seed=5)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    with unchecked_boundaries():
        got = gradients(on, kernel, given, ("q", "k", "v"), rules, deterministic=deterministic)
    expected = attention_backward(
        *(given[name][inside] for name in ("do", "q", "k", "v", "o")), lse[:, inside], **whole
    )
    for x, y in zip(got[:3], expected[:3], strict=True):
        assert not x[:3].any() and not x[90:].any()
        np.testing.assert_allclose(x[inside].astype("f4"), y.astype("f4"), atol=4e-3)


@each("kernel", BACKWARD_KERNELS)
@each("accumulate", [False, True])
def test_float32_results(on: Place, kernel: str, accumulate: bool) -> None:
    runs(on, kernel)
    q, k, v = operands(HEADS, 2, 90, 130, 64, 64, dtype=np.dtype(HALF))
    o, lse = attention(q, k, v, return_lse=True)
    do = random(*o.shape, dtype=HALF, seed=5)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    plain = gradients(on, kernel, given, ("q", "k", "v"), {})
    before = {f"d{n}": random(*x.shape, seed=7) for n, x in (("q", q), ("k", k), ("v", v))}
    out = {n: on.xp.asarray(x.copy()) for n, x in before.items()}
    got = gradients(on, kernel, given, ("q", "k", "v"), {}, out=out, accumulate=accumulate)
    for name, start in before.items():
        change = getattr(got, name) - (start if accumulate else 0)
        np.testing.assert_allclose(change, getattr(plain, name).astype("f4"), rtol=2e-3, atol=2e-3)


@each("head_dim", [64, 128, 192, 256])
@each("rules", [{}, {"causal": True}, {"window": (30, 20), "softcap": 2.0}, DROP])
def test_sums_in_any_order(on: Place, head_dim: int, rules: Rules) -> None:
    """Where bits may differ, one kernel computes dq, too."""
    kernel = "bwd_sm90" if head_dim <= 128 else "bwd_sm90_wide"
    runs(on, kernel)
    if kernel == "bwd_sm90_wide":
        rules = {name: x for name, x in rules.items() if name in ("causal", "window")}
    q, k, v = operands(HEADS, 2, 150, 200, head_dim, head_dim, 2, np.dtype(HALF))
    o, lse = attention(q, k, v, return_lse=True, **rules)
    do = random(*o.shape, dtype=HALF, seed=5)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    expected = verify_gradients.expect(do, q, k, v, **rules)
    got = gradients(on, kernel, given, ("q", "k", "v"), rules, deterministic=False)
    faults = expected.faults(got)
    assert not faults, faults


@each(
    "kernel, dtype, dim",
    [
        ("bwd_sm80", HALF, 32), ("bwd_sm80", SINGLE, 32), ("bwd_sm90", HALF, 64),
        ("bwd_sm90", BRAIN, 96), ("bwd_sm90", BRAIN, 128),
    ],
)  # fmt: skip
@each("deterministic", [True, False])
@each("poison", [np.nan, -np.inf])
def test_what_nobody_sees_may_hold_nan(
    on: Place, kernel: str, dtype: str, dim: int, deterministic: bool, poison: float
) -> None:
    """Hidden keys, queries that see none, and rows behind the last that counts."""
    runs(on, kernel)
    q, k, v = operands(2, 1, 170, 290, dim, dim, dtype=dtype_of(dtype))
    mask = np.random.default_rng(3).random((1, 2, 170, 290)) > 0.3
    mask[..., 20:25], mask[..., 7, :] = False, False
    mask[..., 128:, :140] = False  # of a tile of queries, no key of a block's
    rules = {"mask": mask, "window": (-1, 10)}
    o, lse = attention(q, k, v, return_lse=True, **rules)
    do = random(*o.shape, dtype=q.dtype, seed=5)
    clean = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    dirty = {name: x if x is None else x.copy() for name, x in clean.items()}
    for name in ("k", "v"):
        dirty[name][:, :, 20:25] = poison
    for name in ("q", "do"):
        dirty[name][:, :, 7] = poison
    x, y = (
        gradients(on, kernel, given, ("q", "k", "v"), rules, deterministic=deterministic)[:3]
        for given in (clean, dirty)
    )
    for one, other in zip(x, y, strict=True):
        if deterministic:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one.astype("f4"), other.astype("f4"), atol=1e-2)


def test_one_pass_keeps_nan_from_who_does_not_see_it(on: Place) -> None:
    """A key that some queries of a tile see and others do not: dq multiplies no NaN of it.

    Two passes do not keep it, and do not promise to.
    """
    runs(on, "bwd_sm90")
    q, k, v = operands(1, 1, 60, 100, 64, 64, dtype=np.dtype(HALF))
    mask = np.ones((60, 100), bool)
    mask[:30, 7] = False
    k[:, :, 7, 3] = np.nan
    rules = {"mask": mask}
    o, lse = attention(q, k, v, return_lse=True, **rules)
    do = random(*o.shape, dtype=HALF, seed=5)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
    dq = gradients(on, "bwd_sm90", given, ("q", "k", "v"), rules).dq
    assert np.isnan(dq[:, :, 30:]).all() and np.isfinite(dq[:, :, :30]).all()


@each("causal", [False, "top-left"])
@each("window", [(10, 0), (5, 40), (-1, 0)])
@each("deterministic", [True, False])
@each("wrt", [("q", "k", "v"), ("k",), ("q",)])
@each("kernel", ["bwd_sm90", "bwd_sm90_wide"])
def test_what_is_far_from_all_may_hold_nan(
    on: Place,
    causal: Any,
    window: tuple[int, int],
    deterministic: bool,
    wrt: tuple[str, ...],
    kernel: str,
) -> None:
    """Keys that no query sees by position, and queries that see none."""
    runs(on, kernel)
    rules = {"causal": causal, "window": window}
    for lengths in ((70, 200), (200, 70)):
        i, j = np.indices(lengths)
        distance = j - i - (0 if causal else lengths[1] - lengths[0])
        seen = (distance <= window[1]) & ((window[0] < 0) | (distance >= -window[0]))
        q, k, v = operands(2, 1, *lengths, 64, 64, dtype=np.dtype(HALF))
        o, lse = attention(q, k, v, return_lse=True, **rules)
        do = random(*o.shape, dtype=HALF, seed=5)
        clean = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": None}
        dirty = {name: x if x is None else x.copy() for name, x in clean.items()}
        for name, axis in (("k", 0), ("v", 0), ("q", 1), ("do", 1)):
            dirty[name][:, :, ~seen.any(axis)] = np.nan
        x, y = (
            by_result(gradients(on, kernel, given, wrt, rules, deterministic=deterministic))
            for given in (clean, dirty)
        )
        for name in x:
            np.testing.assert_allclose(x[name].astype("f4"), y[name].astype("f4"), atol=1e-3)
