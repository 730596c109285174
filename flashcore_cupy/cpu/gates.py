"""What the gates give on NumPy arrays: one stage of attention, or of its gradients.

Computed in float64, so that a kernel's stage can be compared with it. Each head goes in blocks of
queries, so that nothing but the result is of size Sq x Skv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flashcore_cupy.cpu.numpy_rules import NumpyRules, sizes_of
from flashcore_cupy.problem.blocks import Array, Block, BoolArray

_BLOCK_ELEMENTS = 2**22  # scores of a block, 32 MB


def scores(q: Array, k: Array, v: Array, rules: Mapping[str, Any]) -> Array:
    """Gate "qk": scores by all rules, -inf where hidden, float32 (B, Hq, Sq, Skv)."""
    return _stage(q, k, NumpyRules(sizes_of(q, k, v), **rules), normalise=False)


def probabilities(q: Array, k: Array, v: Array, rules: Mapping[str, Any]) -> Array:
    """Gate "softmax": P, 0 where hidden, float32 (B, Hq, Sq, Skv). A sink takes a part of 1."""
    return _stage(q, k, NumpyRules(sizes_of(q, k, v), **rules), normalise=True)


def gradients(gate: str, arrays: Mapping[str, Array], rules: Mapping[str, Any]) -> Array:
    """Gate "dp" or "ds", 0 where hidden, float32 (B, Hq, Sq, Skv).

    "dp" is do v^T, "ds" the gradient of a score before its rules. ``arrays``: do, q, k, v, o, lse,
    and dlse if there is one; o and lse are taken as they are.
    """
    do, q, k, v, o, lse = (arrays[name] for name in ("do", "q", "k", "v", "o", "lse"))
    checked = NumpyRules(sizes_of(q, k, v), **rules)
    out = np.empty((*q.shape[:3], k.shape[2]), np.float32)
    with np.errstate(all="ignore"):  # NaN and infinity are data here
        for at in _blocks(checked):
            rows = at.batch, at.head, slice(at.lowest, at.highest + 1)
            keys = at.batch, at.head // checked.sizes.group
            parts = {"do": do[rows], "q": q[rows], "k": k[keys], "v": v[keys], "o": o[rows]}
            parts |= {"lse": lse[rows], "dlse": arrays.get("dlse", np.zeros_like(lse))[rows]}
            stage = _dp if gate == "dp" else _ds
            block = stage({n: x.astype(np.float64) for n, x in parts.items()}, checked, at)
            out[rows] = np.where(checked.visible(at), block, 0)
    return out


def _dp(given: Mapping[str, Array], rules: NumpyRules, at: Block) -> Array:
    dp: Array = given["do"] @ given["v"].T
    return dp


def _ds(given: Mapping[str, Array], rules: NumpyRules, at: Block) -> Array:
    do, o, lse = given["do"], given["o"], given["lse"]
    p = given["q"] @ given["k"].T
    slopes = rules.linearize(p, at)
    p = np.exp(p - np.where(np.isneginf(lse), 0, lse)[:, None])
    # A query without keys has o = 0, and then do does not matter, NaN or not.
    delta = np.where(o != 0, do * o, 0).sum(axis=1) - given["dlse"]
    dp = _dp(given, rules, at) * rules.keep_scale
    rules.drop(dp, at)
    d = np.where(p != 0, p * (dp - delta[:, None]), 0)
    rules.pull_back(d, slopes, {}, at)
    return d


def _stage(q: Array, k: Array, rules: NumpyRules, *, normalise: bool) -> Array:
    sizes = rules.sizes
    out = np.empty((*q.shape[:3], sizes.seqlen_kv), np.float32)
    for at in _blocks(rules):
        rows = at.batch, at.head, slice(at.lowest, at.highest + 1)
        keys = k[at.batch, at.head // sizes.group].astype(np.float64)
        block = q[rows].astype(np.float64) @ keys.T
        rules.apply(block, at)
        seen = rules.visible(at)
        block = np.where(seen, block, -np.inf)
        out[rows] = _softmax(block, seen, rules.sink_of(at.head)) if normalise else block
    return out


def _blocks(rules: NumpyRules) -> Iterator[Block]:
    sizes = rules.sizes
    step = max(1, _BLOCK_ELEMENTS // max(1, sizes.seqlen_kv))
    for batch, head in np.ndindex(sizes.batch, sizes.heads_q):
        for first in range(0, sizes.seqlen_q, step):
            end = min(first + step, sizes.seqlen_q)
            queries = np.arange(first, end)
            yield Block(batch, head, queries, first, end - 1, slice(0, sizes.seqlen_kv))


def _softmax(scores: Array, seen: BoolArray, sink: float) -> Array:
    top = scores.max(axis=1, initial=sink)
    shift = np.where(np.isneginf(top), 0, top)
    p = np.exp(scores - shift[:, None])
    total = p.sum(axis=1) + np.exp(sink - shift)
    found: Array = np.where(seen, p / np.where(total == 0, 1, total)[:, None], 0.0)
    return found
