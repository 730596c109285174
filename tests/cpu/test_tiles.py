"""Which of a kernel's rows a problem gets, by its grid, its keys and its rules."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_reference import repeatable
from cases_rules import ASKED
from helpers import ROOT as CHECKOUT
from hypothesis import given
from hypothesis import strategies as st

from flashcore_cupy.cuda import targets
from flashcore_cupy.launch import builds
from flashcore_cupy.problem.array_spec import spec_of
from flashcore_cupy.problem.attention_problem import AttentionProblem, contiguous_problem, describe
from flashcore_cupy.problem.rules import describe_rules
from flashcore_cupy.select import registry, selector, table
from flashcore_cupy.select.config import KernelConfig, Tile
from flashcore_cupy.select.row import PER_SCORE, Row
from flashcore_cupy.select.sm90_cluster import Sm90Cluster

HOPPER = "sm_90a"
KERNEL = "wgmma_sm90"
MULTIPROCESSORS = 132
ROWS = [row for row in selector.rows_of(KERNEL) if row.max_rows is None]
#: Of two that are alike the second is for rules with which the first spills.
PLAIN = [
    row
    for number, row in enumerate(ROWS)
    if not any(
        other.dims == row.dims and other.sizes == row.sizes and other.spills_with
        for other in ROWS[:number]
    )
]


def tile_of(problem: AttentionProblem) -> Tile:
    return selector.configure(problem, registry.KERNELS[KERNEL], HOPPER).tile


def ruled(problem: AttentionProblem, causal: Any = None, **rules: Any) -> AttentionProblem:
    described = describe_rules(problem.scores, problem.dtype, **rules)
    causal = problem.causal if causal is None else causal
    return replace(problem, causal=causal, rules=described)


# --- rounds of thread blocks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "block_m"),
    [
        ((1, 8, 512, 64), 64),
        ((1, 8, 1024, 64), 64),
        ((4, 16, 512, 64), 128),
        ((4, 16, 2048, 64), 192),
        ((1, 8, 1024, 128), 64),
        ((4, 16, 2048, 128), 128),
        # 132 blocks of 64 queries are one round, 133 two.
        ((1, 66, 128, 64), 64),
        ((1, 19, 448, 64), 128),
        ((1, 66, 128, 128), 64),
        ((1, 67, 128, 128), 128),
        # One round of blocks of 192 queries, two of 128, three of 64.
        ((1, 132, 192, 64), 192),
    ],
)
def test_blocks_are_as_large_as_the_grid_is(sizes: tuple[int, int, int, int], block_m: int) -> None:
    problem = contiguous_problem(*sizes)
    assert tile_of(problem).block_m == block_m
    found = selector.select(problem, HOPPER)
    if Sm90Cluster.is_meant_for(problem):
        assert found.kernel.name == "cluster_sm90"
    else:
        assert found.kernel.name == KERNEL and found.config.tile.block_m == block_m


@pytest.mark.parametrize(
    ("sizes", "parts", "num_stages", "block_n"),
    [
        # Warpgroups of a thread block, and thread blocks, that share the keys.
        ((1, 8, 64, 64), (1, 1), 1, 64),
        ((1, 8, 128, 64), (1, 1), 1, 128),
        ((1, 8, 256, 64), (1, 2), 1, 128),
        ((2, 8, 256, 64), (1, 2), 1, 128),
        ((4, 8, 256, 64), (2, 1), 1, 128),
        ((1, 8, 512, 64), (1, 2), 1, 256),
        ((1, 16, 512, 64), (2, 1), 2, 128),
        ((1, 8, 1024, 64), (2, 1), 3, 128),
        ((1, 8, 256, 128), (1, 2), 1, 128),
        ((1, 16, 256, 128), (1, 2), 1, 128),
        ((1, 8, 512, 128), (2, 2), 1, 128),
    ],
)
def test_few_queries_share_out_their_keys(
    sizes: tuple[int, int, int, int], parts: tuple[int, int], num_stages: int, block_n: int
) -> None:
    found = selector.select(contiguous_problem(*sizes), HOPPER)
    tile = found.config.tile
    assert found.kernel.name == "cluster_sm90" and found.config.overlaps_launches
    assert (tile.warps_n, tile.cluster) == parts
    assert (tile.num_stages, tile.block_n) == (num_stages, block_n)
    reach = block_n * parts[0] * parts[1]
    assert tile.one_tile == (num_stages == 1 and sizes[2] <= reach)


def of_few_keys(seqlen: int, **overrides: Any) -> KernelConfig:
    problem = contiguous_problem(1, 8, seqlen, 64)
    return selector.select(problem, HOPPER, kernel="cluster_sm90", overrides=overrides).config


@pytest.mark.parametrize("seqlen", [64, 128, 256, 512])
def test_a_thread_block_that_is_alone_leaves_no_room_for_another(seqlen: int) -> None:
    multiprocessor, system = 228 * 1024, 1024  # of an H100; what a thread block has beside its own
    alone, beside = of_few_keys(seqlen), of_few_keys(seqlen, alone=False)
    assert alone.tile.alone and not beside.tile.alone
    assert 2 * (alone.smem_bytes + system) > multiprocessor >= 2 * (beside.smem_bytes + system)
    assert alone.smem_bytes <= targets.smem_limit(HOPPER)


def test_one_tile_of_a_warpgroup_is_all_of_its_keys() -> None:
    assert of_few_keys(100, block_n=112).tile.one_tile
    narrow = of_few_keys(300, block_n=32).tile  # no row has all of these keys at once
    assert not narrow.one_tile and narrow.block_n == 32
    reason = r"one_tile, with 300 keys; .* = 128 are all that it has"
    with pytest.raises(ValueError, match=reason):
        of_few_keys(300, block_n=32, one_tile=True, warps_n=2, cluster=2)
    with pytest.raises(ValueError, match="one_tile with num_stages=2"):
        of_few_keys(100, num_stages=2, one_tile=True)


@pytest.mark.parametrize("name", ["wmma_fused_32", "mma_sm80", "wgmma_sm90"])
@pytest.mark.parametrize("switch", ["one_tile", "alone"])
def test_other_kernels_have_neither(name: str, switch: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no {switch}"):
        selector.select(
            contiguous_problem(1, 8, 64, 64), HOPPER, kernel=name, overrides={switch: True}
        )


@pytest.mark.parametrize(("mask", "block_n", "rows"), [(False, 256, 128), (True, 128, 128)])
def test_tiles_of_k_arrive_in_halves_but_with_masks(mask: bool, block_n: int, rows: int) -> None:
    problem = contiguous_problem(1, 8, 512, 64)
    if mask:
        problem = ruled(problem, mask=spec_of(np.ones((512, 512), bool)))
    config = selector.configure(problem, registry.KERNELS["cluster_sm90"], HOPPER)
    assert config.tile.block_n == block_n
    boxes = [view.box[1] for view in config.views(problem, problem.q)]
    assert boxes == [64, rows, block_n]


def cost(row: Row, problem: AttentionProblem) -> float:
    assert row.round_cost is not None
    blocks = problem.batch * problem.heads_q * -(-problem.seqlen_q // row.tile.block_m)
    return row.round_cost * -(-blocks // MULTIPROCESSORS)


@repeatable
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(17, 3000), st.sampled_from((64, 96, 128))
)
def test_no_other_row_takes_less_time(batch: int, heads: int, seqlen: int, dim: int) -> None:
    problem = contiguous_problem(batch, heads, seqlen, dim, dtype="bfloat16")
    rows = [row for row in PLAIN if row.dims == (dim, dim) and row.serves(problem)]
    unlimited = [row for row in rows if row.max_keys is None]
    assert len({row.tile.block_m for row in unlimited}) == len(unlimited) >= 2
    by_tile = {row.tile: cost(row, problem) for row in rows}
    if selector.select(problem, HOPPER).kernel.name == KERNEL:
        assert by_tile[tile_of(problem)] == min(by_tile.values())


def test_every_row_without_other_limits_has_a_grid() -> None:
    """A row whose rounds never take the least time would be there in vain."""
    for dim in (64, 96, 128):
        found = {
            tile_of(contiguous_problem(batch, 8, seqlen, dim))
            for batch in (1, 2, 3, 4, 8, 16)
            for seqlen in (128, 192, 256, 512, 1024, 2048, 4096)
        }
        assert found == {row.tile for row in PLAIN if row.dims == (dim, dim)}


def test_warmup_builds_every_tile_that_a_plain_problem_may_get() -> None:
    warmed = {(c.head_dim, c.head_dim_v, c.tile) for c in builds.table_configs([KERNEL], HOPPER)}
    for dim, dim_v in {row.dims for row in selector.rows_of(KERNEL)}:
        for batch, seqlen in ((1, 512), (1, 1024), (2, 1024), (4, 512), (4, 2048), (16, 4096)):
            problem = contiguous_problem(batch, 16, seqlen, dim, head_dim_v=dim_v)
            assert (dim, dim_v, tile_of(problem)) in warmed


def test_packed_batches_are_counted_as_one_sequence() -> None:
    def packed(total: int) -> AttentionProblem:
        return describe(*[np.empty((total, 8, 64), np.float16)] * 3, sequences=3)

    assert tile_of(packed(1024)).block_m == 64
    assert tile_of(packed(32 * 1024)).block_m == 192


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("rules", [{}, {"softcap": 30.0}, {"window": (50, 0)}])
def test_batch_invariant_problems_have_one_tile(dim: int, rules: dict[str, Any]) -> None:
    """Neither the grid nor the keys decide: those of a packed batch are all sequences' together."""
    for invariant in (True, False):
        found = set()
        for batch, seqlen in ((1, 1), (1, 100), (1, 512), (1, 1024), (4, 300), (500, 2048)):
            problem = ruled(contiguous_problem(batch, 8, seqlen, dim), **rules)
            problem = replace(problem, batch_invariant=invariant)
            found.add(selector.select(problem, HOPPER).config)
            assert not invariant or selector.select(problem, HOPPER).kernel.name == KERNEL
        assert (len({config.tile for config in found}) == 1) == invariant


