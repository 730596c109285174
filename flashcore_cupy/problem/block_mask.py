"""Block masks, as users make them: which blocks of scores are empty, mixed or full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcore_cupy.problem import block_lists, interop
from flashcore_cupy.problem.attention_problem import MAX_SEQLEN
from flashcore_cupy.problem.block_lists import InKernel
from flashcore_cupy.problem.listed_blocks import (
    BLOCK_SIZES,
    LISTS,
    MIXED,
    Lists,
    blocks_of,
    state_grid,
)
from flashcore_cupy.problem.rule_arrays import rule_array
from flashcore_cupy.problem.values import shown

_PICTURE = 48  # letters and lines at most
_LETTERS = " ▒█"  # of an empty, a mixed and a full block


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of scores ``attention`` computes, and in which of them it asks a rule.

    For each block of queries a count and a list of key blocks: of mixed ones, in which ``mask_mod``
    or ``mask`` is asked, and of full ones, in which nothing is. All others are empty. The lists are
    read on the device at each call, so they may change in place. Indices and counts out of range
    are left out; a block in both lists is full.

    ``flashcore_cupy.block_mask`` makes one from a rule, and ``from_lists``, ``from_grid``,
    ``from_csr``, ``from_intervals`` and ``from_flex`` from what other libraries have.
    """

    arrays: Mapping[str, Any]
    """kv_num_blocks and full_kv_num_blocks (B or 1, heads or 1, Qb), kv_indices and full_kv_indices
    (B or 1, heads or 1, Qb, capacity), int32; those of mixed or of full blocks may be missing."""
    seqlens: tuple[int, int]
    """(Sq, Skv)."""
    block: tuple[int, int] = (128, 128)
    """Queries and keys of a block: 64 or 128."""
    mask_mod: Any = None
    """The rule of mixed blocks, as ``attention`` takes it; it need not be passed again."""
    mask: Any = None
    mod_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check all but the rule, and give each list all of its axes."""
        block, (seqlen_q, seqlen_kv) = checked_block(self.block), _two("seqlens", self.seqlens)
        lengths = checked_length("seqlen_q", seqlen_q), checked_length("seqlen_kv", seqlen_kv)
        arrays = block_lists.checked(self.arrays, blocks_of(lengths[0], block[0]))
        if self.mod_args is not None and not isinstance(self.mod_args, Mapping):
            raise TypeError(f"mod_args: got {shown(self.mod_args)}; use a dict of names and arrays")
        for name, value in (("arrays", arrays), ("seqlens", lengths), ("block", block)):
            object.__setattr__(self, name, value)  # the class is frozen

    # --- made from ------------------------------------------------------------------------------

    @classmethod
    def from_lists(
        cls,
        kv_num_blocks: Any = None,
        kv_indices: Any = None,
        full_kv_num_blocks: Any = None,
        full_kv_indices: Any = None,
        *,
        seqlen_q: int,
        seqlen_kv: int,
        block: tuple[int, int] = (128, 128),
        mask_mod: Any = None,
        mask: Any = None,
        mod_args: Mapping[str, Any] | None = None,
    ) -> BlockMask:
        """Take counts (B or 1, heads or 1, Qb) and indices (..., Qb, capacity), int32.

        Axes in front may be missing. The first two are of mixed blocks, which need a rule here or
        beside the call; the others are of full ones. No array is copied.
        """
        lists = (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices)
        arrays = {name: x for name, x in zip(LISTS, lists, strict=True) if x is not None}
        return cls(arrays, (seqlen_q, seqlen_kv), block, mask_mod, mask, mod_args)

    @classmethod
    def from_grid(
        cls, grid: Any, *, seqlen_q: int, seqlen_kv: int, block: tuple[int, int] = (128, 128)
    ) -> BlockMask:
        """Take a grid of blocks, (..., Qb, Kb) bool: True where a block is full, else empty."""
        wanted = _blocks(seqlen_q, seqlen_kv, block)
        lists = block_lists.of_grid(grid, wanted)
        return cls.from_lists(
            None, None, *lists, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, block=block
        )

    @classmethod
    def from_csr(
        cls,
        indptr: Any,
        indices: Any,
        *,
        seqlen_q: int,
        seqlen_kv: int,
        block: tuple[int, int] = (128, 128),
    ) -> BlockMask:
        """Take full blocks as rows of a sparse matrix: indptr (..., Qb + 1), indices (nnz,), int32.

        Row i of a head has the key blocks indices[indptr[i]:indptr[i + 1]].
        """
        wanted = _blocks(seqlen_q, seqlen_kv, block)
        lists = block_lists.of_csr(indptr, indices, wanted)
        return cls.from_lists(
            None, None, *lists, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, block=block
        )

    @classmethod
    def from_intervals(
        cls,
        intervals: Any,
        *,
        seqlen_q: int,
        seqlen_kv: int,
        block: tuple[int, int] = (128, 128),
    ) -> BlockMask:
        """Take what each query sees as a few intervals of keys: (..., rows, n, 2), int32.

        A row has n intervals [begin, end), of which any may be empty. rows: Sq, or one for each
        block of queries. The mask keeps the intervals, as the rule of its mixed blocks.
        """
        queries, _ = _blocks(seqlen_q, seqlen_kv, block)
        made = block_lists.of_intervals(intervals, (seqlen_q, seqlen_kv), block, queries)
        return cls.from_lists(
            *made.lists,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            block=block,
            mask_mod=made.mask_mod,
            mod_args=made.mod_args,
        )

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockMask:
        """Take a BlockMask of torch's FlexAttention, by its attributes.

        Its mask_mod is a Python function, which no kernel can call: where it has mixed blocks, pass
        the same rule to ``attention`` beside it.
        """
        try:
            given = {name: getattr(block_mask, name, None) for name in LISTS}
            size = getattr(block_mask, "BLOCK_SIZE", None)
            lengths = getattr(block_mask, "seq_lengths", None)
        except Exception as error:  # of an object that only looks like one
            raise TypeError(f"block_mask: got {shown(block_mask)}: {error}") from error
        if given["kv_num_blocks"] is None or size is None or lengths is None:
            raise TypeError(
                f"block_mask: got {type(block_mask).__name__}; use flashcore_cupy.block_mask(...), "
                f"a BlockMask.from_..., or a BlockMask of torch's FlexAttention"
            )
        block = (size, size) if hasattr(size, "__index__") else size
        seqlen_q, seqlen_kv = _two("block_mask.seq_lengths", lengths)
        return cls.from_lists(**given, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, block=block)

    @classmethod
    def of(cls, given: Any) -> BlockMask:
        """Return a block mask as it is, or one of torch's."""
        return given if isinstance(given, cls) else cls.from_flex(given)

    # --- what a call makes of it ------------------------------------------------------------------

    @property
    def has_mixed(self) -> bool:
        """Whether it has a list of mixed blocks, as long as that may be."""
        return "kv_indices" in self.arrays and self.arrays["kv_indices"].shape[-1] > 0

    @property
    def rule_heads(self) -> int:
        """Heads that its own rule tells apart: 1, or all of q."""
        return self.shape[1] if isinstance(self.mask_mod, InKernel) else 1

    def lists(self, *, cpu: bool) -> Lists:
        """The lists, as CuPy, or on the CPU NumPy, has them."""
        arrays = {name: rule_array(f"block_mask.{name}", x, cpu) for name, x in self.arrays.items()}
        return Lists(arrays, self.block, self.seqlens, self.rule_heads)

    def beside(self, rules: Mapping[str, Any], *, in_kernel: bool) -> dict[str, Any]:
        """A call's rules with those that the mask has for its mixed blocks, unless they are given.

        Raises ``ValueError`` if there is none, or if two arrays have one name.
        """
        found = {name: x for name, x in rules.items() if x is not None}
        if "mask_mod" not in found and "mask" not in found:
            own = self.mask_mod
            if isinstance(own, InKernel):
                own = own.cuda if in_kernel else own.python
            found |= {n: x for n, x in (("mask_mod", own), ("mask", self.mask)) if x is not None}
            if own is not None and self.mod_args:
                found["mod_args"] = _joined(self.mod_args, found.get("mod_args") or {})
        if self.has_mixed and "mask_mod" not in found and "mask" not in found:
            raise ValueError(
                "block_mask: has mixed blocks, and no rule says what they hide (a Python function "
                "of FlexAttention cannot be used); pass mask_mod or mask beside it, or full blocks "
                "alone"
            )
        return found

    # --- for people -------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B or 1, heads or 1, Qb, Kb), in blocks."""
        counts = next(self.arrays[name] for name in LISTS[::2] if name in self.arrays)
        batches, heads, rows = counts.shape
        return int(batches), int(heads), int(rows), blocks_of(self.seqlens[1], self.block[1])

    def to_dense(self) -> Any:
        """The state of each block, (B or 1, heads or 1, Qb, Kb) uint8: 0 empty, 1 mixed, 2 full."""
        return interop.returned(*self._dense())

    @property
    def density(self) -> float:
        """The share of blocks that are not empty; of a GPU's lists it waits for them."""
        grid = self._grid()
        return float(np.mean(grid != 0)) if grid.size else 0.0

    def __repr__(self) -> str:
        """Its sizes, its density, and a picture of the first head's blocks."""
        grid = self._grid()
        batches, heads, *_ = self.shape
        mixed = float(np.mean(grid == MIXED)) if grid.size else 0.0
        head = (
            f"BlockMask: (Sq, Skv) = {self.seqlens}, blocks of {self.block[0]} x {self.block[1]}, "
            f"lists of {batches} x {heads} heads; {self.density:.1%} computed, {mixed:.1%} mixed"
        )
        return "\n".join([head, *_picture(grid[0, 0])]) if grid.size else head

    def _grid(self) -> Any:
        grid, _ = self._dense()
        return grid if isinstance(grid, np.ndarray) else grid.get()

    def _dense(self) -> tuple[Any, interop.Kind]:
        taken = {name: interop.taken(name, x) for name, x in self.arrays.items()}
        arrays = {name: x for name, (x, _) in taken.items()}
        xp = block_lists.module_of(next(iter(arrays.values())))
        grid = state_grid(arrays, self.block, self.seqlens, xp)
        return grid, next(iter(taken.values()))[1]


