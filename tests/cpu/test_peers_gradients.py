"""What the benchmarks beside torch say of wrong gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from side_by_side import backends, gate, gradient_gate
from side_by_side.cells import Cell
from side_by_side.results import CUDNN, FA4

from flashcore_cupy.cpu import reference_gradients

torch = pytest.importorskip("torch")


@pytest.fixture
def gradients() -> Iterator[tuple[Any, Cell, backends.Inputs, tuple[Any, Any, Any]]]:
    """Torch on the CPU, a packed cell with grouped heads, its inputs, and bfloat16 gradients."""
    lengths = (40, 3, 90, 30)
    cell = Cell("backward", "x", 4, 4, 2, 90, 90, 16, True, lengths=lengths, head_dim_v=8)
    made = torch.Generator().manual_seed(0)
    shapes = cell.q_shape, cell.k_shape, cell.v_shape, cell.o_shape
    q, k, v, do = (torch.randn(s, generator=made).to(torch.bfloat16) for s in shapes)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    host = [x.float().numpy() for x in (do, q, k, v)]
    right = reference_gradients.of_packed(
        reference_gradients.oracle, *host, starts, starts, causal=True
    )
    got = tuple(torch.from_numpy(right[name]).to(torch.bfloat16) for name in "qkv")
    yield torch, cell, backends.Inputs(q, k, v, starts, do), got


def test_the_gate_passes_right_gradients(gradients: Any) -> None:
    torch, cell, inputs, got = gradients
    peers = {CUDNN: tuple(1.25 * x for x in got), FA4: got}
    text, wrong = gradient_gate.check(torch, cell, inputs, got, peers)
    assert text.startswith("error up to 0.") and "differs from fa4 by 0 (relative RMS)" in text
    assert wrong == {CUDNN: "wrong: differs from ours by 0.2 (relative RMS)"}
    dense = replace(cell, batch=1, lengths=())
    one = tuple(x[:40][None] for x in (inputs.q, inputs.k, inputs.v, inputs.do))
    alone = backends.Inputs(*one[:3], None, one[3])
    gradient_gate.check(torch, dense, alone, tuple(x[:40][None] for x in got), {})


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
@pytest.mark.parametrize(("row", "head"), [(0, 0), (42, 0), (132, -1), (162, -1)])
def test_the_gate_stops_a_wrong_gradient(gradients: Any, name: str, row: int, head: int) -> None:
    """Of the first sequence, the shortest, the longest and the last."""
    torch, cell, inputs, got = gradients
    which = ("dq", "dk", "dv").index(name)
    got[which][row, head, 5] += 0.05 * got[which].abs().max()
    with pytest.raises(gate.WrongResultError, match=f"^wrong: {name} of b="):
        gradient_gate.check(torch, cell, inputs, got, {})


def test_the_gate_stops_gradients_that_the_sample_misses(gradients: Any) -> None:
    torch, cell, inputs, got = gradients
    peer = tuple(x.clone() for x in got)
    got[1][:40, 1] *= 1.5  # the first sequence's last head
    with pytest.raises(gate.WrongResultError, match="differs from torch-cudnn by"):
        gradient_gate.check(torch, cell, inputs, got, {CUDNN: peer})
    got[1][7, 1, 3] = float("nan")
    with pytest.raises(gate.WrongResultError, match="NaN"):
        gradient_gate.check(torch, cell, inputs, got, {})