# --- keys and rules -------------------------------------------------------------------------------


def of_keys(seqlen_kv: int, **rules: Any) -> AttentionProblem:
    return ruled(contiguous_problem(4, 16, 1000, 256, seqlen_kv=seqlen_kv), **rules)


def test_few_keys_at_256_columns_have_a_row_of_their_own() -> None:
    (row,) = (row for row in ROWS if row.max_keys is not None and row.dims == (256, 256))
    assert row.max_keys == 512
    assert row.serves(of_keys(512)) and tile_of(of_keys(512)) == row.tile
    assert not row.serves(of_keys(513)) and tile_of(of_keys(513)) != row.tile
    assert not row.serves(replace(of_keys(100), batch_invariant=True))
    packed = [np.empty((300, 8, 256), np.float16)] * 3
    assert row.serves(describe(*packed, sequences=2))
    packed = [np.empty((600, 8, 256), np.float16)] * 3
    assert not row.serves(describe(*packed, sequences=2)), "keys of all sequences together"


def test_one_tile_of_keys_at_64_columns_has_no_second_stage() -> None:
    for seqlen_kv, stages in ((100, 1), (128, 1), (129, 2)):
        tile = tile_of(contiguous_problem(32, 8, 128, 64, seqlen_kv=seqlen_kv))
        assert (tile.block_m, tile.block_n, tile.num_stages) == (128, 128, stages)


