"""Are our gradients right on a cell? Sampled heads against float64, all of them against a peer.

A gradient of a row needs all of the other side, so what is sampled are heads, and float64 runs on
the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flashcore_cupy.problem.attention_problem import EPSILON
from side_by_side.backends import Inputs
from side_by_side.cells import DTYPE, Cell
from side_by_side.gate import Judged, WrongResultError, agreeing, difference, sampled_heads

_NAMES = ("dq", "dk", "dv")

Three = tuple[Any, Any, Any]
"""Of q, k and v."""


def check(torch: Any, cell: Cell, inputs: Inputs, got: Three, peers: Mapping[str, Three]) -> Judged:
    """Judge gradients that lie as q, k and v do, and the peers' beside them.

    Raises ``WrongResultError`` where ``got`` is wrong, as ``gate.check`` does.
    """
    if not all(bool(torch.isfinite(x).all()) for x in got):
        raise WrongResultError("wrong: NaN or infinite values")
    group = cell.heads // cell.heads_kv
    heads = dict.fromkeys((b, h // group) for b, h in sampled_heads(cell))
    worst = max(_check_head(torch, cell, inputs, got, b, h) for b, h in heads)
    text = f"error up to {worst:.2g} of what is allowed in sampled heads"
    differences = {
        name: max(difference(x, y) for x, y in zip(got, peer, strict=True))
        for name, peer in peers.items()
    }
    return agreeing(text, differences)


def _check_head(torch: Any, cell: Cell, inputs: Inputs, got: Three, b: int, h: int) -> float:
    """The largest error of a head of k and v and the query heads that share it.

    As a part of what it may be: twice what rounding P and dS to the dtype costs, or an epsilon of
    the largest value.
    """
    group, at = cell.heads // cell.heads_kv, cell.sequence(b)
    queries, keys = slice(h * group, (h + 1) * group), slice(h, h + 1)
    own = (inputs.do, queries), (inputs.q, queries), (inputs.k, keys), (inputs.v, keys)
    operands = [x[at][:, which].transpose(0, 1) for x, which in own]
    dtype = getattr(torch, DTYPE)
    expected = gradients(torch, operands, cell.causal, torch.float64, lambda x: x)
    naive = gradients(torch, operands, cell.causal, torch.float32, lambda x: x.to(dtype).float())
    worst = 0.0
    for name, result, which, right, rounded in zip(
        _NAMES, got, (queries, keys, keys), expected, naive, strict=True
    ):
        found = result[at][:, which].transpose(0, 1)
        allowed = max(2 * _largest(rounded - right), EPSILON[DTYPE] * _largest(right))
        error = _largest(found.double() - right)
        worst = max(worst, error / allowed)
        if error > allowed:
            raise WrongResultError(
                f"wrong: {name} of b={b} h={h}: max error {error:.2g}, allowed {allowed:.2g}"
            )
    return worst


def gradients(
    torch: Any, operands: list[Any], causal: bool, dtype: Any, rounded: Callable[[Any], Any]
) -> Three:
    """dq, dk, dv from do and q (G, Sq, D), k and v (1, Skv, D), computed in a dtype.

    ``rounded`` is what becomes of the output, of P and dS, and of the results.
    """
    do, q, k, v = (x.to(dtype) for x in operands)
    scale = 1 / math.sqrt(q.shape[-1])
    scores = scale * (q @ k.transpose(1, 2))
    if causal:
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores.masked_fill_(hidden, -math.inf)
    p = torch.softmax(scores, -1)
    del scores
    o = rounded(rounded(p) @ v)
    ds = p * (do @ v.transpose(1, 2) - (do * o).sum(-1, keepdim=True))
    dv = (rounded(p).transpose(1, 2) @ do).sum(0, keepdim=True)
    del p
    ds = rounded(ds)
    dk = (ds.transpose(1, 2) @ q).sum(0, keepdim=True)
    return rounded(scale * (ds @ k)), rounded(scale * dk), rounded(dv)


def _largest(x: Any) -> float:
    return float(x.abs().max())
