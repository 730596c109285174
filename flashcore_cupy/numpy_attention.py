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
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flashcore_cupy.problem import Causal

Array: TypeAlias = NDArray[Any]
Float32Array: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]

# A tile of scores takes 256 KB: it stays in a core's L2 while max, exp and P V pass over it.
BLOCK_M = 64
BLOCK_N = 1024
# OpenBLAS runs a product of at most this many multiply-adds on the calling thread.
SERIAL_PRODUCT = 64**3
# Fewer rows of queries than this do not pay for converting the same keys and values once more.
MIN_ROWS_PER_TASK = 512


class Sizes(NamedTuple):
    """Sizes of one attention: (B, Hq, Sq, D) x (B, Hkv, Skv, D) x (B, Hkv, Skv, Dv)."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    head_dim_v: int

    @property
    def group(self) -> int:
        """Number of query heads that share a head of K and V."""
        return self.heads_q // self.heads_kv if self.heads_kv else 0

    def scale(self, softmax_scale: float | None) -> float:
        """Return softmax_scale, by default 1 / sqrt(D)."""
        return 1.0 / math.sqrt(self.head_dim) if softmax_scale is None else float(softmax_scale)


def causal_offset(causal: Causal, seqlen_q: int, seqlen_kv: int) -> int | None:
    """Return the offset of the causal diagonal: query i sees key j iff j <= i + offset.

    None stands for "not causal". True aligns the diagonal with the bottom right corner of the
    scores (the last query sees every key), "top-left" with the top left (query 0 sees key 0 only).
    Raises ValueError for anything else.
    """
    if isinstance(causal, bool):
        return seqlen_kv - seqlen_q if causal else None
    if causal == "top-left":
        return 0
    raise ValueError(f"causal: got {causal!r}; use False, True (bottom-right) or 'top-left'")


def sizes_of(q: Array, k: Array, v: Array) -> Sizes:
    """Return the sizes of canonical (B, H, S, D) operands; ValueError where they do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {x.shape}; use 4 axes (B, H, S, D)")
    batch, heads_q, seqlen_q, head_dim = q.shape
    _, heads_kv, seqlen_kv, head_dim_v = v.shape
    if k.shape != (batch, heads_kv, seqlen_kv, head_dim) or v.shape[0] != batch:
        raise ValueError(
            f"q, k, v: got shapes {q.shape}, {k.shape}, {v.shape}; use (B, Hq, Sq, D), "
            "(B, Hkv, Skv, D), (B, Hkv, Skv, Dv)"
        )
    if heads_q != heads_kv and (heads_kv == 0 or heads_q % heads_kv):
        raise ValueError(
            f"k: got {heads_kv} heads for q's {heads_q}; "
            "the heads of q are a multiple of those of k and v"
        )
    return Sizes(batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v)


def tiled(
    q: Array,
    k: Array,
    v: Array,
    *,
    softmax_scale: float | None = None,
    causal: Causal = False,
    out: Array | None = None,
) -> tuple[Array, Float32Array]:
    """Attention on NumPy arrays, softmax(scale * Q K^T) V, in O(S * tile) memory.

    Takes q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv) of float16, bfloat16 or float32
    with any strides; Hq is a multiple of Hkv. Returns o (B, Hq, Sq, Dv) in q's dtype, which is
    `out` if given, and the natural-log log-sum-exp of the scores (B, Hq, Sq), float32. A query that
    sees no key gets o = 0 and lse = -inf. The same call gives the same bits, however many cores.

    `out` takes any strides and must not overlap the inputs. Raises ValueError where shapes, causal
    or out do not fit.
    """
    sizes = sizes_of(q, k, v)
    offset = causal_offset(causal, sizes.seqlen_q, sizes.seqlen_kv)
    shape = (*q.shape[:3], sizes.head_dim_v)
    if out is None:
        out = np.empty(shape, q.dtype)
    elif out.shape != shape or out.dtype != q.dtype:
        raise ValueError(f"out: got {out.dtype} {out.shape}; use {q.dtype} {shape}")
    lse = np.empty(shape[:3], np.float32)
    _run(_Problem(q, k, v, out, lse, sizes, sizes.scale(softmax_scale), offset))
    return out, lse


@dataclass(frozen=True)
class _Problem:
    q: Array
    k: Array
    v: Array
    out: Array
    lse: Float32Array
    sizes: Sizes
    scale: float
    offset: int | None

    def last_key(self, rows: slice) -> IntArray:
        """Return, per query, the last key that it sees; negative if it sees none."""
        last = self.sizes.seqlen_kv - 1
        queries = np.arange(rows.start, rows.stop)
        if self.offset is None:
            return np.full_like(queries, last)
        seen: IntArray = np.minimum(queries + self.offset, last)
        return seen


class _Task(NamedTuple):
    """Tiles of queries that share one head of K and V, as (query head, first query)."""

    batch: int
    head_kv: int
    tiles: list[tuple[int, int]]


def _workers() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
    workers = _workers()
    tasks = list(_tasks(problem.sizes, workers))
    if min(workers, len(tasks)) < 2:
        for task in tasks:
            _run_task(problem, task)
        return
    with ThreadPoolExecutor(min(workers, len(tasks))) as pool:
        for _ in pool.map(lambda task: _run_task(problem, task), tasks):
            pass  # raises what a worker raised


