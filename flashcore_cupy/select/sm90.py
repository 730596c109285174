"""The family of ``fwd_sm90.cu``: TMA and wgmma, on sm_90a alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.cuda.targets import HOPPER, smem_limit
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem, Operand
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.grids import (
    Split,
    blocks_per_head,
    fastest_split,
    query_blocks,
    rows_per_head,
)
from flashcore_cupy.select.params import HOPPER_PARAMS
from flashcore_cupy.select.tensor_view import (
    MAX_BOX,
    TMA_ALIGN,
    View,
    check_layout,
    clipped_view,
    is_addressable,
    view_of,
)
from flashcore_cupy.select.tile_lists import TakesLists
from flashcore_cupy.select.units import MAX_GRID, MMA, WARP_SIZE, WARPGROUP_WARPS, panel_cols

ROWS_OF_WARPGROUP = 64
"""Rows of q that one copy takes."""
ROWS_OF_WARP = 16
"""Rows of o that one copy brings."""
_MAX_STAGES = 4
_KIB = 1024
# What a split costs beyond its own keys, in keys: to begin and end, while the next one is loaded;
# that keys are split at all; and to combine eight splits.
_SPLIT_KEYS, _ANY_SPLIT_KEYS, _COMBINE_KEYS = 64, 128, 100
# Of ``section``, measured on an H200 at D=64, 128, 256 and 512 to 16384 queries: the K and V that
# stay in L2; and of heads with many blocks, how many that is, and how many rounds are interleaved.
_L2_BYTES, _MANY_BLOCKS, _MANY_ROUNDS = 34_000_000, 40, 8


@dataclass(frozen=True)
class Sm90(TakesLists):
    """One warpgroup loads by TMA; the others overlap softmax with products by wgmma."""

    source = "fwd_sm90.cu"
    entries = ("fwd_sm90",)
    params: ClassVar[np.dtype[Any]] = HOPPER_PARAMS
    has_rules = True
    takes_packed = True
    row_align = TMA_ALIGN
    mask_keys = 16

    tma_stores: bool = True
    """Whether TMA can address the output."""

    # --- which problems and targets ---------------------------------------------------------------

    @classmethod
    def why_not_on(cls, arch: str) -> str | None:
        """One target has wgmma."""
        if arch == HOPPER:
            return None
        return f"needs wgmma, which {HOPPER} alone has; the target is {arch}"

    @classmethod
    def check_problem(cls, problem: AttentionProblem) -> None:
        """TMA addresses q, k and v; a mask is read 16 keys at a time."""
        check_layout(problem)
        if problem.rules.mask is not None and not problem.rules.mask.chunks:
            raise ValueError(
                f"reads a mask {cls.mask_keys} keys at a time: its rows have to begin on multiples "
                f"of 16 bytes, with a multiple of 16 keys"
            )

    @classmethod
    def why_slow(cls, problem: AttentionProblem) -> str | None:
        """A bias is read two keys at a time, or slowly."""
        if problem.rules.bias is None or problem.rules.bias.pairs:
            return None
        return "is slower with a bias that cannot be read two keys at a time"

    def stored_to(self, output: Operand) -> KernelConfig:
        """O leaves by TMA where that can address it."""
        return replace(
            self,
            align_bytes=min(self.align_bytes, output.align_bytes),
            tma_stores=self.tma_stores and is_addressable(output, self.dtype),
        )

    def check_heads(self, problem: AttentionProblem) -> None:
        """A copy of q takes whole groups of heads."""
        super().check_heads(problem)
        group = problem.heads_q // problem.heads_kv
        if self.tile.pack_gqa and self.tile.block_m % group:
            raise ValueError(
                f"packs groups of 1, 2, 4, ... {self.tile.block_m} heads, not of {group}"
            )

    # --- tiles ------------------------------------------------------------------------------------

    def unfit(self) -> list[str]:
        """Whole warpgroups, boxes that TMA copies, partials that fit over K to be combined."""
        t, reasons = self.tile, []
        if t.warps_m not in (4, 8, 12) or t.block_m != MMA * t.warps_m:
            reasons.append(
                f"block_m={t.block_m}, warps_m={t.warps_m}: one to three warpgroups of 4 warps, "
                f"each with 64 queries: warps_m=4, 8 or 12, block_m=16*warps_m"
            )
        if t.block_n % MMA or t.block_n > MAX_BOX:
            reasons.append(f"block_n={t.block_n} is not a multiple of 16 up to {MAX_BOX}")
        if t.num_stages > _MAX_STAGES:
            reasons.append(f"num_stages={t.num_stages}; at most {_MAX_STAGES}")
        if (t.pack_gqa or t.split_kv) and t.warps_m > WARPGROUP_WARPS:
            reasons.append("wgmma_sm90 has pack_gqa and split_kv for one consumer warpgroup alone")
        if t.cluster not in (1, 2, 4, 8) or (t.cluster > 1 and not t.split_kv):
            reasons.append(f"cluster={t.cluster}; 2, 4 or 8 thread blocks, with split_kv")
        # O, padded, and m and l: see split_combine.cuh
        partials = 4 * t.block_m * (self.head_dim_v + 8 + 2)
        if t.cluster > 1 and partials > self._size * t.num_stages * t.block_n * self.head_dim:
            reasons.append(f"cluster={t.cluster}: partials do not fit over K to be combined")
        others = [name for name in ("warps_n", "warps_d") if getattr(t, name) > 1]
        others += [name for name in ("cp_async", "warp_softmax", "fp8") if getattr(t, name)]
        if others:
            reasons.append(f"wgmma_sm90 has no {', '.join(others)}")
        if self.head_dim % 32 or self.head_dim_v % 32:
            reasons.append("wgmma_sm90 has tiles of 32, 64, 96, ... columns")
        return reasons + self.unlisted("pack_gqa", "split_kv")

    @property
    def num_warps(self) -> int:
        """The consumers and the warpgroup that loads."""
        return super().num_warps + WARPGROUP_WARPS

    @property
    def _size(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def _q_bytes(self) -> int:
        return self._size * self.tile.block_m * self.head_dim

    @property
    def _kv_bytes(self) -> int:
        """The stages of K and V, the barriers, and what it takes to align what TMA loads."""
        t = self.tile
        total = t.num_stages * self._size * t.block_n * (self.head_dim + self.head_dim_v)
        if self.hides_keys:
            total += _KIB  # which keys each warp sees
        return total + 2 * _KIB

    @property
    def q_stages(self) -> int:
        """Tiles of Q in shared memory: this block's, and the next one's where there is room."""
        return 2 if self._kv_bytes + 2 * self._q_bytes <= smem_limit(HOPPER) else 1

    @property
    def _loaded_bytes(self) -> int:
        """All that is loaded."""
        return self._kv_bytes + self.q_stages * self._q_bytes

    @property
    def staged_cols(self) -> int:
        """Columns of O that leave through shared memory, by TMA; the others are stored directly.

        As many panels as there is room for.
        """
        t = self.tile
        # A box of 16 rows is one of the array only where rows are queries of one sequence; and O of
        # split keys is combined in memory first.
        is_box = not (t.pack_gqa or t.split_kv)
        has_output = self.gate not in ("qk", "softmax")
        if not (self.tma_stores and self.align_bytes == TMA_ALIGN and is_box and has_output):
            return 0
        panel = panel_cols(self.head_dim_v)
        room = (smem_limit(HOPPER) - self._loaded_bytes) // (self._size * t.block_m)
        return max(0, min(self.head_dim_v, room // panel * panel))

    @property
    def smem_bytes(self) -> int:
        """What is loaded, and the columns of O that TMA stores."""
        return self._loaded_bytes + self._size * self.tile.block_m * self.staged_cols

    def own_defines(self) -> dict[str, int]:
        """How shared memory is divided, so that the kernel need not compute it again."""
        return {"FC_Q_STAGES": self.q_stages, "FC_STAGED_COLS": self.staged_cols}

    # --- launches ---------------------------------------------------------------------------------

    def splits(self, problem: AttentionProblem, resident: int) -> int:
        """A cluster's thread blocks have a split each; else as many as end first."""
        if self.tile.cluster > 1:
            return self.tile.cluster

        def cost(split: Split) -> float:
            # Half of the thread blocks read about as fast as memory delivers; between that and all
            # of them some have the way to memory for themselves, and others wait: B=1, 8 heads,
            # 65536 keys, D=128 71, 77 and 69 us in 9, 12 and 16 splits. So of equals the most.
            busy = max(split.own_keys, 2 * split.share)
            return busy + split.waves * _SPLIT_KEYS + self._combine_keys(problem, split.splits)

        return fastest_split(problem, self, resident, cost)

    def _combine_keys(self, problem: AttentionProblem, splits: int) -> int:
        """What it takes to combine: a warpgroup, four columns per thread at a time."""
        if splits == 1:
            return 0
        rows = min(self.tile.block_m, rows_per_head(problem, self))
        rounds = -(-rows * self.head_dim_v // (4 * WARPGROUP_WARPS * WARP_SIZE))
        return _ANY_SPLIT_KEYS + _COMBINE_KEYS * rounds * -(-splits // 8)

    def section(self, problem: AttentionProblem, multiprocessors: int) -> int:
        """Heads whose blocks are interleaved; see ``interleave_section`` in ``work.cuh``.

        As many as have their K and V in L2 together, or, of heads with many blocks, as make up
        several rounds: there a few blocks of every head run at a time and share what they read.
        Packed batches: how many keys of a head L2 has room for; see ``packed_section``.
        """
        if problem.packed:
            return _L2_BYTES // (2 * (self.head_dim + self.head_dim_v))
        blocks = blocks_per_head(problem, self)
        head_bytes = 2 * problem.visible_kv * (self.head_dim + self.head_dim_v)
        room = _L2_BYTES // 2 if blocks <= 4 else _L2_BYTES
        heads = max(1, room // max(1, head_bytes))
        size = 1 << heads.bit_length() - 1
        if blocks >= _MANY_BLOCKS:
            rounds = -(-_MANY_ROUNDS * multiprocessors // blocks)
            size = max(size, 1 << (rounds - 1).bit_length())
        # The scheduler multiplies it by the blocks of a head, in 32 bits: keys that take no room in
        # L2 must not make it larger than all heads.
        return min(size, query_blocks(problem, self) // max(1, blocks))

    def most_blocks(self, multiprocessors: int) -> int:
        """Those that fit, which stay; clusters have one block of rows and end."""
        return MAX_GRID if self.tile.cluster > 1 else multiprocessors * self.tile.min_blocks

    def workspace_bytes(self, blocks: int, splits: int, most_blocks: int) -> tuple[int, int]:
        """``SplitRows`` in ``split_combine.cuh``, which a cluster has in shared memory.

        The counters are ``WorkCounters`` in ``params.cuh``: claimed blocks, then arrivals.
        """
        if self.tile.cluster > 1 or (splits == 1 and blocks <= most_blocks):
            return 0, 0
        partials = self.tile.block_m * (self.head_dim_v + 2) * 4
        return (blocks * splits * partials, 4 + blocks * 4) if splits > 1 else (0, 4)

    def views(self, problem: AttentionProblem, output: Operand) -> tuple[View, ...]:
        """How the kernel's maps see q, k and v, and o where it is stored by one.

        k and v end behind the last key that any query sees, and v begins at the first: what lies
        outside comes as zeros, not as what is there, which may be NaN.
        """
        first, end = _first_key(problem), problem.visible_kv
        if first >= end:  # no key is seen, and none is loaded
            first = 0
        dtype, block_n, queries = problem.dtype, self.tile.block_n, (0, problem.seqlen_q)
        q = view_of(problem.q, dtype, self.head_dim, ROWS_OF_WARPGROUP, queries)
        views = [
            _grouped(q, problem) if self.tile.pack_gqa else q,
            view_of(problem.k, dtype, self.head_dim, block_n, (0, end)),
            view_of(problem.v, dtype, self.head_dim_v, block_n, (first, end)),
        ]
        if self.staged_cols:
            views.append(view_of(output, dtype, self.staged_cols, ROWS_OF_WARP, queries))
        if self.packed:
            whole = {"q"} if self.tile.pack_gqa else set()
            views = [
                view if view.name in whole else clipped_view(view, stored=view.name == "o")
                for view in views
            ]
        return tuple(views)

    # --- for people -------------------------------------------------------------------------------

    def describe_warps(self) -> str:
        """Who multiplies."""
        consumers = self.tile.warps_m // WARPGROUP_WARPS
        return f"{consumers} consumer warpgroup{'s' * (consumers > 1)}"

    def describe_units(self) -> list[str]:
        """Who loads."""
        return ["TMA"]

    def describe_accesses(self) -> str:
        """How O is stored; loads are of boxes."""
        ways = ["by TMA"] * (self.staged_cols > 0)
        ways += [f"of {self.align_bytes} bytes"] * (self.staged_cols < self.head_dim_v)
        return f"stores {' and '.join(ways)}"


def _first_key(problem: AttentionProblem) -> int:
    """The first key that any query sees; of packed batches only the device knows it."""
    left = problem.window[0]
    if left < 0 or problem.packed:
        return 0
    return max(0, problem.causal_offset - left)


def _grouped(q: View, problem: AttentionProblem) -> View:
    """Q with heads before rows, so that a copy takes a group's heads of the same rows."""
    columns, rows, heads, batch = q.dims
    row, head, step = q.strides
    group = problem.heads_q // problem.heads_kv
    box = (q.box[0], group, ROWS_OF_WARPGROUP // group)
    return q._replace(dims=(columns, heads, rows, batch), strides=(head, row, step), box=box)
