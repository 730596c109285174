"""Block masks: kernels that walk over lists of their own tiles, and what makes these lists.

The lists are made anew in each call, by a launch ahead of the kernel's: the mask's lists may have
changed, and only the device knows them. What a list holds says ``rules/listed_tiles.cuh``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flashcore_cupy.problem.attention_problem import AttentionProblem
from flashcore_cupy.problem.listed_blocks import LISTS, BlockMaskRule
from flashcore_cupy.select.block_lister import BlockLister, scratch_of
from flashcore_cupy.select.config import KernelConfig, Scratch, Tile
from flashcore_cupy.select.params import TILE_LISTS_PARAMS
from flashcore_cupy.select.units import MMA

_RULE = "blocks"
_MOST_BLOCKS = 4
"""``MOST_BLOCKS`` in ``listed_tiles.cuh``: of the mask, that a tile touches along either side."""
_TILES = 512
"""``TILES`` in ``tile_lists.cu``."""
_ENTRY_INTS = 2
"""Of an entry, ``ListedTile``."""
_LISTERS_TILE = Tile(MMA, MMA, warps_m=1)


class TakesLists(KernelConfig):
    """A family whose kernels may walk over lists of tiles."""

    takes_blocks: ClassVar[bool] = True
    own_switches: ClassVar[tuple[str, ...]] = ("own_lists",)

    @classmethod
    def tile_for(cls, tile: Tile, problem: AttentionProblem) -> Tile:
        """Of a block mask's problem: as many keys as divide a block: so few tiles are mixed."""
        lists = problem.rules.block_mask
        if lists is None:
            return tile
        keys = next(n for n in (128, 64, 32, MMA) if n <= tile.block_n and lists.block[1] % n == 0)
        return replace(tile, block_n=keys, own_lists=lists.made)

    @property
    def is_listed(self) -> bool:
        """Whether it walks over lists of tiles."""
        return _RULE in self.rules

    def unlisted(self, *switches: str) -> list[str]:
        """Why a tile cannot be in lists: it has one of these switches on."""
        if not self.is_listed:
            return []
        return [
            f"a block mask goes without {name}" for name in switches if getattr(self.tile, name)
        ]

    def check_heads(self, problem: AttentionProblem) -> None:
        """Raise ``ValueError`` if the tile touches more blocks of a mask than an entry holds."""
        super().check_heads(problem)
        lists = problem.rules.block_mask
        if self.tile.own_lists != (lists is not None and lists.made):
            raise ValueError("config: own_lists is chosen for a call, not for a tile")
        if lists is None:
            return
        sides = (("block_m", lists.block[0]), ("block_n", lists.block[1]))
        for name, block in sides:
            size = getattr(self.tile, name)
            if _touched(size, block) > _MOST_BLOCKS:
                raise ValueError(
                    f"config: {name}={size} touches more than {_MOST_BLOCKS} of the block mask's "
                    f"blocks of {block}"
                )

    def told(self) -> list[str]:
        """What ``explain`` says of the lists."""
        if not self.is_listed:
            return []
        t = self.tile
        ahead = "mask_mod: asked ahead, block by block; " if t.own_lists else "block mask: "
        return [
            f"{ahead}a launch ahead lists tiles of {t.block_m} queries and {t.block_n} keys; "
            f"no others are loaded, and rules that hide keys are asked in mixed ones alone"
        ]

    def before(self) -> tuple[KernelConfig, ...]:
        """What makes the lists: first those of blocks, unless they are passed."""
        if not self.is_listed:
            return super().before()
        blocks = (BlockLister.ahead_of(self),) if self.tile.own_lists else ()
        lister = TileLister(
            kernel=self.kernel, dtype="float16", head_dim=MMA, head_dim_v=MMA, dim_qk=MMA,
            dim_v=MMA, tile=_LISTERS_TILE, bounded_right=self.bounded_right,
            bounded_left=self.bounded_left, listed=self.tile,
        )  # fmt: skip
        return (*super().before(), *blocks, lister)

    def scratch(self, problem: AttentionProblem) -> Scratch:
        """The lists of tiles, and how many entries each has; before them those of blocks."""
        found = dict(super().scratch(problem))
        if self.tile.own_lists:
            found |= scratch_of(problem)
        if self.is_listed:
            shape = _lists_of(problem, self.tile)
            found["tile_entries"] = (*shape, _ENTRY_INTS), "int32"
            found["tile_counts"] = shape[:-1], "int32"
        return found

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write how the lists of tiles lie; those of blocks are no business of the kernel."""
        known = params.dtype.fields or {}
        for name in self.scratch(problem):
            if name in known:
                params[name] = addresses[name]
        if self.is_listed:
            _describe_tiles(params, problem, self.tile)


def _touched(size: int, block: int) -> int:
    """Blocks that so many neighbouring rows touch, wherever a multiple of the size begins."""
    return (
        size // block if size % block == 0 else 1 if block % size == 0 else (size - 2) // block + 2
    )


@dataclass(frozen=True)
class TileLister(KernelConfig):
    """Makes lists of tiles from a block mask's lists; a warp for each block of rows."""

    source = "tile_lists.cu"
    entries = ("tile_lists",)
    params: ClassVar[np.dtype[Any]] = TILE_LISTS_PARAMS

    listed: Tile = _LISTERS_TILE
    """Of the kernel that walks over the lists."""

    def unfit(self) -> list[str]:
        """Nothing: there is one tile."""
        return []

    @property
    def smem_bytes(self) -> int:
        """The states of the blocks that some tiles touch."""
        return _TILES * _MOST_BLOCKS**2

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A warp for each list."""
        return (math.prod(_lists_of(problem, self.listed)[:-1]),)

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write where the mask's lists are, and where those of tiles go."""
        lists = problem.rules.block_mask
        assert lists is not None
        _describe_tiles(params, problem, self.listed)
        for name in ("tile_entries", "tile_counts"):
            params[name] = addresses[name]
        for name, value in BlockMaskRule().params(lists).items():
            params[name] = value
        left, right = problem.window
        params["window_left"], params["window_right"] = max(left, 0), max(right, 0)
        params["causal_offset"] = problem.causal_offset
        params["seqlen_q"], params["seqlen_kv"] = problem.seqlen_q, problem.visible_kv
        params["heads_q"], params["m_blocks"] = problem.heads_q, _lists_of(problem, self.listed)[2]
        for n, name in enumerate(LISTS):
            if lists.strides[n]:
                kind = "counts" if n % 2 == 0 else "indices"
                params[kind][n // 2] = addresses[name]
                params[f"{kind}_strides"][n // 2] = lists.strides[n]
        params["capacity"] = lists.capacity


def _lists_of(problem: AttentionProblem, tile: Tile) -> tuple[int, int, int, int]:
    """Batches, heads and blocks of rows that have a list of tiles each, and its entries at most.

    These are all tiles, or those of all blocks that the mask's list has room for.
    """
    lists = problem.rules.block_mask
    assert lists is not None
    rows, keys = lists.block
    tiles = -(-problem.visible_kv // tile.block_n)
    listed = sum(lists.capacity) * _touched(tile.block_m, rows) * _touched(keys, tile.block_n)
    m_blocks = -(-problem.seqlen_q // tile.block_m)
    return lists.batches, lists.heads, m_blocks, max(1, min(tiles, listed))


def _describe_tiles(params: np.ndarray[Any, Any], problem: AttentionProblem, tile: Tile) -> None:
    params["tile_rows"], params["tile_keys"] = tile.block_m, tile.block_n
    params["tile_capacity"] = _lists_of(problem, tile)[-1]