def _picture(grid: Any) -> list[str]:
    """A letter for each block, or for some of them together: mixed if they are not all alike."""
    rows, columns = grid.shape
    step = max(1, -(-max(rows, columns) // _PICTURE))
    lines = []
    for first in range(0, rows, step):
        parts = (grid[first : first + step, k : k + step] for k in range(0, columns, step))
        states = (int(p.flat[0]) if (p == p.flat[0]).all() else MIXED for p in parts)
        lines.append("|" + "".join(_LETTERS[state] for state in states) + "|")
    return lines


def _two(name: str, values: Any) -> tuple[Any, Any]:
    """Two lengths, whatever they are; ``TypeError`` if it is not two."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise TypeError(f"{name}: got {shown(values)}; use (Sq, Skv)")
    return values[0], values[1]


def _blocks(seqlen_q: Any, seqlen_kv: Any, block: Any) -> tuple[int, int]:
    """Blocks of queries and of keys, of lengths that are checked."""
    block = checked_block(block)
    lengths = checked_length("seqlen_q", seqlen_q), checked_length("seqlen_kv", seqlen_kv)
    return blocks_of(lengths[0], block[0]), blocks_of(lengths[1], block[1])


def checked_block(block: Any) -> tuple[int, int]:
    """Return queries and keys of a block; ``ValueError`` unless each is one of ``BLOCK_SIZES``."""
    if isinstance(block, tuple | list) and len(block) == 2:
        sizes = tuple(block)
        if all(isinstance(n, int | np.integer) and n in BLOCK_SIZES for n in sizes):
            return int(sizes[0]), int(sizes[1])
    choices = " or ".join(map(str, BLOCK_SIZES))
    raise ValueError(f"block: got {shown(block)}; use (queries, keys), each {choices}")


def checked_length(name: str, value: Any) -> int:
    """Return a size as an int from 0; ``TypeError`` or ``ValueError`` if it is none."""
    try:
        n = int(value.__index__())
    except Exception:  # of no integer, or of an array of any library that is none
        raise TypeError(f"{name}: got {shown(value)}; use an int") from None
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value}; use an int")
    if not 0 <= n <= MAX_SEQLEN:
        raise ValueError(f"{name}: got {n}; use an int from 0 to {MAX_SEQLEN}")
    return n


def _joined(own: Mapping[str, Any], given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"mod_args: got {shown(given)}; use a dict of names and arrays")
    for name in own.keys() & given.keys():
        if own[name] is not given[name]:
            raise ValueError(
                f"mod_args: the block mask's rule has an array {name!r}, too; use another name"
            )
    return {**own, **given}