@pytest.mark.parametrize("dims", [(192, 128), (256, 256)])
def test_rules_per_score_have_a_row_that_is_not_plain(dims: tuple[int, int]) -> None:
    plain = contiguous_problem(4, 16, 2048, dims[0], head_dim_v=dims[1])
    rows = {
        row.spills_with == PER_SCORE: row
        for row in reversed(ROWS)
        if row.dims == dims and not row.max_keys
    }
    assert rows[True].tile.block_n > rows[False].tile.block_n
    slopes, sink = np.zeros(16, np.float32), np.zeros(16, np.float32)
    for rules in ({}, {"sink": spec_of(sink)}, {"window": (100, 0)}):
        assert tile_of(ruled(plain, **rules)) == rows[True].tile
    for rules in (
        {"softcap": 30.0},
        {"alibi_slopes": spec_of(slopes)},
        {"score_mod": "score * 2"},
        {"softcap": 30.0, "sink": spec_of(sink), "window": (100, 0)},
    ):
        assert tile_of(ruled(plain, **rules)) == rows[False].tile
    assert tile_of(replace(plain, softmax_scale=-0.1)) == rows[False].tile
    assert tile_of(replace(plain, causal=True)) == rows[True].tile


POSITIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (20, 0)},
}


@pytest.mark.parametrize("name", registry.KERNELS)
def test_rules_that_spill_get_another_row(name: str) -> None:
    """What ``spills_with`` names keeps problems out; of "a+b" neither alone does."""
    rows, asking = selector.rows_of(name), ASKED | POSITIONS
    for row in rows:
        problem = contiguous_problem(1, 1, 64, row.dims[0], head_dim_v=row.dims[1])
        problem = replace(problem, dtype=row.dtypes[0])
        assert row.takes_rules(problem)
        for rules in (rules.split("+") for rules in row.spills_with if rules != "scale_first"):
            together = {key: x for rule in rules for key, x in asking[rule].items()}
            asked = ruled(problem, **together)
            assert not row.takes_rules(asked)
            assert any(other.takes_rules(asked) for other in rows if other.dims == row.dims)
            for rule in rules if len(rules) > 1 else ():
                assert row.takes_rules(ruled(problem, **asking[rule])) or rule in row.spills_with
        negative = replace(problem, softmax_scale=-0.1)
        assert row.takes_rules(negative) == ("scale_first" not in row.spills_with)
        # Whatever comes together has a row for all grids.
        assert any(
            other.dims == row.dims and other.dtypes == row.dtypes and not other.spills_with
            for other in rows
            if other.max_blocks is None and other.max_rows is None and other.max_keys is None
        )


