"""The family of ``bwd_sm90_wide.cu``: the backward pass of wide heads by TMA and wgmma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.select.config import Tile
from flashcore_cupy.select.sm90_backward import Sm90Backward
from flashcore_cupy.select.units import WARP_SIZE, WARPGROUP_WARPS, round_up

_ROWS, _KIB, _TURNS = 64, 1024, 4  # rows of wgmma, and columns of a panel
_CONSUMERS, _NARROW = 3, 128


@dataclass(frozen=True)
class Sm90WideBackward(Sm90Backward):
    """One warpgroup loads by TMA; of the others each has a gradient of 64 rows."""

    source = "bwd_sm90_wide.cu"
    entries = ("bwd_sm90_wide",)
    idea: ClassVar[str] = "for wide heads: a warpgroup for each gradient, which hand on P and dS"
    of_keys = ("dq", "dk", "dv")
    takes_packed = False
    takes_blocks = False
    lacks: ClassVar[tuple[str, ...]] = ("block_mask", "mask", "mask_mod")

    @classmethod
    def is_meant_for(cls, problem: AttentionProblem) -> bool:
        """Narrower heads have ``bwd_sm90``, which takes twice as many keys at a time."""
        return max(problem.head_dim, problem.head_dim_v) > _NARROW

    @classmethod
    def dq_columns(cls, head_dim: int, tile: Tile) -> int:
        """All where registers hold them, beside what the other warpgroups have."""
        return head_dim if head_dim <= 192 else _ROWS

    def unfit(self) -> list[str]:
        """64 rows for each gradient."""
        t, reasons = self.tile, []
        warps = _CONSUMERS * WARPGROUP_WARPS
        if (t.block_m, t.block_n, t.warps_m) != (_ROWS, _ROWS, warps):
            reasons.append(
                f"block_m={t.block_m}, block_n={t.block_n}, warps_m={t.warps_m}: bwd_sm90_wide has "
                f"{_ROWS}, {_ROWS} and {warps}"
            )
        if self.head_dim % _ROWS or self.head_dim_v % _ROWS:
            reasons.append("bwd_sm90_wide has tiles of 64, 128, 192, ... columns")
        return reasons + self.lacking()

    @property
    def smem_bytes(self) -> int:
        """K and V, the stages of Q, dO and dS, P in fp32, the barriers."""
        t, size = self.tile, ITEMSIZE[self.dtype]
        row = size * (self.head_dim + self.head_dim_v)
        total = t.block_m * row + t.num_stages * t.block_n * (row + 8 + size * t.block_m)
        total += 4 * t.block_n * WARPGROUP_WARPS * WARP_SIZE // 2
        barriers = 1 + 2 * _TURNS + 2 + 3 * 2 * t.num_stages
        return round_up(total + 8 * barriers + 8, _KIB) + _KIB
