"""Tiles whose warps share rows, or that have a part of the keys, and what hidden keys may hold."""

from __future__ import annotations

import numpy as np
import pytest
from cases_edges import DTYPES, EXACT, Mod, Place, arrays, each, everywhere

from flashcore_cupy.attention import plan
from flashcore_cupy.cpu import reference
from flashcore_cupy.launch.plan import load_kernel


@everywhere(*EXACT)
@each("dtype", DTYPES)
def test_results_have_the_dtype_of_the_inputs(on: Place, dtype: str) -> None:
    q, k, v = arrays(20, 30, dtype=dtype)
    o, lse = on.attention(*map(on.xp.asarray, (q, k, v)), return_lse=True)
    assert isinstance(o, on.xp.ndarray) and o.dtype == q.dtype
    assert lse.dtype == np.float32


@each("head_dim", [64, 128, 256], emulated=[64, 256])
def test_float32_is_as_accurate_as_float32(on: Place, head_dim: int) -> None:
    """2048 keys, all N(0, 1): within 2e-6."""
    queries = 32 if on.is_emulated else 2048
    q, k, v = arrays(queries, 2048, head_dim, dtype="float32", seed=head_dim)
    o = on.by("mma_sm80").run(q, k, v)
    expected, _ = reference.oracle(q, k, v)
    assert np.abs(o - expected).max() <= 2e-6


@pytest.mark.parametrize(
    ("block_n", "warps_d"), [(32, 2), (64, 2), (64, 4), (128, 2), (128, 4)], ids=str
)
def test_warps_that_share_rows_in_other_tiles(on: Place, block_n: int, warps_d: int) -> None:
    """Parts of P that are a panel of shared memory, several, and less than one."""
    q, k, v = arrays(150, 150, 256, seed=block_n + warps_d)
    tile = {"block_m": 32, "warps_m": 2, "warps_d": warps_d, "num_stages": 1, "block_n": block_n}
    o = on.by("mma_sm80").run(q, k, v, config=tile)
    expected, _ = reference.oracle(q, k, v)
    assert np.abs(o - expected).max() < 2e-3


#: Queries of document n see every other document of the keys: n of 150 queries, 2 n of 70 keys. So
#: some tiles are hidden from all rows of a block, some from some, some in part.
DOCUMENTS = Mod(
    "kv_idx / 70 == q_idx / 150 * 2", lambda b, h, q_idx, kv_idx: kv_idx // 70 == q_idx // 150 * 2
)


@each(
    "kernel, dtype, head_dim",
    [
        *(("wgmma_sm90", "float16", n) for n in (64, 128, 256)),
        *(("mma_sm80", "float16", n) for n in (64, 128, 256, 512)),
        ("mma_sm80", "float32", 64),
    ],
    emulated=[
        *(("wgmma_sm90", "float16", n) for n in (64, 256)),
        *(("mma_sm80", dtype, 64) for dtype in ("float16", "float32")),
    ],
)
@each("form", ["mask", "mask_mod"])
@each("causal", [False, True])
def test_keys_of_other_documents_may_hold_anything(
    on: Place, kernel: str, dtype: str, head_dim: int, form: str, causal: bool
) -> None:
    q, k, v = arrays(600, 624, head_dim, dtype=dtype, seed=head_dim)
    if not on.takes(kernel):
        pytest.skip(f"{kernel} is for another GPU")
    i, j = np.arange(600)[:, None], np.arange(624)
    seen = DOCUMENTS.python(0, 0, i, j)
    rule = {"mask": seen} if form == "mask" else {"mask_mod": DOCUMENTS}
    if causal:
        seen = seen & (j <= i + 24)
    expected, _ = reference.oracle(q, k, v, mask=seen)
    hidden = ~seen.any(0)
    assert hidden.sum() > 300
    k[:, :, hidden], v[:, :, hidden] = np.nan, np.inf
    o = on.by(kernel).run(q, k, v, causal=causal, **rule)
    tolerance = 4e-3 if dtype == "float16" else 5e-6
    assert np.abs(o - expected).max() < tolerance


#: Kernel, heads, queries, keys: clusters, most of whose parts see nothing, and parts in memory.
SPLIT = [
    ("wgmma_sm90", (8, 2), 1, 3008),
    ("wgmma_sm90", (32, 8), 3, 30_000),
    ("mma_sm80", (8, 2), 1, 3008),
    ("mma_sm80", (8, 8), 4, 3008),
]


@each(
    "kernel, heads, queries, keys", SPLIT, emulated=[*SPLIT[::2], ("wgmma_sm90", (8, 1), 3, 3008)]
)
@each("head_dim", [64, 128])
def test_parts_of_split_keys_may_see_nothing(
    on: Place, kernel: str, heads: tuple[int, int], queries: int, keys: int, head_dim: int
) -> None:
    q, k, v = arrays(queries, keys, head_dim, heads=heads[0], heads_kv=heads[1], seed=keys)
    if not on.takes(kernel):
        pytest.skip(f"{kernel} is for another GPU")
    seen = (np.arange(keys) >= 1000) & (np.arange(keys) < 1103)
    expected, _ = reference.oracle(q, k, v, mask=seen)
    k[:, :, ~seen], v[:, :, ~seen] = np.nan, np.inf
    bound = on.by(kernel).launched(q, k, v, mask=seen)
    assert bound.selection.config.tile.split_kv
    assert np.abs(on.to_host(bound.arrays["o"]) - expected).max() < 2e-3


FEW_BLOCKS = {
    "mma_sm80": [(1, 1, 64, 64), (3, 2, 17, 100), (2, 5, 333, 64), (1, 1, 65, 1)],
    "wgmma_sm90": [(1, 13, 70, 64), (2, 8, 300, 100), (1, 16, 500, 1)],
}


@pytest.mark.parametrize("kernel", FEW_BLOCKS)
def test_a_length_compiles_nothing_anew(on: Place, kernel: str) -> None:
    """Unless it gets another tile: these are all few blocks of many queries."""
    if not on.takes(kernel):
        pytest.skip(f"{kernel} is for another GPU")
    found, misses = set(), set()
    for batch, heads, seqlen_q, seqlen_kv in FEW_BLOCKS[kernel]:
        host = arrays(seqlen_q, seqlen_kv, batch=batch, heads=heads)
        bound = plan(*map(on.xp.asarray, host), kernel=kernel)
        found.add(bound.selection.config)
        misses.add(load_kernel.cache_info().misses)
    assert len(found) == len(misses) == 1
