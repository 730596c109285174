"""Block masks: drawn lists against a dense mask in float64, and keys that must not be read.

Every key that no query sees is NaN, in k and in v: so is all of every empty block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cases_edges import check
from drawn_blocks import EMPTY, FULL, MIXED, RULE, Drawn, drawn, poisoned_keys, rule
from places import Place, each, everywhere

from flashcore_cupy.check.selftest.case import Mod
from flashcore_cupy.cpu import reference

KERNELS = ("mma_sm80", "wgmma_sm90")
BLOCKS = ((128, 128), (64, 64), (64, 128), (128, 64))
SMALL, LARGE = {}, {"batch_invariant": True}
#: Tiles that a block mask gets by itself, and others, which blocks do not divide.
TILES: dict[str, dict[str, Any]] = {
    "few blocks": {},
    "enough": {"batch_invariant": True},
    "wide": {"batch_invariant": True, "config": {"block_n": 128}},
    "odd": {"batch_invariant": True, "config": {"block_n": 48}},
}
MASK_MOD = Mod(RULE, rule)


def checked(
    on: Place, mask: Drawn, heads: tuple[int, int] = (2, 2), *, batch: int = 1, dim: int = 64,
    stray: bool = False, dtype: str = "float16", tile: str = "few blocks", **rules: Any,
) -> np.ndarray:  # fmt: skip
    """Compare a call with the oracle's, by a dense mask; return the output."""
    rng = np.random.default_rng(5)
    sizes = {"batch": batch, "heads": heads[0], "heads_kv": heads[1], "head_dim": dim}
    lengths = {"seqlen": mask.seqlens[0], "seqlen_kv": mask.seqlens[1]}
    q, k, v = reference.make_inputs("normal", **sizes, **lengths, dtype=dtype)
    dense = mask.dense(heads[0])
    seen = dense if not rules.get("causal") else dense & _causal(mask.seqlens)
    k, v = (poisoned_keys(x, seen, heads[1]) for x in (k, v))
    block_mask = mask.mask(on.xp, rng, stray=stray)
    how = {} if on.is_numpy else TILES[tile]
    got, lse = on.run(
        q, k, v, block_mask=block_mask, mask_mod=MASK_MOD, return_lse=True, **how, **rules
    )
    check(got, q, k, v, mask=dense, **rules)
    empty = ~np.broadcast_to(seen, (batch, *seen.shape[1:])).any(axis=3)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (got[empty] == 0).all()
    return got


def _causal(seqlens: tuple[int, int]) -> np.ndarray:
    i, j = np.ogrid[: seqlens[0], : seqlens[1]]
    return j <= i + seqlens[1] - seqlens[0]


@each("block", BLOCKS)
@each("lists", ((1, 1), (2, 1), (1, 4), (2, 2)))
@each("seqlens", ((300, 421), (128, 256), (129, 65)))
@each("tile", TILES)
@each("dim", (64, 128))
@everywhere(*KERNELS)
def test_drawn_lists(
    on: Place, block: tuple[int, int], lists: tuple[int, int], seqlens: tuple[int, int], tile: str,
    dim: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(sum(block) + sum(lists) + sum(seqlens))
    checked(on, drawn(rng, seqlens, block, lists), (4, 2), batch=2, tile=tile, dim=dim)
