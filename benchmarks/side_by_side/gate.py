"""Is ours right on a cell? Sampled rows against the float64 oracle, all of it against a peer."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashcore_cupy.cpu import reference
from side_by_side.backends import Inputs, to_numpy
from side_by_side.cells import Cell

#: Relative RMS difference of two bfloat16 attentions; their rounding gives 0.003 or so.
_MOST_DIFFERENCE = 0.02
_RANDOM_ROWS = 16


class WrongResultError(Exception):
    """Ours gave what it should not; the message says where."""


def check(torch: Any, cell: Cell, inputs: Inputs, got: Any, peer: Any | None) -> str:
    """Say what was checked of the output ``got``, (B, H, Sq, D).

    ``peer`` is another implementation's output, or None. Raises ``WrongResultError``.
    """
    if not bool(torch.isfinite(got).all()):
        raise WrongResultError("wrong: NaN or infinite values")
    worst = 0.0
    heads = {(0, 0), (cell.batch - 1, cell.heads - 1)}
    for b, h in sorted(heads):
        worst = max(worst, _check_head(torch, cell, inputs, got, b, h))
    text = f"max error {worst:.2g} in sampled rows"
    if peer is None:
        return text
    expected = peer.float()
    difference = float((got.float() - expected).norm() / expected.norm())
    if not difference <= _MOST_DIFFERENCE:
        raise WrongResultError(f"wrong: differs from torch's by {difference:.2g} (relative RMS)")
    return f"{text}, relative RMS difference {difference:.2g} from torch's"


def _check_head(torch: Any, cell: Cell, inputs: Inputs, got: Any, b: int, h: int) -> float:
    """Largest error of some rows of one head, by the acceptance rule of ``reference.compare``."""
    group = cell.heads // cell.heads_kv
    tensors = [x[b, :, head][None, None] for x, head in _of_head(inputs, h, group)]
    q, k, v = (to_numpy(torch, x) for x in tensors)
    rows = sample_rows(cell.seqlen_q)
    at = torch.as_tensor(rows, device=got.device)
    result = to_numpy(torch, got[b, h][at])[None, None]
    expected, _ = reference.oracle(q, k, v, rows=rows, **cell.rules)
    naive = reference.naive(q, k, v, rows=rows, **cell.rules)
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
