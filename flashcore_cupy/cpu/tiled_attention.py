"""Tiled online-softmax attention in NumPy: what `attention()` runs on arrays of the host.

The algorithm of the GPU kernels (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022) with
BLAS for the two products: per block of queries a running maximum, a running sum and an unnormalised
output, so memory grows with S * tile and never with S * S. Everything accumulates in float32.

Threads take (batch, head, block of queries). BLAS threads under them would only fight over the
cores, so every product is a stack of products small enough for BLAS to run on the calling thread;
that also makes the result independent of the number of threads of either kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flashcore_cupy.cpu import parallel
from flashcore_cupy.cpu.numpy_rules import NumpyRules, Sizes, sizes_of
from flashcore_cupy.problem.blocks import Array, Block, BoolArray

__all__ = ["Array", "Sizes", "sequences", "tiled"]

Float32Array: TypeAlias = NDArray[np.float32]

# A tile of scores takes 256 KB: it stays in a core's L2 while max, exp and P V pass over it.
BLOCK_M = 64
BLOCK_N = 1024
# OpenBLAS runs a product of at most this many multiply-adds on the calling thread.
SERIAL_PRODUCT = 64**3
# Fewer rows of queries than this do not pay for converting the same keys and values once more.
MIN_ROWS_PER_TASK = 512


def tiled(
    q: Array, k: Array, v: Array, *, out: Array | None = None, **rules: Any
) -> tuple[Array, Float32Array]:
    """Attention on NumPy arrays, softmax(scale * Q K^T) V, in O(S * tile) memory.

    Takes q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv) of float16, bfloat16 or float32
    with any strides, Hq being a multiple of Hkv, and the arguments of `NumpyRules`. Returns
    o (B, Hq, Sq, Dv) in q's dtype, which is `out` if given, and the natural-log log-sum-exp of the
    scores and the sink (B, Hq, Sq), float32. A query that sees no key gets o = 0 and, unless there
    is a sink, lse = -inf. The same call gives the same bits, however many cores.

    `out` takes any strides and must not overlap the inputs. Raises ValueError where shapes or out
    do not fit, and what `NumpyRules` raises.
    """
    sizes = sizes_of(q, k, v)
    shape = (*q.shape[:3], sizes.head_dim_v)
    checked = NumpyRules(sizes, **rules)
    if out is None:
        out = np.empty(shape, q.dtype)
    elif out.shape != shape or out.dtype != q.dtype:
        raise ValueError(f"out: got {out.dtype} {out.shape}; use {q.dtype} {shape}")
    lse = np.empty(shape[:3], np.float32)
    _run(_Problem(q, k, v, out, lse, checked))
    return out, lse


def sequences(
    q: Array, k: Array, v: Array, cu_seqlens_q: Array, cu_seqlens_k: Array
) -> Iterator[tuple[Array, Array, Array, slice]]:
    """Yield each sequence of a packed batch: views q, k, v (1, H, S, D), and its rows of q.

    Takes q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv) and the boundaries of the
    sequences (B + 1,), which are checked elsewhere: from 0, never decreasing, up to the total.
    """
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for rows, keys in bounds:
        cuts = q[slice(*rows)], k[slice(*keys)], v[slice(*keys)]
        one_q, one_k, one_v = (x.swapaxes(0, 1)[None] for x in cuts)
        yield one_q, one_k, one_v, slice(*rows)


@dataclass(frozen=True)
class _Problem:
    q: Array
    k: Array
    v: Array
    out: Array
    lse: Float32Array
    rules: NumpyRules


class _Task(NamedTuple):
    """Tiles of queries that share one head of K and V, as (query head, first query)."""

    batch: int
    head_kv: int
    tiles: list[tuple[int, int]]


def _tasks(sizes: Sizes, workers: int) -> Iterator[_Task]:
    tiles = list(product(range(sizes.group), range(0, sizes.seqlen_q, BLOCK_M)))
    heads = sizes.batch * sizes.heads_kv
    if not tiles or not heads:
        return
    # A few tasks per worker even out their unequal lengths.
    wanted = math.ceil(4 * workers / heads)
    parts = max(1, min(wanted, sizes.group * sizes.seqlen_q // MIN_ROWS_PER_TASK))
    for batch, head_kv in product(range(sizes.batch), range(sizes.heads_kv)):
        for part in range(parts):
            # Strided, because under a causal mask later tiles see more keys.
            chosen = [(head_kv * sizes.group + head, row) for head, row in tiles[part::parts]]
            yield _Task(batch, head_kv, chosen)


def _run(problem: _Problem) -> None:
    tasks = _tasks(problem.rules.sizes, parallel.cores())
    parallel.run(lambda task: _run_task(problem, task), tasks)


def _run_task(problem: _Problem, task: _Task) -> None:
    # NaN and infinity in the inputs are data here. The setting is per thread, hence not in _run.
    with np.errstate(all="ignore"):
        head = task.batch, task.head_kv
        keys = Keys.of(problem.k[head], problem.v[head])
        scratch = np.empty(BLOCK_M * keys.blocks_per_tile * keys.block, np.float32)
        for head_q, row in task.tiles:
            rows = slice(row, min(row + BLOCK_M, problem.q.shape[2]))
            q = np.ascontiguousarray(problem.q[task.batch, head_q, rows], np.float32)
            at = task.batch, head_q, np.arange(rows.start, rows.stop), rows.start, rows.stop - 1
            o, lse = _attend(q, keys, problem.rules, Block(*at, slice(0, 0)), scratch)
            problem.out[task.batch, head_q, rows] = o
            problem.lse[task.batch, head_q, rows] = lse


class Keys(NamedTuple):
    """One head of K and V in float32, cut into blocks; the last one is filled up with zeros."""

    k: Float32Array  # (blocks, block, D)
    v: Float32Array  # (blocks, block, Dv), divided by v_unit
    v_finite: bool
    v_unit: np.float32  # a power of two, so that no sum of v overflows where their mean does not

    @classmethod
    def of(cls, k: Array, v: Array) -> Keys:
        """Take k (Skv, D) and v (Skv, Dv)."""
        columns = max(k.shape[1], v.shape[1], 1)
        block = max(16, min(64, SERIAL_PRODUCT // (BLOCK_M * columns) // 16 * 16))
        k_blocks, v_blocks = (_in_blocks(x, block) for x in (k, v))
        largest = max(np.max(v_blocks, initial=0.0), -np.min(v_blocks, initial=0.0))
        finite = bool(np.isfinite(largest))
        if not finite:
            largest = np.max(np.abs(v_blocks), initial=0.0, where=np.isfinite(v_blocks))
        unit = np.float32(1)
        if largest > np.finfo(np.float32).max / max(1, len(v)):
            unit = np.float32(2 ** len(v).bit_length())
            v_blocks /= unit
        return cls(k_blocks, v_blocks, finite, unit)

    @property
    def block(self) -> int:
        """How many keys."""
        return int(self.k.shape[1])

    @property
    def blocks_per_tile(self) -> int:
        """At most."""
        return BLOCK_N // self.block

    def tiles(self, seen: slice) -> Iterator[slice]:
        """Yield the blocks of one tile after the other, as far as they hold keys that are seen."""
        block, step = self.block, self.blocks_per_tile
        end = -(-seen.stop // block) if seen.stop > seen.start else 0
        for first in range(seen.start // block, end, step):
            yield slice(first, min(first + step, end))


def _in_blocks(x: Array, block: int) -> Float32Array:
    rows, columns = x.shape
    blocks = -(-rows // block)
    padded = np.empty((blocks * block, columns), np.float32)
    padded[:rows] = x
    padded[rows:] = 0
    return padded.reshape(blocks, block, columns)


def _attend(
    q: Float32Array, keys: Keys, rules: NumpyRules, at: Block, scratch: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """Return o (M, Dv) and lse (M,) of the queries q (M, D) at `at`, over all keys they see."""
    rows, block = len(q), keys.block
    state = _RowState.empty(rows, keys.v.shape[2], rules.sink_of(at.head))
    for blocks in keys.tiles(rules.keys_seen(at.lowest, at.highest)):
        k, v = keys.k[blocks], keys.v[blocks]
        scores = scratch[: rows * len(k) * block].reshape(rows, -1)
        by_block = scores.reshape(rows, len(k), block).transpose(1, 0, 2)  # (blocks, M, block)
        np.matmul(q, k.transpose(0, 2, 1), out=by_block)
        end = min(blocks.stop * block, rules.sizes.seqlen_kv)
        at = at._replace(keys=slice(blocks.start * block, end))
        masked = _finish_scores(scores, rules, at)
        rescale = state.exponentiate(scores)
        rules.drop(scores[:, : end - at.keys.start], at)
        state.acc *= rescale[:, None]
        if masked and not keys.v_finite:
            seen = rules.visible(at)
            values = v.reshape(-1, v.shape[2])[: seen.shape[1]]
            state.acc += product_of_visible(scores[:, : seen.shape[1]], values, seen)
        else:
            state.acc += np.matmul(by_block, v).sum(axis=0)
    return state.finish(keys.v_unit * np.float32(rules.keep_scale))


def _finish_scores(scores: Float32Array, rules: NumpyRules, at: Block) -> bool:
    """Turn products into scores, -inf where hidden, in place; return whether any may be."""
    columns = at.keys.stop - at.keys.start
    rules.apply(scores[:, :columns], at)
    if columns < scores.shape[1]:
        scores[:, columns:] = -np.inf  # what fills up the last block
    doubtful = rules.doubtful(at)
    for part in doubtful:
        edge = scores[:, part.keys.start - at.keys.start : part.keys.stop - at.keys.start]
        np.copyto(edge, -np.inf, where=~rules.visible(part))
    return bool(doubtful)


def product_of_visible(weights: Float32Array, x: Float32Array, visible: BoolArray) -> Float32Array:
    """``weights @ x`` without the rows of x that a row does not see: 0 * NaN would leak them."""
    rows = zip(weights, visible, strict=True)
    return np.stack([w[seen] @ x[seen] for w, seen in rows])


@dataclass
class _RowState:
    """Online softmax of M queries: maximum (M,), sum (M,), unnormalised output (M, Dv)."""

    row_max: Float32Array
    row_sum: Float32Array
    acc: Float32Array

    @classmethod
    def empty(cls, rows: int, head_dim_v: int, sink: float) -> _RowState:
        """The sink alone, whose exp(sink - maximum) is 1; one of -inf vanishes at the first key."""
        return cls(
            np.full(rows, sink, np.float32),
            np.ones(rows, np.float32),
            np.zeros((rows, head_dim_v), np.float32),
        )

    def exponentiate(self, scores: Float32Array) -> Float32Array:
        """Turn scores into exp(score - maximum) in place; return the factor for older sums."""
        old_max = self.row_max
        self.row_max = np.maximum(old_max, scores.max(axis=1))
        # A row that has seen no key has maximum -inf, and -inf - -inf is NaN: subtract 0 instead.
        shift = np.where(self.row_max == -np.inf, np.float32(0), self.row_max)
        scores -= shift[:, None]
        np.exp(scores, out=scores)
        rescale: Float32Array = np.exp(old_max - shift)
        self.row_sum = self.row_sum * rescale + scores.sum(axis=1)
        return rescale

    def finish(self, unit: np.float32) -> tuple[Float32Array, Float32Array]:
        """Return the normalised output (M, Dv), times ``unit``, and the log-sum-exp (M,)."""
        total: Float32Array = np.where(self.row_sum == 0, np.float32(1), self.row_sum)
        total /= unit
        return self.acc / total[:, None], self.row_max + np.log(self.row_sum)
