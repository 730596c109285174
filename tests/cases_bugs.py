"""The bugs that the first version of these kernels had, and how each is noticed.

Six of them are put back: into a copy of the sources, where the text of the bug replaces the right
one. The test passes on the sources as they are and must fail on the copy, on a GPU and emulated.
The other two (alignment, bank conflicts) do not show in a GPU's results: their arithmetic is
tested, and the emulator sees them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT

import flashcore_cupy
from flashcore_cupy.cpu import reference

Attend = Callable[..., Any]


def _outside_rule(got: np.ndarray, q, k, v, **rules: object) -> str:
    """Why ``got`` is not attention by the acceptance rule; empty if it is."""
    expected, _ = reference.oracle(q, k, v, **rules)
    return reference.compare(got, expected, reference.naive(q, k, v, **rules)).reason


def on_gpu(kernel: str, q, k, v, **rules: object) -> Any:
    import cupy

    arrays = [cupy.asarray(x) for x in (q, k, v)]
    results = flashcore_cupy.attention(*arrays, kernel=kernel, **rules)
    if isinstance(results, tuple):
        return tuple(cupy.asnumpy(x) for x in results)
    return cupy.asnumpy(results)


def emulated(kernel: str, q, k, v, **rules: object) -> Any:
    with np.errstate(invalid="ignore", over="ignore"):  # so may what a bug makes
        return flashcore_cupy.attention(q, k, v, kernel=kernel, **rules)


def _inputs(shape: tuple[int, int, int, int] = (1, 2, 200, 64)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float16) for _ in range(3)]


def scores_are_wrong(attend: Attend, kernel: str) -> bool:
    q, k, v = _inputs()
    got = attend(kernel, q, k, v, gate="qk")
    return not np.abs(got - reference.gate_scores(q, k, v)).max() <= 2e-3


def mean_of_v_is_wrong(attend: Attend, kernel: str) -> bool:
    q, k, v = _inputs()
    expected = reference.gate_uniform(q, k, v)
    got = attend(kernel, q, k, v, gate="pv").astype(np.float64)
    return not np.abs(got - expected).max() <= 1e-3


def output_is_wrong(attend: Attend, kernel: str) -> bool:
    q, k, v = _inputs()
    return bool(_outside_rule(attend(kernel, q, k, v), q, k, v))


def growing_scores_are_wrong(attend: Attend, kernel: str) -> bool:
    """Each tile raises the running maximum, by another amount in every row."""
    q, k, v = _inputs()
    k = (k * np.linspace(0.1, 12, 200)[:, None]).astype(np.float16)
    return bool(_outside_rule(attend(kernel, q, k, v), q, k, v))


def rows_without_keys_are_wrong(attend: Attend, kernel: str) -> bool:
    """Causal, more queries than keys: the first rows of a tile see nothing, its last ones do."""
    q, k, v = _inputs()
    k, v = k[:, :, :190], v[:, :, :190]
    o, lse = attend(kernel, q, k, v, causal=True, return_lse=True)
    empty = (o[:, :, :10] == 0).all() and (lse[:, :, :10] == -np.inf).all()
    return not empty or bool(_outside_rule(o, q, k, v, causal=True))


@dataclass(frozen=True)
class Bug:
    name: str
    kernels: tuple[str, ...]
    is_wrong: Callable[[Attend, str], bool]
    file: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    gate: str | None = None
    causal: bool = field(default=False)


BUGS = (
    Bug(
        "K read row-major: that is K, not its transpose",
        ("wmma_unfused", "wmma_fused_32", "wmma_warp_softmax"),
        scores_are_wrong,
        "ladder/wmma_tile.cuh",
        ("wmma_load_b_col(rK", "wmma_mma_row_col(rS"),
        ("wmma_load_b_row(rK", "wmma_mma_row_row(rS"),
        gate="qk",
    ),
    Bug(
        "partial sums of P V lost: only the last tile of keys is kept",
        ("wmma_unfused",),
        mean_of_v_is_wrong,
        "ladder/wmma_unfused.cu",
        ("accumulate_fragments<1, BLOCK_N, LD_P, LD>(",),
        ("fill(rO[m][i][0], 0.0f);\naccumulate_fragments<1, BLOCK_N, LD_P, LD>(",),
        gate="pv",
    ),
    Bug(
        "the scale applied twice",
        ("scalar", "wmma_unfused", "wmma_fused_64", "wmma_warp_softmax"),
        output_is_wrong,
        "ladder/natural_softmax.cuh",
        ("mul_rn(gate.raw_score(score), scale)",),
        ("mul_rn(gate.raw_score(score), scale) * gate.params.softmax_scale",),
    ),
    Bug(
        "rows of an accumulator fragment taken for granted",
        ("wmma_warp_softmax",),
        growing_scores_are_wrong,
        "ladder/wmma_tile.cuh",
        ("rows[e] = int(numbers.x[e])",),
        ("rows[e] = lane / 2",),
    ),
    Bug(
        "-inf - -inf where a row has seen no key",
        ("scalar", "wmma_unfused", "wmma_fused_32", "wmma_cp_async", "wmma_warp_softmax"),
        rows_without_keys_are_wrong,
        "flashcore/softmax/online_softmax.cuh",
        ("return m == NEG_INFINITY ? 0.0f : m;",),
        ("return m;",),
        causal=True,
    ),
    Bug(
        "division by the sum of a row that has seen no key",
        ("scalar", "wmma_unfused", "wmma_fused_32", "wmma_cp_async", "wmma_warp_softmax"),
        rows_without_keys_are_wrong,
        "flashcore/softmax/online_softmax.cuh",
        ("return sum == 0.0f ? 0.0f : 1.0f / sum;",),
        ("return 1.0f / sum;",),
        causal=True,
    ),
    Bug(
        "sums rescaled by the inverse, a factor above 1",
        ("scalar", "wmma_fused_32", "wmma_warp_softmax"),
        growing_scores_are_wrong,
        "ladder/natural_softmax.cuh",
        ("exp_approx(old_max - finite_max(row.max))",),
        ("exp_approx(finite_max(row.max) - old_max)",),
    ),
)


def put_back(bug: Bug, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a bug into a copy of the sources, which then is what gets compiled."""
    kernels = folder / "kernels"
    shutil.copytree(ROOT / "kernels", kernels)
    file = kernels / bug.file
    text = file.read_text()
    for right, wrong in zip(bug.right, bug.wrong, strict=True):
        assert text.count(right) == 1, f"{bug.file} no longer says {right!r} once"
        text = text.replace(right, wrong)
    file.write_text(text)
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(kernels))
