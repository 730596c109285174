"""What makes lists of blocks from a rule: the kernel ``block_mask.cu`` and its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.listed_blocks import LISTS, blocks_of
from flashcore_cupy.problem.mods import Mods
from flashcore_cupy.problem.rule import Broadcast
from flashcore_cupy.select.config import KernelConfig, Scratch, Tile
from flashcore_cupy.select.params import BLOCK_MASK_PARAMS
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

    @classmethod
    def by(cls, problem: AttentionProblem) -> Asked:
        """The lists that a problem's own call makes."""
        rules, lists = problem.rules, problem.rules.block_mask
        assert lists is not None
        scores = ScoreShape(lists.batches, lists.heads, problem.seqlen_q, problem.visible_kv)
        return cls(scores, lists.block, rules.mods, rules.mask)

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
    def asked(cls, mods: Mods | None, *, mask: bool) -> BlockLister:
        """The kernel that asks a mask_mod, if there is one, and a mask, if there is one."""
        rules = ("mask",) * mask
        if mods is not None and mods.mask_mod is not None:
            rules += ("mask_mod",)
            mods = replace(mods, score_mod=None)  # nobody asks for scores
        return cls(
            kernel="block_mask", dtype="float16", head_dim=MMA, head_dim_v=MMA, dim_qk=MMA,
            dim_v=MMA, tile=Tile(MMA, MMA, warps_m=8), rules=rules,
            mods=mods if "mask_mod" in rules else None,
        )  # fmt: skip

    @classmethod
    def ahead_of(cls, config: KernelConfig) -> BlockLister:
        """The kernel that asks the rules of another one."""
        return cls.asked(config.mods, mask="mask" in config.rules)

    def unfit(self) -> list[str]:
        """Nothing: there is one tile."""
        return []

    @property
    def smem_bytes(self) -> int:
        """The states of some blocks."""
        return _BLOCKS

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A thread block for each row of blocks."""
        return (math.prod(Asked.by(problem).shapes[0]),)

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write what is asked, and where the lists go."""
        write(params, Asked.by(problem), addresses)


def scratch_of(problem: AttentionProblem) -> Scratch:
    """The arrays that are written, of a problem whose own call makes the lists."""
    shapes = Asked.by(problem).shapes
    return {name: (shapes[n % 2], "int32") for n, name in enumerate(LISTS)}


def write(params: np.ndarray[Any, Any], asked: Asked, addresses: Mapping[str, int]) -> None:
    """Write what is asked, and where the arrays are; ``addresses``: also "mask", "mod_args[0]"."""
    scores = asked.scores
    params["batch"], params["seqlen_q"], params["seqlen_kv"] = (
        scores.batch, scores.seqlen_q, scores.seqlen_kv,
    )  # fmt: skip
    params["list_batches"], params["list_heads"] = scores.batch, scores.heads
    params["list_shift_q"], params["list_shift_kv"] = (n.bit_length() - 1 for n in asked.block)
    params["q_blocks"], params["kv_blocks"] = asked.shapes[1][-2:]
    for n, name in enumerate(LISTS):
        params["counts" if n % 2 == 0 else "indices"][n // 2] = addresses[name]
    if asked.mask is not None:
        params["mask"], params["mask_strides"] = addresses["mask"], asked.mask.strides
    if asked.mods is not None:
        for n in range(len(asked.mods.args)):
            params["mod_args"][n] = addresses[f"mod_args[{n}]"]
