"""The family of ``bwd_sm80.cu``: the backward pass on mma.sync and ldmatrix, from sm_80 on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from flashcore_cupy.cuda.targets import capability
from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.problem.gradients import BackwardProblem
from flashcore_cupy.problem.mod_elements import MOD_ARGS, mod_args_among
from flashcore_cupy.problem.mods import Mods
from flashcore_cupy.select.config import KernelConfig, Tile
from flashcore_cupy.select.params import BACKWARD_PARAMS, MOD_ARGS_PARAMS
from flashcore_cupy.select.plan import Params
from flashcore_cupy.select.tile_lists import (
    SMALLEST_BLOCK,
    TileLister,
    is_listed,
    too_many_blocks,
)
from flashcore_cupy.select.units import round_up

_WORK_BYTES = 48
"""``Work`` in ``work.cuh``, and 4 bytes that align what is behind it."""
# Columns of dK and of dV, and of dQ, that a warp's registers hold: of 16-bit types, and of float32,
# whose operands are split in two. Wider heads have blocks of columns.
_MOST_DKV, _MOST_DQ = {2: 192, 4: 64}, {2: 256, 4: 128}
_BLOCK = {2: 128, 4: 64}


class _PerQuery(KernelConfig):
    """Of kernels that look at no scores, so that rules make no difference to them."""

    params = BACKWARD_PARAMS
    takes_packed = True

    @classmethod
    def of(
        cls, kernel: str, dims: tuple[int, int], tile: Tile, problem: AttentionProblem
    ) -> KernelConfig:
        """The same for all rules."""
        config = super().of(kernel, dims, tile, problem)
        return replace(config, bounded_right=False, bounded_left=False, mods=None, align_bytes=16)

    def unfit(self) -> list[str]:
        """Any tile."""
        return []


class BackwardRows(_PerQuery):
    """What the other kernels need of each query: D and the LSE in log2 units."""

    source = "bwd_rows.cu"
    entries = ("bwd_rows",)

    @property
    def smem_bytes(self) -> int:
        """None."""
        return 0

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """As many lanes per query, of all heads and batches, as its row has pieces."""
        batches = 1 if problem.packed else problem.batch
        pieces = -(-problem.head_dim_v * ITEMSIZE[self.dtype] // self.align_bytes)
        lanes = min(32, 1 << (pieces - 1).bit_length())
        return (-(-batches * problem.heads_q * problem.seqlen_q * lanes // self.threads),)


@dataclass(frozen=True)
class BackwardScale(_PerQuery):
    """dq from the sums that blocks of keys have added to."""

    source = "bwd_scale.cu"
    entries = ("bwd_scale",)

    columns: int = 0
    """Of a unit of the sums, which has 64 rows."""
    is_fp32: bool = False
    accumulates: bool = False

    @property
    def smem_bytes(self) -> int:
        """None."""
        return 0

    def own_defines(self) -> dict[str, int]:
        """How the sums lie, and how dq is stored."""
        return {
            "FC_GRADIENT_COLS": self.columns,
            "FC_FP32_GRADIENTS": int(self.is_fp32),
            "FC_ACCUMULATES": int(self.accumulates),
        }

    def tiles(self, problem: AttentionProblem) -> int:
        """Of queries, of all heads and batches; as ``PackedBatch`` has room for them."""
        rows, block = problem.seqlen_q, self.tile.block_n
        if problem.packed:
            return problem.heads_q * (rows // block + problem.batch + 2)
        return problem.batch * problem.heads_q * -(-rows // block)

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A thread block per unit."""
        units = self.tile.block_n // 64 * (self.head_dim // self.columns)
        return (self.tiles(problem) * units,)


