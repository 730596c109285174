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
from flashcore_cupy.problem.listed_blocks import BLOCK_SIZES, LISTS, BlockMaskRule
from flashcore_cupy.select.block_lister import BlockLister, scratch_of
from flashcore_cupy.select.config import KernelConfig, Scratch, Tile
from flashcore_cupy.select.params import TILE_LISTS_PARAMS
from flashcore_cupy.select.units import MMA

_RULE = "blocks"
SMALLEST_BLOCK = min(BLOCK_SIZES)
"""Of a mask: what a tile or a warp's rows divide, they divide in every mask."""
_MOST_BLOCKS = 4
"""``MOST_BLOCKS`` in ``listed_tiles.cuh``: of the mask, that a tile touches along either side."""
_TILES = 512
"""``TILES`` in ``tile_lists.cu``."""
_ENTRY_INTS = 2
"""Of an entry, ``ListedTile``."""
_LISTERS_TILE = Tile(MMA, MMA, warps_m=1)


def is_listed(config: KernelConfig) -> bool:
    """Whether a kernel walks over lists of tiles."""
    return _RULE in config.rules


def too_many_blocks(tile: Tile, blocks: tuple[int, int]) -> list[str]:
    """Why an entry of a list does not hold all blocks that a tile touches.

    ``blocks``: the sizes of a block, on block_m's side and on block_n's.
    """
    return [
        f"{name}={size} touches more than {_MOST_BLOCKS} of the block mask's blocks of {block}"
        for name, size, block in (
            ("block_m", tile.block_m, blocks[0]),
            ("block_n", tile.block_n, blocks[1]),
        )
        if _touched(size, block) > _MOST_BLOCKS
    ]


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
        return is_listed(self)

    @property
    def lister(self) -> TileLister:
        """What makes the lists."""
        return TileLister.of_walker(self)

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
        for reason in () if lists is None else too_many_blocks(self.tile, lists.block):
            raise ValueError(f"config: {reason}")

    def told(self) -> list[str]:
        """What ``explain`` says of the lists."""
        return [self.lister.told()] if self.is_listed else []

    def before(self) -> tuple[KernelConfig, ...]:
        """What makes the lists: first those of blocks, unless they are passed."""
        if not self.is_listed:
            return super().before()
        blocks = (BlockLister.ahead_of(self),) if self.tile.own_lists else ()
        return (*super().before(), *blocks, self.lister)

    def scratch(self, problem: AttentionProblem) -> Scratch:
        """The lists of tiles, and how many entries each has; before them those of blocks."""
        found = dict(super().scratch(problem))
        if self.tile.own_lists:
            found |= scratch_of(problem)
        return {**found, **(self.lister.lists(problem) if self.is_listed else {})}

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write how the lists of tiles lie; those of blocks are no business of the kernel."""
        known = params.dtype.fields or {}
        for name in self.scratch(problem):
            if name in known:
                params[name] = addresses[name]
        if self.is_listed:
            self.lister.write(params, problem, addresses)


def _touched(size: int, block: int) -> int:
    """Blocks that so many neighbouring rows touch, wherever a multiple of the size begins."""
    return (
        size // block if size % block == 0 else 1 if block % size == 0 else (size - 2) // block + 2
    )


@dataclass(frozen=True)
class TileLister(KernelConfig):
    """Makes lists of tiles from a block mask's lists; a warp for each block of rows, or of keys."""

    source = "tile_lists.cu"
    entries = ("tile_lists",)
    params: ClassVar[np.dtype[Any]] = TILE_LISTS_PARAMS

    listed: Tile = _LISTERS_TILE
    """Of the kernel that walks over the lists: block_m are its own rows, and block_n those of the
    other side that it takes at a time."""
    owns_keys: bool = False
    """Its own rows are keys."""
    name: str = "tile"
    """What the arrays of its lists begin with."""

    @classmethod
    def of_walker(
        cls, config: KernelConfig, *, owns_keys: bool = False, name: str = "tile"
    ) -> TileLister:
        """What makes the lists that a kernel walks over."""
        return cls(
            kernel=config.kernel, dtype="float16", head_dim=MMA, head_dim_v=MMA, dim_qk=MMA,
            dim_v=MMA, tile=_LISTERS_TILE, bounded_right=config.bounded_right,
            bounded_left=config.bounded_left, listed=config.tile, owns_keys=owns_keys, name=name,
        )  # fmt: skip

    def told(self) -> str:
        """What ``explain`` says of the lists."""
        queries, keys = self._sizes
        of = "mask_mod: asked ahead, block by block;" if self.listed.own_lists else "block mask:"
        return (
            f"{of} a launch ahead lists tiles of {queries} queries and {keys} keys; "
            f"no others are loaded, and rules that hide keys are asked in mixed ones alone"
        )

    def lists(self, problem: AttentionProblem) -> Scratch:
        """The arrays of the lists of tiles, and of how many entries each has."""
        shape = self._shape(problem)
        return {
            f"{self.name}_entries": ((*shape, _ENTRY_INTS), "int32"),
            f"{self.name}_counts": (shape[:-1], "int32"),
        }

    def write(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write where the lists of tiles are and how they lie, for who makes or reads them."""
        shape = self._shape(problem)
        params["tile_entries"] = addresses[f"{self.name}_entries"]
        params["tile_counts"] = addresses[f"{self.name}_counts"]
        params["tile_rows"], params["tile_keys"] = self._sizes
        params["m_blocks"], params["tile_capacity"] = shape[2:]

    @property
    def _sizes(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        own, other = self.listed.block_m, self.listed.block_n
        return (other, own) if self.owns_keys else (own, other)

    def _shape(self, problem: AttentionProblem) -> tuple[int, int, int, int]:
        """Batches, heads and blocks of own rows that have a list each, and its entries at most.

        These are all tiles, or those of all blocks that the mask's lists have room for.
        """
        lists = problem.rules.block_mask
        assert lists is not None
        t, (queries, keys) = self.listed, lists.block
        if self.owns_keys:
            own_blocks = -(-problem.seqlen_kv // t.block_m)
            return lists.batches, lists.heads, own_blocks, max(1, -(-problem.seqlen_q // t.block_n))
        tiles = -(-problem.visible_kv // t.block_n)
        listed = sum(lists.capacity) * _touched(t.block_m, queries) * _touched(keys, t.block_n)
        m_blocks = -(-problem.seqlen_q // t.block_m)
        return lists.batches, lists.heads, m_blocks, max(1, min(tiles, listed))

    def own_defines(self) -> dict[str, int]:
        """Whose lists these are."""
        return {"FC_OWNS_KEYS": int(self.owns_keys)}

    def unfit(self) -> list[str]:
        """Nothing: there is one tile."""
        return []

    @property
    def smem_bytes(self) -> int:
        """The states of the blocks that some tiles touch."""
        return _TILES * _MOST_BLOCKS**2

    def grids(self, problem: AttentionProblem, blocks: int) -> tuple[int, ...]:
        """A warp for each list."""
        return (math.prod(self._shape(problem)[:-1]),)

    def bind(
        self, params: np.ndarray[Any, Any], problem: AttentionProblem, addresses: Mapping[str, int]
    ) -> None:
        """Write where the mask's lists are, and where those of tiles go."""
        lists = problem.rules.block_mask
        assert lists is not None
        self.write(params, problem, addresses)
        for name, value in BlockMaskRule().params(lists).items():
            params[name] = value
        left, right = problem.window
        params["window_left"], params["window_right"] = max(left, 0), max(right, 0)
        params["causal_offset"] = problem.causal_offset
        params["seqlen_q"], params["heads_q"] = problem.seqlen_q, problem.heads_q
        params["seqlen_kv"] = problem.seqlen_kv if self.owns_keys else problem.visible_kv
        for n, name in enumerate(LISTS):
            if lists.strides[n]:
                kind = "counts" if n % 2 == 0 else "indices"
                params[kind][n // 2] = addresses[name]
                params[f"{kind}_strides"][n // 2] = lists.strides[n]
        params["capacity"] = lists.capacity
