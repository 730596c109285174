"""The family of ``fwd_sm90_cluster.cu``: few queries and few keys, all of them loaded at once."""

from __future__ import annotations

from dataclasses import dataclass

from flashcore_cupy.cuda.targets import HOPPER, smem_limit
from flashcore_cupy.problem.attention_problem import AttentionProblem, Operand
from flashcore_cupy.select.sm90 import ROWS_OF_WARPGROUP, Sm90
from flashcore_cupy.select.tensor_view import MAX_BOX, View
from flashcore_cupy.select.units import MAX_GRID, MMA, WARP_SIZE, WARPGROUP_WARPS, round_up

_KIB = 1024
_MAX_WARPGROUPS = 4
_COLUMN_GROUP = 8
"""Columns of O that a fragment has."""
_BARRIER_BYTES = 8
# Of two thread blocks each has 1 KiB for the system: half of the multiprocessor's is too much.
_ALONE_BYTES = (smem_limit(HOPPER) + _KIB) // 2
# What "auto" takes it for: one block of rows for each multiprocessor of an H100 or H200, and 1024
# keys of 64 columns.
_MOST_BLOCKS, _MOST_ELEMENTS, _MOST_COLUMNS = 132, 1 << 16, 128
# Fewer rows share a tile with those of other heads, or leave most of it empty.
_FEW_ROWS = 16