# --- any table ------------------------------------------------------------------------------------


def test_rows_are_taken_by_the_time_of_their_rounds_then_as_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """128 heads of 64 queries: one round of either of the first rows, two of none."""
    problem = contiguous_problem(2, 64, 64, 64)
    large, small = Tile(128, 64, warps_m=8, num_stages=2), Tile(64, 64, warps_m=4, num_stages=2)

    def first(*rows: Row) -> Tile:
        monkeypatch.setattr(selector, "ROWS", rows)
        return tile_of(problem)

    def row(tile: Tile, round_cost: float | None = None, **limits: Any) -> Row:
        return Row(KERNEL, 64, tile, round_cost=round_cost, **limits)

    assert first(row(large, 1.0), row(small, 0.9)) == small
    assert first(row(large, 0.9), row(small, 1.0)) == large
    assert first(row(large, 1.0), row(small, 1.0)) == large
    assert first(row(small, 1.0), row(large, 1.0)) == small
    assert first(row(large), row(small)) == large
    assert first(row(large, 1.0, max_keys=63), row(small, 2.0)) == small
    assert first(row(large, 1.0, max_keys=64), row(small, 2.0)) == large
    assert first(row(large, 1.0, max_blocks=127), row(small, 2.0)) == small
    assert first(row(replace(large, num_stages=4, block_n=256), 1.0), row(small, 2.0)) == small


def test_a_row_names_its_limits() -> None:
    with pytest.raises(TypeError, match="positional"):
        Row(KERNEL, 64, Tile(128, 64, warps_m=8), 40)  # type: ignore[misc]


# --- any family -----------------------------------------------------------------------------------


class _Other(KernelConfig):
    """A kernel for another architecture, as a newcomer would write it."""

    source, entries = "fwd_other.cu", ("fwd_other",)

    @classmethod
    def why_not_on(cls, arch: str) -> str | None:
        return None if arch == "sm_100" else f"needs sm_100; the target is {arch}"

    def unfit(self) -> list[str]:
        return self.uncut()

    @property
    def smem_bytes(self) -> int:
        return 2 * self.tile.block_m * self.head_dim

    def own_defines(self) -> dict[str, int]:
        return {"FC_OTHER": 7}

    def most_blocks(self, multiprocessors: int) -> int:
        return multiprocessors


def test_a_kernel_is_a_family_a_row_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    other = registry.Kernel("other", _Other, ("float16",), "an idea")
    monkeypatch.setitem(registry.KERNELS, other.name, other)
    row = Row("other", 160, Tile(128, 64, warps_m=4))
    monkeypatch.setattr(selector, "ROWS", (*table.ROWS, row))
    problem = contiguous_problem(2, 8, 300, 150)
    found = selector.select(problem, "sm_100", kernel="other")
    assert (found.kernel, found.config.head_dim, found.config.dim_qk) == (other, 160, 150)
    assert found.config.defines()["FC_OTHER"] == 7 and found.config.smem_bytes == 2 * 128 * 160
    assert found.configs == (found.config,) and found.config.most_blocks(3) == 3
    assert [c.tile for c in builds.table_configs(["other"], "sm_100")] == [row.tile, row.tile]
    for arch, rules, reason in (
        ("sm_90a", {}, "needs sm_100; the target is sm_90a"),
        ("sm_100", {"softcap": 3.0, "window": (3, 3)}, "has no softcap, window"),
    ):
        with pytest.raises(ValueError, match=f"kernel 'other': {reason}"):
            selector.select(ruled(problem, **rules), arch, kernel="other")
    with pytest.raises(ValueError, match="block_m=72 is not a multiple of 16 x warps_m = 64"):
        selector.select(problem, "sm_100", kernel="other", overrides={"block_m": 72})


@pytest.mark.parametrize("folder", ["select", "launch"])
def test_no_kernel_is_told_by_its_name(folder: str) -> None:
    for path in (CHECKOUT / "flashcore_cupy" / folder).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        told = re.findall(
            r"(?:source|kernel|name) [!=]= [\"'](?:scalar|wmma|mma|wgmma|fp8|fwd)", text
        )
        assert not told, path.name


@pytest.mark.parametrize("arch", targets.TARGETS)
def test_auto_finds_a_tensor_core_kernel(arch: str) -> None:
    for dim in table.WMMA_HEAD_DIMS:
        problem = contiguous_problem(1, 8, 512, dim)
        name = selector.select(problem, arch).kernel.name
        assert name.startswith(("cluster", "wgmma", "mma", "wmma"))
