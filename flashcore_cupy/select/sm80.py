"""The family of ``fwd_sm80.cu``: mma.sync and ldmatrix, from sm_80 on."""

from __future__ import annotations

from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.select.grids import Split, fastest_split
from flashcore_cupy.select.tile_lists import TakesLists
from flashcore_cupy.select.units import MMA, WARP_SIZE, panel_cols, round_up

_NAMED_BARRIERS = 15  # the sixteenth is __syncthreads's
_WORK_BYTES = 96
"""``Work`` in ``work.cuh``, a counter, two pointers, and the barriers of K and V."""
# What a split costs beyond its own keys, in keys: to begin and end, and to be combined.
_SPLIT_KEYS, _COMBINE_KEYS = 256, 24


class Sm80(TakesLists):
    """Scores, probabilities and output stay in registers; K and V arrive by cp.async."""

    source = "fwd_sm80.cu"
    entries = ("fwd_sm80",)
    has_rules = True
    takes_packed = True

    # --- tiles ------------------------------------------------------------------------------------

    def unfit(self) -> list[str]:
        """Whole fragments for each warp, registers and shared memory for the rest."""
        t, size = self.tile, ITEMSIZE[self.dtype]
        reasons = ["cluster is wgmma_sm90's"] * (t.cluster > 1) + self.uncut()
        if t.num_stages not in (1, 2):
            reasons.append(f"num_stages={t.num_stages}; one stage, or two in turn")
        if not t.cp_async or t.warp_softmax or t.fp8:
            reasons.append("mma_sm80 has cp_async and neither warp_softmax nor fp8")
        if t.block_n % (MMA * t.warps_n * t.warps_d) or self.head_dim_v % (MMA * t.warps_d):
            reasons.append(f"warps_d={t.warps_d}: keys and columns do not divide into steps of 16")
        if t.warps_d > 1:
            reasons += self._unfit_columns()
        if size == 4 and t.block_n // t.warps_n > 64:
            reasons.append(f"block_n={t.block_n}: a warp takes at most 64 keys of float32")
        columns = self.head_dim_v // t.warps_d // 2
        partials = (t.warps_n - 1) * 32 * (t.block_m // 16) * (4 + columns) * 4
        if partials > t.num_stages * t.block_n * (self._row_qk + self._row_v):
            reasons.append(
                f"warps_n={t.warps_n}: their partials do not fit over K and V to be combined"
            )
        if self.is_listed and 64 % (t.block_m // t.warps_m):
            reasons.append(
                f"block_m={t.block_m}, warps_m={t.warps_m}: with a block mask a warp has 16, 32 or "
                f"64 rows"
            )
        return reasons + self.unlisted("pack_gqa", "split_kv")

    def _unfit_columns(self) -> list[str]:
        """Why warps cannot share rows, each with a part of the columns of O."""
        t, reasons = self.tile, []
        if t.warps_m > _NAMED_BARRIERS:
            reasons.append(f"warps_m={t.warps_m}: at most {_NAMED_BARRIERS} where warps share rows")
        if t.warps_n > 1 or t.num_stages > 1 or t.split_kv or ITEMSIZE[self.dtype] != 2:
            reasons.append(
                "warps_d: with 16-bit inputs, one stage, and neither warps_n nor split_kv"
            )
        panel, panel_p = panel_cols(self.head_dim_v), panel_cols(t.block_n)
        keys = t.block_n // t.warps_d
        if self.head_dim_v % 32 == 0 and self.head_dim_v // t.warps_d % panel:
            reasons.append(
                f"warps_d={t.warps_d}: each warp needs whole panels of {panel} of the "
                f"{self.head_dim_v} columns"
            )
        if t.block_n % 32 == 0 and keys % panel_p and panel_p % keys:
            reasons.append(
                f"block_n={t.block_n}, warps_d={t.warps_d}: a warp's {keys} keys are neither whole "
                f"panels of {panel_p} nor an equal part of one"
            )
        return reasons

    def _row_bytes(self, columns: int) -> int:
        """A shared row: swizzled, or padded; see ``shared_layout.cuh``."""
        swizzled = ITEMSIZE[self.dtype] == 2 and columns % 32 == 0
        return columns * ITEMSIZE[self.dtype] + (0 if swizzled else 16)

    @property
    def _row_qk(self) -> int:
        return self._row_bytes(self.head_dim)

    @property
    def _row_v(self) -> int:
        return self._row_bytes(self.head_dim_v)

    @property
    def smem_bytes(self) -> int:
        """Q, and O over it; the stages of K and V; what warps that share rows exchange."""
        t = self.tile
        total = t.block_m * max(self._row_qk, self._row_v)
        total += t.num_stages * t.block_n * (self._row_qk + self._row_v)
        if t.warps_d > 1:
            total += t.block_m * self._row_bytes(t.block_n) + 4 * t.warps_d * t.block_m
        if t.warps_d > 1 and self.hides_keys:
            # which keys each warp sees
            total += 16 * self.num_warps * -(-t.block_n // t.warps_d // 128)
        return round_up(total + _WORK_BYTES, 128)

    @property
    def softmax_keys(self) -> int:
        """A warp's own: warps along the keys have a running maximum each."""
        return self.tile.block_n // self.tile.warps_n

    # --- launches ---------------------------------------------------------------------------------

    def splits(self, problem: AttentionProblem, resident: int) -> int:
        """The number of splits with which the last thread block ends first."""

        def cost(split: Split) -> float:
            combine = _COMBINE_KEYS * (split.splits - 1)
            return split.own_keys + split.waves * _SPLIT_KEYS + combine

        return fastest_split(problem, self, resident, cost)

    def workspace_bytes(self, blocks: int, splits: int, most_blocks: int) -> tuple[int, int]:
        """The partials of each warp of each split; a counter of arrivals per block of rows."""
        if splits == 1:
            return 0, 0
        t = self.tile
        fragments = t.block_m // t.warps_m // 16
        values = fragments * 2 * (2 + self.head_dim_v // 8 * 2)  # WarpRows::VALUES in warp_rows.cuh
        return blocks * splits * t.warps_m * values * WARP_SIZE * 4, blocks * 4
