"""What makes a block mask from a rule: the kernel ``block_mask.cu``, its arrays and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.listed_blocks import LISTS, blocks_of
from flashcore_cupy.problem.mods import Mods
from flashcore_cupy.problem.rule import Broadcast
from flashcore_cupy.select.config import KernelConfig, Tile
from flashcore_cupy.select.params import BLOCK_MASK_PARAMS
from flashcore_cupy.select.plan import Launch
from flashcore_cupy.select.units import MMA

_BLOCKS = 1024
"""``BLOCKS`` in ``block_mask.cu``."""


class Asked(NamedTuple):
    """A block mask that is to be made."""

    scores: ScoreShape
    """Batch and heads: those that lists differ by."""
    block: tuple[int, int]
    mods: Mods | None
    mask: Broadcast | None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of counts and of indices."""
        rows = blocks_of(self.scores.seqlen_q, self.block[0])
        counts = (self.scores.batch, self.scores.heads, rows)
        return counts, (*counts, blocks_of(self.scores.seqlen_kv, self.block[1]))


@dataclass(frozen=True)
class BlockLister(KernelConfig):
    """Asks the rule for each score, and lists the blocks."""

    source = "block_mask.cu"
    entries = ("block_mask",)
    params: ClassVar[np.dtype[Any]] = BLOCK_MASK_PARAMS

    @classmethod
    def asked(cls, asked: Asked) -> BlockLister:
        """The kernel that makes a block mask."""
        rules = ("mask",) * (asked.mask is not None)
        if asked.mods is not None and asked.mods.mask_mod is not None:
            rules += ("mask_mod",)
        return cls(
            kernel="block_mask", dtype="float16", head_dim=MMA, head_dim_v=MMA, dim_qk=MMA,
            dim_v=MMA, tile=Tile(MMA, MMA, warps_m=8), rules=rules, mods=asked.mods,
        )  # fmt: skip

    def unfit(self) -> list[str]:
        """Nothing: there is one tile."""
        return []

    @property
    def smem_bytes(self) -> int:
        """The states of some blocks."""
        return _BLOCKS

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A thread block for each row of blocks."""
        return (blocks,)


def empty_lists(asked: Asked, empty: Callable[..., Any]) -> dict[str, Any]:
    """The arrays that are written, by their names in ``LISTS``."""
    shapes = asked.shapes
    return {name: empty(shapes[n % 2], np.dtype(np.int32)) for n, name in enumerate(LISTS)}


def launch_of(asked: Asked, addresses: Mapping[str, int], mod_args: Sequence[int]) -> Launch | None:
    """The launch; None if there is no block. ``addresses``: of the lists, and of "mask"."""
    config, scores = BlockLister.asked(asked), asked.scores
    params = np.zeros((), config.params)
    params["batch"], params["seqlen_q"], params["seqlen_kv"] = (
        scores.batch, scores.seqlen_q, scores.seqlen_kv,
    )  # fmt: skip
    params["list_batches"], params["list_heads"] = scores.batch, scores.heads
    params["list_shift_q"], params["list_shift_kv"] = (n.bit_length() - 1 for n in asked.block)
    counts, indices = asked.shapes
    params["q_blocks"], params["kv_blocks"] = indices[-2:]
    for n, name in enumerate(LISTS):
        params["counts" if n % 2 == 0 else "indices"][n // 2] = addresses[name]
    if asked.mask is not None:
        params["mask"], params["mask_strides"] = addresses["mask"], asked.mask.strides
    for n, address in enumerate(mod_args):
        params["mod_args"][n] = address
    grid = math.prod(counts)
    return Launch(0, config, config.entries[0], grid, params) if grid else None
