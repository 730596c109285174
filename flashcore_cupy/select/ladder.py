"""The teaching kernels of the ladder: ``scalar``, the WMMA kernels, and their fp8 variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.select.config import KernelConfig, Scratch, Tile
from flashcore_cupy.select.params import QUANTIZE_PARAMS
from flashcore_cupy.select.units import MMA, WARP_SIZE, round_up


def padded_row(columns: int) -> int:
    """Elements between rows of a shared tile; see ``padded_row`` in ``ladder/tile_load.cuh``."""
    return columns + 8


def _foreign(t: Tile) -> list[str]:
    """What no kernel of the ladder has."""
    reasons = []
    if t.cluster > 1:
        reasons.append("no kernel of the ladder has clusters")
    if t.warps_d > 1 or t.pack_gqa or t.split_kv:
        reasons.append("no kernel of the ladder has warps_d, pack_gqa or split_kv")
    return reasons


class Scalar(KernelConfig):
    """One fused kernel without tensor cores; tiles have exactly the problem's columns."""

    source = "ladder/scalar.cu"
    entries = ("scalar",)

    @classmethod
    def of(
        cls, kernel: str, dims: tuple[int, int], tile: Tile, problem: AttentionProblem
    ) -> KernelConfig:
        """Join it with a problem; it reads by element, so one build serves every alignment."""
        columns = max(problem.head_dim, problem.head_dim_v)
        config = super().of(kernel, (columns, columns), tile, problem)
        return replace(config, align_bytes=ITEMSIZE[problem.dtype])

    def unfit(self) -> list[str]:
        """Lanes that are keys, warps that take queries in turns."""
        t, reasons = self.tile, _foreign(self.tile)
        if t.block_n != WARP_SIZE:
            reasons.append(
                f"block_n={t.block_n}; scalar gives each of 32 lanes one key: block_n=32"
            )
        if t.block_m % self.num_warps:
            reasons.append(f"block_m={t.block_m} is not a multiple of the {self.num_warps} warps")
        if t.num_stages != 1 or t.cp_async or t.warp_softmax or t.fp8:
            reasons.append("scalar has one stage and none of cp_async, warp_softmax, fp8")
        return reasons

    @property
    def smem_bytes(self) -> int:
        """Q, K with rows of an odd length, and V, all in float32."""
        t = self.tile
        keys = t.block_n * ((self.dim_qk | 1) + self.dim_v)
        return 4 * (t.block_m * self.dim_qk + keys)


class Unfused(KernelConfig):
    """Three launches: scores, softmax and P V, with S and P in global memory."""

    source = "ladder/wmma_unfused.cu"
    entries = ("wmma_scores", "wmma_softmax", "wmma_pv")

    def unfit(self) -> list[str]:
        """Whole fragments, two stages."""
        t = self.tile
        reasons = _foreign(t) + self.uncut()
        if t.num_stages != 2 or t.warp_softmax or t.fp8:
            reasons.append("wmma_unfused has num_stages=2 and neither warp_softmax nor fp8")
        return reasons

    @property
    def smem_bytes(self) -> int:
        """The larger of both products' needs: Q and K; or stages of P and V, and O."""
        t, ld, size = self.tile, padded_row(self.head_dim), ITEMSIZE[self.dtype]
        scores = size * (t.block_m + t.block_n) * ld
        stage = size * (t.block_m * padded_row(t.block_n) + t.block_n * ld)
        output = t.num_stages * stage + 4 * t.block_m * ld + 4 * t.block_m
        return round_up(max(scores, output), 128)

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A block per tile of scores, a warp per row, a block per tile of the output."""
        tiles = -(-problem.visible_kv // self.tile.block_n)
        rows = problem.batch * problem.heads_q * problem.seqlen_q
        return blocks * tiles, -(-rows // self.num_warps), blocks

    def _padded(self, problem: AttentionProblem) -> tuple[int, int]:
        """Rows and columns of whole tiles of scores."""
        t = self.tile
        return round_up(problem.seqlen_q, t.block_m), round_up(problem.visible_kv, t.block_n)

    def scratch(self, problem: AttentionProblem) -> Scratch:
        """S, P, and the sums of its rows."""
        heads, (rows, cols) = problem.batch * problem.heads_q, self._padded(problem)
        return {
            "scratch_scores": ((heads, rows, cols), "float32"),
            "scratch_probs": ((heads, rows, cols), problem.dtype),
            "scratch_sum": ((heads, rows), "float32"),
        }

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write where S and P are, and how large."""
        super().bind(params, problem, addresses)
        params["rows_padded"], params["cols_padded"] = self._padded(problem)


