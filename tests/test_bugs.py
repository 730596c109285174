"""The eight bugs that the first version of these kernels had, each with a test that catches it.

Six of them are put back: into a copy of the sources, where the text of the bug replaces the right
one. The test passes on the sources as they are and must fail on the copy. The other two (alignment,
bank conflicts) do not show in a kernel's text, so their arithmetic is tested.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, compiler_skip_reason

import flashcore_cupy
from flashcore_cupy import config, jit, problem, reference, tiles


def _outside_rule(got: np.ndarray, q, k, v, **rules: object) -> str:
    """Why ``got`` is not attention by the acceptance rule; empty if it is."""
    expected, _ = reference.oracle(q, k, v, **rules)
    return reference.compare(got, expected, reference.naive(q, k, v, **rules)).reason


def _attend(kernel: str, q, k, v, **rules: object) -> np.ndarray:
    import cupy

    arrays = [cupy.asarray(x) for x in (q, k, v)]
    return cupy.asnumpy(flashcore_cupy.attention(*arrays, kernel=kernel, **rules))


def _inputs(shape: tuple[int, int, int, int] = (1, 2, 200, 64)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float16) for _ in range(3)]


def scores_are_wrong(kernel: str) -> bool:
    q, k, v = _inputs()
    got = _attend(kernel, q, k, v, gate="qk")
    return bool(np.abs(got - reference.gate_scores(q, k, v)).max() > 2e-3)


def mean_of_v_is_wrong(kernel: str) -> bool:
    q, k, v = _inputs()
    expected = reference.gate_uniform(q, k, v)
    got = _attend(kernel, q, k, v, gate="pv").astype(np.float64)
    return not np.abs(got - expected).max() <= 1e-3


def output_is_wrong(kernel: str) -> bool:
    q, k, v = _inputs()
    return bool(_outside_rule(_attend(kernel, q, k, v), q, k, v))


def growing_scores_are_wrong(kernel: str) -> bool:
    """Each tile raises the running maximum, by another amount in every row."""
    q, k, v = _inputs()
    k = (k * np.linspace(0.1, 12, 200)[:, None]).astype(np.float16)
    return bool(_outside_rule(_attend(kernel, q, k, v), q, k, v))


def rows_without_keys_are_wrong(kernel: str) -> bool:
    """Causal, more queries than keys: the first rows of a tile see nothing, its last ones do."""
    import cupy

    q, k, v = _inputs()
    k, v = k[:, :, :190], v[:, :, :190]
    arrays = [cupy.asarray(x) for x in (q, k, v)]
    o, lse = flashcore_cupy.attention(*arrays, kernel=kernel, causal=True, return_lse=True)
    o, lse = cupy.asnumpy(o), cupy.asnumpy(lse)
    empty = (o[:, :, :10] == 0).all() and (lse[:, :, :10] == -np.inf).all()
    return not empty or bool(_outside_rule(o, q, k, v, causal=True))


@dataclass(frozen=True)
class Bug:
    name: str
    kernels: tuple[str, ...]
    is_wrong: Callable[[str], bool]
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


@pytest.fixture
def with_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Bug], None]:
    """Put a bug into a copy of the sources, which then is what gets compiled."""
    if reason := compiler_skip_reason():
        pytest.skip(reason)

    def put_back(bug: Bug) -> None:
        folder = tmp_path / "kernels"
        shutil.copytree(ROOT / "kernels", folder)
        file = folder / bug.file
        text = file.read_text()
        for right, wrong in zip(bug.right, bug.wrong, strict=True):
            assert text.count(right) == 1, f"{bug.file} no longer says {right!r} once"
            text = text.replace(right, wrong)
        file.write_text(text)
        monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(folder))

    return put_back


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_still_compiles(with_bug, bug: Bug) -> None:
    """Otherwise the next test would catch a compile error and prove nothing."""
    with_bug(bug)
    for kernel in bug.kernels:
        wanted = problem.contiguous_problem(1, 2, 200, 64, gate=bug.gate, causal=bug.causal)
        c = tiles.select(wanted, "sm_90a", kernel=kernel).config
        jit.compile_kernel(c.source, c.defines(), "sm_90a")


@pytest.mark.gpu
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_would_be_caught(with_bug, bug: Bug) -> None:
    for kernel in bug.kernels:
        assert not bug.is_wrong(kernel), f"{kernel} has it"
    with_bug(bug)
    for kernel in bug.kernels:
        assert bug.is_wrong(kernel), f"{kernel}: the bug was put back and not noticed"


# ---- shared rows against bank conflicts ----------------------------------------------------------


def conflicts(row_bytes: int) -> int:
    """How many of 8 rows, 16 bytes each, meet in one bank: one phase of WMMA's load."""
    banks = [((row * row_bytes // 4) + word) % 32 for row in range(8) for word in range(4)]
    return max(banks.count(bank) for bank in range(32))


@pytest.mark.parametrize("head_dim", tiles.WMMA_HEAD_DIMS)
def test_shared_rows_do_not_conflict(head_dim: int) -> None:
    row = config.padded_row(head_dim)
    assert row % 8 == 0, "WMMA takes row lengths that are a multiple of 8"
    assert conflicts(2 * row) == 1


def test_the_conflict_arithmetic_sees_conflicts() -> None:
    assert conflicts(2 * 64) == 8, "an unpadded row of 64: all eight rows in the same banks"
    assert conflicts(2 * 80) == 2, "a row of 64 padded to 80"


def test_kernels_and_launcher_pad_alike() -> None:
    """Only the sum of all sizes is asserted when compiling; the pad itself is one number."""
    text = (ROOT / "kernels" / "ladder" / "tile_load.cuh").read_text()
    assert "int padded_row(int cols) { return cols + 8; }" in text
    assert config.padded_row(64) == 72


def _softmax_banks(access_bytes: int, row_bytes: int, lanes: int, block_n: int) -> int:
    """Most lanes of a phase of the warp-owned softmax that meet in one bank (piece_col)."""
    pieces = block_n // 8
    worst = 0
    for first in range(0, 32, lanes):
        for i in range(pieces):
            banks: list[int] = []
            for lane in range(first, first + lanes):
                row, half = lane % 16, lane // 16
                swap = (row >> 2 ^ row >> 3) & 1
                piece = half * pieces + (i ^ swap)
                start = row * row_bytes + piece * access_bytes
                banks += [(start // 4 + word) % 32 for word in range(access_bytes // 4)]
            worst = max(worst, *(banks.count(bank) for bank in range(32)))
    return worst


@pytest.mark.parametrize("block_n", [32, 64])
def test_warp_softmax_does_not_conflict(block_n: int) -> None:
    row = config.padded_row(block_n)
    assert _softmax_banks(16, 4 * row, 8, block_n) == 1, "reading four scores"
    assert _softmax_banks(8, 2 * row, 16, block_n) == 1, "writing four probabilities"


# ---- vector loads where rows are aligned for them, and only there --------------------------------


@pytest.mark.parametrize(
    ("dtype", "columns", "first", "stride", "align"),
    [
        ("float16", 64, 0, 64, 16),
        ("float16", 64, 0, 192, 16),  # q of a packed q, k, v
        ("float16", 64, 1, 72, 2),  # a view that starts one element late
        ("float16", 64, 4, 72, 8),
        ("float16", 64, 0, 66, 4),  # rows drift against 16 bytes
        ("float16", 36, 0, 36, 8),  # D % 8 != 0
        ("float16", 37, 0, 37, 2),
        ("float16", 37, 0, 40, 2),  # rows are aligned, their ends are not
        ("float32", 33, 0, 33, 4),
    ],
)
def test_alignment_of_rows(dtype: str, columns: int, first: int, stride: int, align: int) -> None:
    base = np.zeros((1, 2, 16, stride + first), dtype)
    view = np.lib.stride_tricks.as_strided(
        base[..., first:],
        shape=(1, 2, 4, columns),
        strides=tuple(base.itemsize * n for n in (8 * stride, 4 * stride, stride, 1)),
    )
    address = 4096 + first * base.itemsize
    assert problem.operand("q", view, "bhsd", address).align_bytes == align