def _run_task(problem: _Problem, task: _Task) -> None:
    # NaN and infinity in the inputs are data here. The setting is per thread, hence not in _run.
    with np.errstate(all="ignore"):
        head = task.batch, task.head_kv
        keys = _Keys.of(problem.k[head], problem.v[head])
        scratch = np.empty(BLOCK_M * keys.blocks_per_tile * keys.block, np.float32)
        for head_q, row in task.tiles:
            rows = slice(row, min(row + BLOCK_M, problem.sizes.seqlen_q))
            q = np.ascontiguousarray(problem.q[task.batch, head_q, rows], np.float32)
            o, lse = _attend(q, keys, problem.last_key(rows), problem.scale, scratch)
            problem.out[task.batch, head_q, rows] = o
            problem.lse[task.batch, head_q, rows] = lse


class _Keys(NamedTuple):
    """One head of K and V in float32, cut into blocks; the last one is filled up with zeros."""

    k: Float32Array  # (blocks, block, D)
    v: Float32Array  # (blocks, block, Dv)
    v_finite: bool

    @classmethod
    def of(cls, k: Array, v: Array) -> _Keys:
        columns = max(k.shape[1], v.shape[1], 1)
        block = max(16, min(64, SERIAL_PRODUCT // (BLOCK_M * columns) // 16 * 16))
        k_blocks, v_blocks = (_in_blocks(x, block) for x in (k, v))
        return cls(k_blocks, v_blocks, bool(np.isfinite(v_blocks).all()))

    @property
    def block(self) -> int:
        return int(self.k.shape[1])

    @property
    def blocks_per_tile(self) -> int:
        return BLOCK_N // self.block


def _in_blocks(x: Array, block: int) -> Float32Array:
    rows, columns = x.shape
    blocks = -(-rows // block)
    padded = np.empty((blocks * block, columns), np.float32)
    padded[:rows] = x
    padded[rows:] = 0
    return padded.reshape(blocks, block, columns)


def _attend(
    q: Float32Array, keys: _Keys, last_key: IntArray, scale: float, scratch: Float32Array
) -> tuple[Float32Array, Float32Array]:
    """Return o (M, Dv) and lse (M,) of the queries q (M, D), each seeing keys 0..last_key."""
    rows = len(q)
    state = _RowState.empty(rows, keys.v.shape[2])
    end_block = max(0, int(last_key[-1]) // keys.block + 1)
    for first in range(0, end_block, keys.blocks_per_tile):
        blocks = slice(first, min(first + keys.blocks_per_tile, end_block))
        k, v = keys.k[blocks], keys.v[blocks]
        scores = scratch[: rows * len(k) * keys.block].reshape(rows, -1)
        by_block = scores.reshape(rows, len(k), keys.block).transpose(1, 0, 2)  # (blocks, M, block)
        np.matmul(q, k.transpose(0, 2, 1), out=by_block)
        scores *= np.float32(scale)
        last_column = last_key - first * keys.block
        masked = int(last_column[0]) < scores.shape[1] - 1
        if masked:
            _mask(scores, last_column)
        rescale = state.exponentiate(scores)
        state.acc *= rescale[:, None]
        if masked and not keys.v_finite:
            state.acc += _product_of_visible(scores, v, last_column)
        else:
            state.acc += np.matmul(by_block, v).sum(axis=0)
    return state.finish()


def _mask(scores: Float32Array, last_column: IntArray) -> None:
    """Set what lies right of each row's last column to -inf."""
    start = max(0, int(last_column[0]) + 1)
    columns = np.arange(start, scores.shape[1])
    np.copyto(scores[:, start:], -np.inf, where=columns > last_column[:, None])


def _product_of_visible(
    weights: Float32Array, v: Float32Array, last_column: IntArray
) -> Float32Array:
    """P V without the keys that a row does not see: 0 * NaN would leak them."""
    flat = v.reshape(-1, v.shape[2])
    ends = np.maximum(last_column + 1, 0)
    return np.stack([w[:end] @ flat[:end] for w, end in zip(weights, ends, strict=True)])


@dataclass
class _RowState:
    """Online softmax of M queries: maximum (M,), sum (M,), unnormalised output (M, Dv)."""

    row_max: Float32Array
    row_sum: Float32Array
    acc: Float32Array

    @classmethod
    def empty(cls, rows: int, head_dim_v: int) -> _RowState:
        return cls(
            np.full(rows, -np.inf, np.float32),
            np.zeros(rows, np.float32),
            np.zeros((rows, head_dim_v), np.float32),
        )

    def exponentiate(self, scores: Float32Array) -> Float32Array:
        """Turn scores into exp(score - maximum) in place; return the factor for older sums."""
        old_max = self.row_max
        self.row_max = np.maximum(old_max, scores.max(axis=1))
        # A row that has seen no key has maximum -inf, and -inf - -inf is NaN: subtract 0 instead.
        shift = np.where(np.isneginf(self.row_max), np.float32(0), self.row_max)
        scores -= shift[:, None]
        np.exp(scores, out=scores)
        rescale: Float32Array = np.exp(old_max - shift)
        self.row_sum = self.row_sum * rescale + scores.sum(axis=1)
        return rescale

    def finish(self) -> tuple[Float32Array, Float32Array]:
        """Return the normalised output (M, Dv) and the log-sum-exp (M,)."""
        total: Float32Array = np.where(self.row_sum == 0, np.float32(1), self.row_sum)
        return self.acc / total[:, None], self.row_max + np.log(self.row_sum)
