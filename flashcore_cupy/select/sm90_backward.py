"""The family of ``bwd_sm90.cu``: the backward pass by TMA and wgmma, on sm_90a alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.problem.gradients import BackwardProblem
from flashcore_cupy.select.config import Tile
from flashcore_cupy.select.params import HOPPER_BACKWARD_PARAMS
from flashcore_cupy.select.sm80_backward import Sm80Backward
from flashcore_cupy.select.tensor_view import TMA_ALIGN, View, is_addressable, view_of
from flashcore_cupy.select.tile_lists import is_listed
from flashcore_cupy.select.units import MMA, WARPGROUP_WARPS, round_up

_BOX_ROWS, _KIB, _TURNS, _MASK_WORD, _WORK_BYTES = 64, 1024, 4, 128, 48


@dataclass(frozen=True)
class Sm90Backward(Sm80Backward):
    """One warpgroup loads by TMA; the others have 64 rows each."""

    source = "bwd_sm90.cu"
    entries = ("bwd_sm90",)
    params: ClassVar[np.dtype[Any]] = HOPPER_BACKWARD_PARAMS
    row_align = TMA_ALIGN
    idea: ClassVar[str] = "the same by TMA and wgmma: a warp that loads, P and dS in registers"

    lacks: ClassVar[tuple[str, ...]] = ()
    """Rules that it has not, whatever the tile."""

    @classmethod
    def why_not(cls, problem: BackwardProblem, arch: str) -> str | None:
        """Why it cannot do a problem on a target; None if it can."""
        attention = problem.attention
        if arch != HOPPER:
            return f"needs wgmma, which {HOPPER} alone has; the target is {arch}"
        lacking = [name for name in cls.lacks if name in attention.rules.names]
        lacking += ["cu_seqlens"] * (attention.packed and not cls.takes_packed)
        lacking += ["gradients of mod_args"] * bool(problem.mod_args)
        if lacking:
            return f"has no {', '.join(lacking)}"
        loaded = (attention.q, attention.k, attention.v, problem.do)
        unfit = [x.name for x in loaded if not is_addressable(x, attention.dtype)]
        if unfit:
            return (
                f"loads by TMA: needs rows that start and end on multiples of {TMA_ALIGN} bytes, "
                f"and positive strides, unlike those of {', '.join(unfit)}"
            )
        return None

    @classmethod
    def why_slow(cls, problem: AttentionProblem) -> str | None:
        """Masks are looked up for each element, a few at a time: registers are full.

        With a block mask that is so in mixed blocks alone. On an H200, 2 x 8192 tokens, causal took
        5.9 and 4.5 ms at D=64 and 128, bwd_sm80 7.3 and 6.9; a window of 1024, which has few full
        blocks, 3.1 and 2.6 ms, and 2.9 and 2.7.
        """
        if problem.rules.block_mask is not None:
            return None
        masks = [str(name) for name in ("mask", "mask_mod") if name in problem.rules.names]
        return f"is slower than bwd_sm80 with {' and '.join(masks)}" if masks else None

    @classmethod
    def dq_columns(cls, head_dim: int, tile: Tile) -> int:
        """Of 64 queries a consumer has 64 columns, or each has all 64 of some tiles."""
        shared = _BOX_ROWS * (tile.warps_m // WARPGROUP_WARPS)
        fits = tile.num_stages > 1 and tile.block_n == _BOX_ROWS and shared > _BOX_ROWS
        return _BOX_ROWS if fits and head_dim in (_BOX_ROWS, shared) else 0

    def unfit(self) -> list[str]:
        """Whole warpgroups, whole boxes."""
        t, reasons = self.tile, []
        if t.warps_m not in (4, 8, 12) or t.block_m != MMA * t.warps_m:
            reasons.append(
                f"block_m={t.block_m}, warps_m={t.warps_m}: one to three warpgroups of 4 warps, "
                f"each with 64 rows: warps_m=4, 8 or 12, block_m=16*warps_m"
            )
        if t.block_n % _BOX_ROWS or t.block_n > 256:
            reasons.append(f"block_n={t.block_n} is not a multiple of {_BOX_ROWS} up to 256")
        reasons += self.lacking() + self.unlisted()
        if self.head_dim % 32 or self.head_dim_v % 32:
            reasons.append("bwd_sm90 has tiles of 32, 64, 96, ... columns")
        return reasons

    def lacking(self) -> list[str]:
        """What a tile asks for that kernels which load by TMA have not."""
        t = self.tile
        others = [name for name in ("warps_n", "warps_d", "cluster") if getattr(t, name) > 1]
        switches = ("cp_async", "warp_softmax", "fp8", "pack_gqa", "split_kv")
        others += [name for name in switches if getattr(t, name)]
        return [f"{self.entries[0]} has no {', '.join(others)}"] if others else []

    @property
    def gradient_cols(self) -> int:
        """All of them."""
        return self._columns

    @property
    def num_warps(self) -> int:
        """The consumers and the warpgroup that loads."""
        return super().num_warps + WARPGROUP_WARPS

    @property
    def smem_bytes(self) -> int:
        """A block's own rows, the stages of the other side's, the barriers."""
        t = self.tile
        row = ITEMSIZE[self.dtype] * (self.head_dim + self.head_dim_v)
        total = t.block_m * row + t.num_stages * t.block_n * (row + 8)
        if self.adds_dq:
            total += ITEMSIZE[self.dtype] * t.num_stages * t.block_n * t.block_m
        if self.adds_dq and (self.hides_keys or self.packed):
            total += ITEMSIZE[self.dtype] * t.block_m * self.head_dim  # a copy of the own keys
        if self.hides_keys:
            total += 2 * 16 * t.warps_m * -(-t.block_n // _MASK_WORD)  # which rows each warp meets
        if is_listed(self):
            total += 16 * t.num_stages  # which tile a stage holds
        barriers = 8 * (2 + 2 * _TURNS + 4 * t.num_stages)
        return round_up(total + barriers + _WORK_BYTES, _KIB) + _KIB

    def own_views(self, problem: BackwardProblem) -> tuple[View, ...]:
        """How the kernel's maps see q, k, v and dO.

        What it walks over, and all keys, begin and end with the rows that meet any of the other
        side: what lies outside comes as zeros, not as what is there, which may be NaN. Of packed
        batches only the device knows these rows.
        """
        attention = problem.attention
        dtype = attention.dtype
        queries, keys = (0, attention.seqlen_q), (0, attention.seqlen_kv)
        if not self.packed:
            keys = _keys_met(attention)
            queries = _queries_met(attention) if self.owns_keys else queries
        return (
            view_of(attention.q, dtype, self.head_dim, _BOX_ROWS, queries),
            view_of(attention.k, dtype, self.head_dim, _BOX_ROWS, keys),
            view_of(attention.v, dtype, self.head_dim_v, _BOX_ROWS, keys),
            view_of(problem.do, dtype, self.head_dim_v, _BOX_ROWS, queries)._replace(name="dout"),
        )

    def describe_units(self) -> list[str]:
        """Who loads."""
        return ["TMA"]


def _queries_met(problem: AttentionProblem) -> tuple[int, int]:
    """From the first query that sees any key to behind the last, by position."""
    left, right = problem.window
    first = max(0, -(problem.causal_offset + right)) if right >= 0 else 0
    end = problem.seqlen_q
    if left >= 0:
        end = min(end, problem.seqlen_kv - problem.causal_offset + left)
    return _range(first, end)


def _keys_met(problem: AttentionProblem) -> tuple[int, int]:
    """From the first key that any query sees to behind the last, by position."""
    left, right = problem.window
    first = max(0, problem.causal_offset - left) if left >= 0 else 0
    end = problem.seqlen_kv
    if right >= 0:
        end = min(end, problem.seqlen_q + problem.causal_offset + right)
    return _range(first, end)


def _range(first: int, end: int) -> tuple[int, int]:
    return (first, end) if first < end else (0, 0)  # nothing is loaded