@dataclass(frozen=True)
class Sm80Backward(KernelConfig):
    """dK and dV of blocks of keys, or dQ of blocks of queries."""

    source = "bwd_sm80.cu"
    entries = ("bwd_sm80",)
    params = BACKWARD_PARAMS
    has_rules = True
    takes_packed = True
    idea: ClassVar[str] = "mma.sync: keys walk over queries for dK and dV, queries over keys for dQ"
    """A sentence for the ladder."""
    takes_blocks: ClassVar[bool] = True
    """Walks over the lists of a block mask."""
    of_keys: ClassVar[tuple[str, ...]] = ("dk", "dv")
    """Which gradients need the pass over blocks of keys; with dq among them there is no other."""

    owns_keys: bool = False
    """Whose gradients a thread block computes, in a tile of block_m of its own rows by block_n of
    the other side's."""
    fp32: tuple[str, ...] = ()
    """Gradients that are stored in float32 although the inputs are not."""
    accumulates: bool = False
    """They are added to what is there, in float32."""
    sums_distances: bool = False
    """Rows of queries sum up what the gradient of ALiBi's slopes needs."""
    elements: tuple[tuple[str, str], ...] = ()
    """Of mod_args, by the array's name and an index: what queries sum up for their gradients."""
    adds_dq: bool = False
    """A thread block that owns keys adds to dq, too."""
    ordered: bool = False
    """Thread blocks add to dq by turns, so that it has the same bits each time."""
    score_mod_grad: str | None = None
    """The user's derivative of score_mod; by default it is found by dual numbers."""

    @property
    def sums(self) -> int:
        """Numbers per row of queries that are summed up for kernels behind."""
        return self.sums_distances + len(self.elements)

    @classmethod
    def why_not(cls, problem: BackwardProblem, arch: str) -> str | None:
        """Why the kernel cannot do a problem on a target; None if it can."""
        if capability(arch) < 80:
            return f"needs cp.async, hence sm_80 or later; the target is {arch}"
        return None

    @classmethod
    def dq_columns(cls, head_dim: int, tile: Tile) -> int:
        """Columns of the units in which blocks of keys add to dq; 0 if they cannot."""
        return 0

    def unfit(self) -> list[str]:
        """Whole fragments for each warp."""
        t = self.tile
        reasons = self.uncut()
        if t.warps_n > 1 or t.warps_d > 1 or t.pack_gqa or t.split_kv or t.cluster > 1:
            reasons.append("bwd_sm80 has warps_m alone, each with all columns of its rows")
        if not t.cp_async or t.warp_softmax or t.fp8:
            reasons.append("bwd_sm80 has cp_async and neither warp_softmax nor fp8")
        if ITEMSIZE[self.dtype] == 4 and t.block_n > 64:
            reasons.append(f"block_n={t.block_n}: a warp takes at most 64 rows of float32")
        return reasons + self.unlisted()

    def unlisted(self) -> list[str]:
        """Why a tile's warps would meet several blocks of a mask in a tile of the other side."""
        t = self.tile
        if not is_listed(self):
            return []
        reasons = too_many_blocks(t, (SMALLEST_BLOCK, SMALLEST_BLOCK))
        if SMALLEST_BLOCK % t.block_n or SMALLEST_BLOCK % (t.block_m // t.warps_m):
            reasons.append(
                f"block_m={t.block_m}, warps_m={t.warps_m}, block_n={t.block_n}: with a block mask "
                f"block_n and a warp's own rows are 16, 32 or 64"
            )
        return reasons

    @property
    def lister(self) -> TileLister | None:
        """What makes the lists of tiles that it walks over; None without a block mask."""
        if not is_listed(self):
            return None
        name = "keys_tile" if self.owns_keys else "queries_tile"
        return TileLister.of_walker(self, owns_keys=self.owns_keys, name=name)

    def bind(self, params: Params, problem: AttentionProblem, addresses: Mapping[str, int]) -> None:
        """Write where its lists are."""
        if self.lister is not None:
            self.lister.write(params, problem, addresses)

    @property
    def gradient_cols(self) -> int:
        """Columns of the gradients that a thread block has: all of them, or a block of them."""
        size = ITEMSIZE[self.dtype]
        most = (_MOST_DKV if self.owns_keys else _MOST_DQ)[size]
        return self._columns if self._columns <= most else _BLOCK[size]

    @property
    def _columns(self) -> int:
        return max(self.head_dim, self.head_dim_v) if self.owns_keys else self.head_dim

    def _row_bytes(self, columns: int) -> int:
        """A shared row: swizzled, or padded; see ``shared_layout.cuh``."""
        swizzled = ITEMSIZE[self.dtype] == 2 and columns % 32 == 0
        return columns * ITEMSIZE[self.dtype] + (0 if swizzled else 16)

    @property
    def smem_bytes(self) -> int:
        """A block's own rows, and the stages of the other side's with their statistics."""
        t = self.tile
        row = self._row_bytes(self.head_dim) + self._row_bytes(self.head_dim_v)
        total = t.block_m * row + t.num_stages * t.block_n * (row + 8)
        return round_up(total + t.num_stages * 16 + _WORK_BYTES, 128)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The user's score_mod gives its derivative, too."""
        if self.mods is None:
            return ()
        return (
            (
                "flashcore/rules/mods.cuh",
                self.mods.header(self.score_mod_grad, differentiated=True, by=self.elements),
            ),
        )

    def own_defines(self) -> dict[str, int]:
        """Whose gradients a thread block has, how many columns of them, and how it stores them."""
        bits = {"dq": 1, "dk": 1, "dv": 2}
        own = ("dk", "dv") if self.owns_keys else ("dq",)
        return {
            "FC_OWNS_KEYS": int(self.owns_keys),
            "FC_GRADIENT_COLS": self.gradient_cols,
            "FC_FP32_GRADIENTS": sum(bits[name] for name in own if name in self.fp32),
            "FC_ACCUMULATES": int(self.accumulates),
            "FC_SUMS_DISTANCES": int(self.sums_distances),
            "FC_ADDS_DQ": int(self.adds_dq),
            "FC_ORDERED": int(self.ordered),
        }

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A thread block per block of keys or of queries, and block of columns."""
        batches = 1 if problem.packed else problem.batch
        heads = batches * (problem.heads_kv if self.owns_keys else problem.heads_q)
        columns = -(-self._columns // self.gradient_cols)
        return (heads * self.own_blocks(problem) * columns,)

    def own_blocks(self, problem: AttentionProblem) -> int:
        """Blocks of keys or of queries per head."""
        block = self.tile.block_m
        rows = problem.seqlen_kv if self.owns_keys else problem.seqlen_q
        return rows // block + problem.batch + 2 if problem.packed else -(-rows // block)


@dataclass(frozen=True)
class Sm80BackwardBias(Sm80Backward):
    """The gradient of the bias, summed over what it is broadcast along."""

    bias_shape: tuple[int, int, int, int] = (1, 1, 1, 1)

    source = "bwd_sm80_bias.cu"
    entries = ("bwd_sm80_bias",)

    def unfit(self) -> list[str]:
        """One stage."""
        one = ["bwd_sm80_bias has one stage"] * (self.tile.num_stages != 1)
        return super().unfit() + one

    @property
    def lister(self) -> TileLister | None:
        """Its tiles need not be those of the pass over queries."""
        return TileLister.of_walker(self, name="bias_tile") if is_listed(self) else None

    def own_defines(self) -> dict[str, int]:
        """In which dtype the gradient is stored."""
        return super().own_defines() | {"FC_FP32_GRADIENTS": 4 * ("dbias" in self.fp32)}

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A thread block per block of the bias."""
        batches, heads, rows, columns = self.bias_shape
        own = -(-rows // self.tile.block_m), -(-columns // self.tile.block_n)
        return (math.prod((batches, heads, *own)),)


@dataclass(frozen=True)
class BackwardHeads(_PerQuery):
    """The gradients of sinks and of ALiBi's slopes, a thread block per head."""

    source = "bwd_heads.cu"
    entries = ("bwd_heads",)

    accumulates: bool = False
    """They are added to what is there."""

    @property
    def smem_bytes(self) -> int:
        """A sum of each warp."""
        return 4 * self.num_warps

    def own_defines(self) -> dict[str, int]:
        """Whether the gradients are added to what is there."""
        return {"FC_ACCUMULATES": int(self.accumulates)}

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A thread block per query head."""
        return (problem.heads_q,)


@dataclass(frozen=True)
class BackwardModArgs(_PerQuery):
    """The gradient of an array of mod_args, a thread block per element."""

    source = "bwd_mod_args.cu"
    entries = ("bwd_mod_args",)
    params = MOD_ARGS_PARAMS

    array: str = ""
    """Its name."""
    size: int = 0
    """Its elements."""
    elements: tuple[tuple[str, str], ...] = ()
    """Those that score_mod reads, as ``Sm80Backward`` has them."""
    first_sum: int = 0
    """Where their sums begin among all that queries have summed up."""
    accumulates: bool = False
    """It is added to what is there."""

    @classmethod
    def of_each(
        cls, kernel: str, dims: tuple[int, int], tile: Tile, problem: BackwardProblem
    ) -> tuple[BackwardModArgs, ...]:
        """One for each array whose gradient is asked for; ``tile``: of the pass over queries."""
        attention, found = problem.attention, list[BackwardModArgs]()
        mods = attention.rules.mods
        if mods is None:
            return ()
        first_sum = int(any(result.of == "alibi_slopes" for result in problem.results))
        for result in problem.results:
            for array in mod_args_among([result.of]):
                config = replace(
                    cast(BackwardModArgs, cls.of(kernel, dims, tile, attention)),
                    dtype=result.dtype,
                    mods=mods,
                    array=array,
                    size=math.prod(result.shape),
                    elements=mods.elements([array]),
                    first_sum=first_sum,
                    accumulates=problem.accumulate,
                )
                first_sum += len(config.elements)
                found.append(config)
        return tuple(found)

    @property
    def smem_bytes(self) -> int:
        """A sum of each warp."""
        return 4 * self.num_warps

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The elements' indices."""
        mods = cast(Mods, self.mods)
        return (("flashcore/rules/mods.cuh", mods.header(by=self.elements)),)

    def own_defines(self) -> dict[str, int]:
        """Whether the gradient is added to what is there."""
        return {"FC_ACCUMULATES": int(self.accumulates)}

    def bind(self, params: Params, problem: AttentionProblem, addresses: Mapping[str, int]) -> None:
        """Write where the gradient is, and which sums are its elements'."""
        params["mod_gradient"] = addresses[f"d{MOD_ARGS}{self.array}"]
        params["first_sum"] = self.first_sum

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A thread block per element."""
        return (self.size,)