@dataclass(frozen=True)
class Sm90Cluster(Sm90):
    """Warpgroups, of one CTA or of two, share out the keys of 64 rows, and combine on the chip."""

    source = "fwd_sm90_cluster.cu"
    entries = ("fwd_sm90_cluster",)
    takes_packed = False
    takes_blocks = False
    overlaps_launches = True
    own_switches = ("one_tile", "alone")

    # --- which problems ---------------------------------------------------------------------------

    @classmethod
    def is_meant_for(cls, problem: AttentionProblem) -> bool:
        """Whether there are few blocks of rows, and few keys; ``fwd_sm90.cu`` is for more."""
        blocks = problem.batch * problem.heads_q * -(-problem.seqlen_q // ROWS_OF_WARPGROUP)
        most_keys = _MOST_ELEMENTS // max(64, problem.head_dim, problem.head_dim_v)
        group = problem.heads_q // problem.heads_kv
        fewest_rows = _FEW_ROWS if group == 1 else ROWS_OF_WARPGROUP
        return (
            not problem.batch_invariant
            and not problem.packed
            and max(problem.head_dim, problem.head_dim_v) <= _MOST_COLUMNS
            and blocks <= _MOST_BLOCKS
            and problem.seqlen_kv <= most_keys
            and group * problem.seqlen_q > fewest_rows
        )

    # --- tiles ------------------------------------------------------------------------------------

    def unfit(self) -> list[str]:
        """Whole warpgroups along the keys, one or two thread blocks, columns for each of them."""
        t = self.tile
        reasons = ["it has no packed batches"] * self.packed
        if t.warps_m != WARPGROUP_WARPS or t.block_m != ROWS_OF_WARPGROUP:
            reasons.append(
                f"block_m={t.block_m}, warps_m={t.warps_m}: a tile has 64 queries, and 4 warps "
                f"along them"
            )
        if t.warps_n > _MAX_WARPGROUPS:
            reasons.append(f"warps_n={t.warps_n}: at most {_MAX_WARPGROUPS} warpgroups share keys")
        if t.block_n % MMA or t.block_n > MAX_BOX:
            reasons.append(f"block_n={t.block_n} is not a multiple of 16 up to {MAX_BOX}")
        if t.cluster > 2:
            reasons.append(f"cluster={t.cluster}; 1 or 2 thread blocks")
        if self.head_dim_v % (_COLUMN_GROUP * t.warps_n * t.cluster):
            reasons.append(
                f"warps_n={t.warps_n}, cluster={t.cluster}: {self.head_dim_v} columns are not "
                f"whole groups of 8 for each warpgroup"
            )
        if t.one_tile and t.num_stages > 1:
            reasons.append(f"one_tile with num_stages={t.num_stages}: one tile is loaded once")
        others = [name for name in ("warps_d",) if getattr(t, name) > 1]
        switches = ("cp_async", "warp_softmax", "fp8", "pack_gqa", "split_kv")
        others += [name for name in switches if getattr(t, name)]
        if others:
            reasons.append(f"{self.kernel} has no {', '.join(others)}")
        if self.head_dim % 32 or self.head_dim_v % 32:
            reasons.append(f"{self.kernel} has tiles of 32, 64, 96, ... columns")
        return reasons

    def check_heads(self, problem: AttentionProblem) -> None:
        """Raise ``ValueError`` if ``one_tile`` leaves keys over."""
        super().check_heads(problem)
        t = self.tile
        reach = t.block_n * t.warps_n * t.cluster
        if t.one_tile and problem.seqlen_kv > reach:
            raise ValueError(
                f"config: one_tile, with {problem.seqlen_kv} keys; block_n x warps_n x cluster = "
                f"{reach} are all that it has: set one_tile=False, or have larger tiles"
            )

    @property
    def num_warps(self) -> int:
        """Warpgroups along the keys."""
        return self.tile.warps_m * self.tile.warps_n

    @property
    def q_stages(self) -> int:
        """A thread block has one tile of Q."""
        return 1

    @property
    def staged_cols(self) -> int:
        """O leaves from registers: a copy by TMA would have to be waited for."""
        return 0

    @property
    def smem_bytes(self) -> int:
        """Q; K and V of every warpgroup; what warpgroups give each other; the barriers.

        ``alone`` has more than half of the multiprocessor's. Else the thread blocks of the next
        launch, which begin before this one's end, come to lie beside them, or two on one
        multiprocessor, though others are free; and clusters wait for each other's place.
        """
        t, groups = self.tile, self.tile.warps_n
        total = self._q_bytes
        total += groups * t.num_stages * self._size * t.block_n * (self.head_dim + self.head_dim_v)
        total += groups * self._inbox_bytes
        total += _BARRIER_BYTES * (1 + groups * (t.num_stages * (self._halves + 1) + 2))
        # Which keys each warp sees: a bit per key and lane of four; else an empty struct each.
        words = -(-t.block_n // 128)
        total += groups * (WARPGROUP_WARPS * 4 * 4 * words if self.hides_keys else 1)
        total = round_up(total, _KIB)
        return max(total, _ALONE_BYTES) if t.alone else total

    @property
    def _halves(self) -> int:
        """Parts of a tile of K, which arrive one by one: ``HALVES`` in ``traits.cuh``."""
        return 1 if self.hides_keys or self.tile.block_n % (2 * MMA) else 2

    @property
    def _inbox_bytes(self) -> int:
        """``Inbox`` in ``traits.cuh``: columns of O, m and l from each of the others."""
        parts = self.tile.warps_n * self.tile.cluster
        threads, columns = WARPGROUP_WARPS * WARP_SIZE, self.head_dim_v // parts
        groups = columns // _COLUMN_GROUP if parts > 1 else 1
        return max(1, parts - 1) * 16 * (groups * threads + 2 * threads // 4)

    # --- launches ---------------------------------------------------------------------------------

    def views(self, problem: AttentionProblem, output: Operand) -> tuple[View, ...]:
        """K arrives in halves of a tile."""
        q, k, v = super().views(problem, output)
        return q, k._replace(box=(k.box[0], self.tile.block_n // self._halves, 1)), v

    def splits(self, problem: AttentionProblem, resident: int) -> int:
        """A part for each thread block of a cluster."""
        return self.tile.cluster

    def section(self, problem: AttentionProblem, multiprocessors: int) -> int:
        """A head's blocks come one after the other."""
        return 1

    def most_blocks(self, multiprocessors: int) -> int:
        """A thread block has one block of rows."""
        return MAX_GRID

    def workspace_bytes(self, blocks: int, splits: int, most_blocks: int) -> tuple[int, int]:
        """Nothing passes through memory."""
        return 0, 0

    # --- for people -------------------------------------------------------------------------------

    def describe_warps(self) -> str:
        """Who multiplies."""
        groups = self.tile.warps_n
        return f"{groups} warpgroup{'s' * (groups > 1)} along the keys"
