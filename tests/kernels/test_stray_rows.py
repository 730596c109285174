"""Rows of a packed batch that lie in none of its sequences, and queries that have no keys at all.

Boundaries on a GPU are not looked at by the host, so kernels write those rows, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases_edges import arrays
from cases_far_scores import TOLERANCE
from places import PACKED, Place, each, everywhere, unchecked_boundaries

from flashcore_cupy.cpu import reference

#: Boundaries, and rows in all: behind the last sequence, before the first, both, none; no sequence.
BATCHES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((0, 3, 3, 5), 200),
    ((7, 9, 12), 15),
    ((130, 400, 460), 700),
    ((0, 64, 128), 128),
    ((0,), 5),
    ((3,), 300),
    ((50, 50), 50),
)
RULES = ("none", "sink", "alibi", "window")


def rules_of(name: str, sequences: int) -> dict[str, Any]:
    slopes = np.linspace(0.1, 1, 8 * max(1, sequences), dtype=np.float32).reshape(-1, 8)
    return {
        "none": {},
        "sink": {"sink": np.linspace(-2, 3, 8, dtype=np.float32)},
        "alibi": {"alibi_slopes": slopes[:sequences]},
        "window": {"causal": True, "window": (20, -1)},
    }[name]


@each(
    "kernel, dtype, rule",
    [
        *((kernel, "float16", rule) for kernel in PACKED for rule in RULES),
        *((kernel, "bfloat16", "sink") for kernel in PACKED),
        ("mma_sm80", "float32", "sink"),
    ],
    emulated=[
        *(("mma_sm80", "float16", "none"), ("wgmma_sm90", "float16", "sink")),
        *(("mma_sm80", "bfloat16", "alibi"), ("wgmma_sm90", "bfloat16", "window")),
        ("mma_sm80", "float32", "sink"),
    ],
)
@each("heads_kv", [1, 8])
def test_rows_of_no_sequence_are_zeros(
    on: Place, kernel: str, dtype: str, rule: str, heads_kv: int
) -> None:
    """Whatever memory held, and whatever q, k, v hold there: o = 0, and LSE = -inf, sink or not."""
    if not on.takes(kernel):
        pytest.skip(f"{kernel} is for another GPU")
    on = on.by(kernel)
    for bounds, total in BATCHES:
        operands = arrays(total, total, heads=8, heads_kv=heads_kv, dtype=dtype)
        q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in operands)
        own = np.zeros(total, bool)
        own[bounds[0] : bounds[-1]] = True
        rules = rules_of(rule, len(bounds) - 1)
        want, want_lse = np.zeros(q.shape), np.full((8, total), -np.inf)
        if own.any():
            inner = np.subtract(bounds, bounds[0])
            found = reference.oracle_varlen(q[own], k[own], v[own], inner, inner, **rules)
            want[own], want_lse[:, own] = found
        for x in (q, k, v):
            x[~own] = np.nan
        given = {n: on.xp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in rules.items()}
        starts = on.xp.asarray(bounds, np.int32)
        given |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
        device = [on.xp.asarray(x) for x in (q, k, v)]
        for out in (None, on.xp.asarray(np.full_like(q, np.nan))):
            held = [on.xp.full(n, np.nan, np.float32) for n in (8 * total, q.nbytes // 4)]
            del held  # what is allocated next has their memory
            with unchecked_boundaries():
                o, lse = on.attention(*device, out=out, return_lse=True, **given)
            assert out is None or o is out
            o, lse = on.to_host(o), on.to_host(lse)
            o = o.astype(np.float64)
            assert (o[~own] == 0).all() and np.isneginf(lse[:, ~own]).all(), (bounds, total)
            np.testing.assert_allclose(o, want, rtol=0, atol=4 * TOLERANCE[dtype])
            np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-4)


@everywhere(*PACKED)
@each("queries, dim", [(16384, 128), (24576, 64), (2**20, 64)], emulated=[(1024, 128), (3072, 64)])
@each("causal", [False, True])
def test_many_queries_without_keys(on: Place, queries: int, dim: int, causal: bool) -> None:
    """Keys that take no room in L2: once, the scheduler took so many heads that it divided by 0."""
    q = on.xp.ones((1, 8, queries, dim), np.float16)
    k = q[:, :, :0]
    o, lse = on.attention(q, k, k, causal=causal, return_lse=True)
    assert not o.any() and on.xp.isneginf(lse).all()
