"""Is ours right on a cell? Sampled rows against the float64 oracle, all of it against a peer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flashcore_cupy.cpu import reference
from side_by_side import patterns
from side_by_side.backends import Inputs, to_numpy
from side_by_side.cells import Cell

#: Relative RMS difference of two bfloat16 attentions; their rounding gives 0.003 or so.
_MOST_DIFFERENCE = 0.02
_RANDOM_ROWS = 16


class WrongResultError(Exception):
    """Ours gave what it should not; the message says where."""


class Judged(NamedTuple):
    """What was found of a right result."""

    text: str
    wrong: Mapping[str, str]
    """Peers that differ from it, and by how much."""


def check(torch: Any, cell: Cell, inputs: Inputs, got: Any, peers: Mapping[str, Any]) -> Judged:
    """Judge the output ``got``, (B, H, Sq, D), or (H, total, D) of packed sequences.

    ``peers``: the outputs of other implementations. Where one of them agrees with ``got``, those
    that do not are wrong. Raises ``WrongResultError`` where ``got`` is.
    """
    if not bool(torch.isfinite(got).all()):
        raise WrongResultError("wrong: NaN or infinite values")
    worst = max(_check_head(torch, cell, inputs, got, b, h) for b, h in sampled_heads(cell))
    text = f"max error {worst:.2g} in sampled rows"
    return agreeing(text, {name: difference(got, peer) for name, peer in peers.items()})


def agreeing(text: str, differences: Mapping[str, float]) -> Judged:
    """Judge by how far each peer is from ours; ``text``: what is known of ours already.

    Raises ``WrongResultError`` where no peer agrees with ours.
    """
    told = {name: f"{x:.2g} (relative RMS)" for name, x in differences.items()}
    agree = [name for name, x in differences.items() if x <= _MOST_DIFFERENCE]
    if differences and not agree:
        name = next(iter(differences))
        raise WrongResultError(f"wrong: differs from {name} by {told[name]}")
    if agree:
        text += f", differs from {agree[0]} by {told[agree[0]]}"
    others = [name for name in differences if name not in agree]
    return Judged(text, {name: f"wrong: differs from ours by {told[name]}" for name in others})


def difference(got: Any, peer: Any) -> float:
    """Relative RMS difference of two tensors."""
    expected = peer.float()
    return float((got.float() - expected).norm() / expected.norm())


def sampled_heads(cell: Cell) -> list[tuple[int, int]]:
    """(sequence, head) pairs; packed sequences: the shortest and the longest, too."""
    last = cell.heads - 1
    found = {(0, 0), (cell.batch - 1, last)}
    if cell.lengths:
        shortest, longest = (cell.lengths.index(f(cell.lengths)) for f in (min, max))
        found |= {(shortest, 0), (longest, last)}
    return sorted(found)


def _check_head(torch: Any, cell: Cell, inputs: Inputs, got: Any, b: int, h: int) -> float:
    """Largest error of some rows of one head, by the acceptance rule of ``reference.compare``."""
    group, at = cell.heads // cell.heads_kv, cell.sequence(b)
    tensors = [x[at][:, head][None, None] for x, head in _of_head(inputs, h, group)]
    q, k, v = (to_numpy(torch, x) for x in tensors)
    rows = sample_rows(q.shape[2])
    chosen = torch.as_tensor(rows, device=got.device)
    result = to_numpy(torch, got.swapaxes(-3, -2)[at][:, h][chosen])[None, None]
    rules = cell.rules
    if cell.pattern:
        rules |= patterns.for_numpy(cell.pattern, cell.seqlen_q)
    expected, _ = reference.oracle(q, k, v, rows=rows, **rules)
    naive = reference.naive(q, k, v, rows=rows, **rules)
    judged = reference.compare(result, expected, naive)
    if not judged.ok:
        raise WrongResultError(f"wrong: b={b} h={h}, rows sampled: {judged.reason}")
    return judged.max_error


def _of_head(inputs: Inputs, h: int, group: int) -> tuple[tuple[Any, int], ...]:
    return (inputs.q, h), (inputs.k, h // group), (inputs.v, h // group)


def sample_rows(seqlen: int) -> np.ndarray[Any, Any]:
    """Rows at the edges of the sequence and of its tiles, and some others; sorted, all distinct."""
    edges = (0, 1, 63, 64, 127, 128, seqlen // 2, seqlen - 129, seqlen - 2, seqlen - 1)
    others = np.random.default_rng(0).integers(0, seqlen, _RANDOM_ROWS)
    rows = np.unique([*edges, *others])
    return rows[(rows >= 0) & (rows < seqlen)]