class Fused(KernelConfig):
    """FlashAttention on WMMA: Q, K, V, S and P in shared memory."""

    source = "ladder/wmma_fused.cu"
    entries = ("wmma_fused",)

    def unfit(self) -> list[str]:
        """Whole fragments, and either rows that warps own or rows that threads divide evenly."""
        t = self.tile
        reasons = _foreign(t) + self.uncut()
        if t.num_stages not in (1, 2):
            reasons.append(f"num_stages={t.num_stages}; one stage, or two in turn")
        if t.warp_softmax:
            if t.warps_n != 1 or t.block_m != MMA * t.warps_m:
                reasons.append(
                    "warp_softmax: a warp owns 16 whole rows: warps_n=1, block_m=16*warps_m"
                )
            if 2 * t.block_m > 2 * t.num_stages * t.block_n:
                reasons.append(
                    "warp_softmax: O leaves through K and V: block_m <= num_stages * block_n"
                )
        elif self.threads % t.block_m or self.threads // t.block_m not in (1, 2, 4, 8, 16, 32):
            reasons.append(
                f"{self.threads} threads do not divide evenly among block_m={t.block_m} softmax "
                f"rows"
            )
        elif t.block_n % (self.threads // t.block_m):
            reasons.append(f"block_n={t.block_n} is not a multiple of the threads of a softmax row")
        if t.fp8 and not t.warp_softmax:
            reasons.append("fp8 goes with warp_softmax")
        if t.fp8 and t.cp_async:
            reasons.append(
                "fp8 widens on load, so its copies cannot be asynchronous: cp_async=False"
            )
        if t.fp8 != self.quantizes:
            reasons.append("fp8 goes with fp8_wmma, and that with fp8: its inputs are quantised")
        return reasons

    @property
    def smem_bytes(self) -> int:
        """Q and the stages of K and V; S, and P over it; O, unless registers hold it."""
        t, ld, size = self.tile, padded_row(self.head_dim), ITEMSIZE[self.dtype]
        total = size * ld * (t.block_m + 2 * t.num_stages * t.block_n)  # Q, K, V
        total += 4 * t.block_m * padded_row(t.block_n)  # S, and P over it
        if not t.warp_softmax:
            total += 4 * t.block_m * ld  # O
            total += 4 * t.block_m * (self.threads // t.block_m)  # partial maxima and sums
        return round_up(total + 4 * t.block_m, 128)


class Quantized(Fused):
    """The same on e4m3 copies of q, k and v, which another launch makes first."""

    quantizes = True

    def before(self) -> tuple[KernelConfig, ...]:
        """The quantiser for the same arrays."""
        return (
            Quantizer(
                kernel=self.kernel,
                dtype=self.dtype,
                head_dim=self.head_dim,
                head_dim_v=self.head_dim_v,
                dim_qk=self.dim_qk,
                dim_v=self.dim_v,
                tile=_QUANTIZER_TILE,
                align_bytes=self.align_bytes,
            ),
        )

    def scratch(self, problem: AttentionProblem) -> Scratch:
        """The copies, in rows as long as the tile's, and a scale per head."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for operand in (problem.q, problem.k, problem.v):
            batch, heads, seqlen, _ = operand.shape
            found[f"{operand.name}8"] = (batch, heads, seqlen, self.head_dim), "uint8"
            found[f"{operand.name}_scale"] = (batch, heads), "float32"
        return found

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write where the copies are, in place of q, k and v."""
        row = self.head_dim
        for operand in (problem.q, problem.k, problem.v):
            name, (_, heads, seqlen, _) = operand.name, operand.shape
            params[name] = addresses[f"{name}8"]
            params[f"{name}_scale"] = addresses[f"{name}_scale"]
            params[f"{name}_strides"] = (heads * seqlen * row, seqlen * row, row)


class Quantizer(KernelConfig):
    """Rounds q, k and v to e4m3, each head by a scale of its own."""

    source = "ladder/fp8_quantize.cu"
    entries = ("fp8_quantize",)
    params: ClassVar[np.dtype[Any]] = QUANTIZE_PARAMS

    def unfit(self) -> list[str]:
        """Nothing: there is one tile."""
        return []

    @property
    def smem_bytes(self) -> int:
        """The largest value that each warp has found."""
        return 4 * self.num_warps

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A block per head of q, k and v."""
        return (problem.batch * (problem.heads_q + 2 * problem.heads_kv),)

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write what each of the tensors is, and where its copy and scales go."""
        for index, operand in enumerate((problem.q, problem.k, problem.v)):
            name, (batch, heads, seqlen, dim) = operand.name, operand.shape
            tensor = params["tensor"][index]
            tensor["x"], tensor["x8"] = addresses[name], addresses[f"{name}8"]
            tensor["scale"], tensor["strides"] = addresses[f"{name}_scale"], operand.strides
            tensor["heads"], tensor["seqlen"], tensor["dim"] = heads, seqlen, dim
            tensor["visible"] = seqlen if name == "q" else problem.visible_kv
            tensor["blocks"] = batch * heads


#: One block per head.
_QUANTIZER_TILE = Tile(16, 16, warps_m=32)
