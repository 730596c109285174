"""Gradients of attention in NumPy, tile by tile: what `attention_backward` runs on the host.

FlashAttention-2's backward pass (Dao 2023, arXiv 2307.08691, algorithm 2): the scores of a tile are
computed again, and the log-sum-exp makes them probabilities, so memory grows with S * tile and
never with S * S. Everything accumulates in float32. Products go in blocks, as `tiled_attention`'s.

Threads take heads of K and V with all their query heads, so dK and dV have one owner, and sums one
order. Heads that share elements of a rule's gradient, as those of a broadcast bias do, go to one
thread together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from flashcore_cupy.cpu import parallel, tiled_attention
from flashcore_cupy.cpu.numpy_rules import NumpyRules, sizes_of
from flashcore_cupy.cpu.tiled_attention import Float32Array, Keys, product_of_visible
from flashcore_cupy.problem.blocks import Array, Block
from flashcore_cupy.problem.mod_elements import mod_args_among
from flashcore_cupy.problem.rule import Rows

_Head: TypeAlias = tuple[int, int]


def tiled_gradients(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    *,
    into: Mapping[str, Array],
    dlse: Array | None = None,
    accumulate: bool = False,
    **rules: Any,
) -> None:
    """Write the gradients of attention on NumPy arrays, or add to them.

    Takes do and o (B, Hq, Sq, Dv), the operands of `tiled`, lse and dlse (B, Hq, Sq), float32, and
    the arguments of `NumpyRules`. `into`: what to write, by its input's name and in its shape. "q",
    "k" and "v" are written, or with `accumulate` added to; rules' gradients are always added to.
    The same call gives the same bits, however many cores.
    """
    rules["mod_gradients"] = mod_args_among(into)
    checked = NumpyRules(sizes_of(q, k, v), **rules)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
    given["dlse"] = np.broadcast_to(np.float32(0), lse.shape) if dlse is None else dlse
    problem = _Problem(given, into, accumulate, checked)
    parallel.run(lambda heads: _run_task(problem, heads), _tasks(problem))


@dataclass(frozen=True)
class _Problem:
    given: Mapping[str, Array]
    into: Mapping[str, Array]
    accumulate: bool
    rules: NumpyRules

    def store(self, name: str, place: Any, gradient: Float32Array) -> None:
        """Write a part of dq, dk or dv, if it is asked for."""
        if name not in self.into:
            return
        target = self.into[name][place]
        if self.accumulate:
            target += gradient
        else:
            target[...] = gradient


def _tasks(problem: _Problem) -> list[list[_Head]]:
    """Heads of K and V as (batch, head): together those that add to the same elements."""
    batches, heads = problem.rules.gradient_axes(problem.into)
    tasks: dict[_Head, list[_Head]] = {}
    sizes = problem.rules.sizes
    for batch, head in product(range(sizes.batch), range(sizes.heads_kv)):
        tasks.setdefault((batch * batches, head * heads), []).append((batch, head))
    return list(tasks.values())


def _run_task(problem: _Problem, heads: list[_Head]) -> None:
    # NaN and infinity in the inputs are data here. The setting is per thread.
    with np.errstate(all="ignore"):
        for head in heads:
            _run_head(problem, *head)


def _run_head(problem: _Problem, batch: int, head_kv: int) -> None:
    given, rules, sizes = problem.given, problem.rules, problem.rules.sizes
    scale, block_m = np.float32(rules.scale), tiled_attention.BLOCK_M
    side_k = _KeySide.of(given["k"][batch, head_kv], given["v"][batch, head_kv])
    heads = range(head_kv * sizes.group, (head_kv + 1) * sizes.group)
    for head, row in product(heads, range(0, sizes.seqlen_q, block_m)):
        end = min(row + block_m, sizes.seqlen_q)
        place = batch, head, slice(row, end)
        side_q = _QuerySide.of(given, place)
        rules.add_row_gradients(problem.into, Rows(head, side_q.lse, side_q.delta))
        for blocks in side_k.keys.tiles(rules.keys_seen(row, end - 1)):
            keys = slice(blocks.start * side_k.keys.block, blocks.stop * side_k.keys.block)
            keys = slice(keys.start, min(keys.stop, sizes.seqlen_kv))
            at = Block(batch, head, np.arange(row, end), row, end - 1, keys)
            _Tile(problem, side_q, side_k, blocks, at).add()
        problem.store("q", place, side_q.dq * scale)
    keep_scale = np.float32(rules.keep_scale)
    for name, gradient in (("k", side_k.dk * scale), ("v", side_k.dv * keep_scale)):
        by_key = gradient.reshape(-1, gradient.shape[2])[: sizes.seqlen_kv]
        problem.store(name, (batch, head_kv), by_key)


@dataclass(frozen=True)
class _KeySide:
    """One head of K and V in blocks, and what their gradients have come to."""

    keys: Keys
    is_finite: bool
    dk: Float32Array  # as keys.k, but for the scale
    dv: Float32Array  # as keys.v

    @classmethod
    def of(cls, k: Array, v: Array) -> _KeySide:
        keys = Keys.of(k, v)
        finite = bool(np.isfinite(keys.k).all())
        return cls(keys, finite, np.zeros_like(keys.k), np.zeros_like(keys.v))


@dataclass(frozen=True)
class _QuerySide:
    """Some queries of one head, (M, ...), and what their gradient has come to."""

    do: Float32Array
    q: Float32Array
    lse: Float32Array
    delta: Float32Array
    is_finite: bool
    dq: Float32Array  # but for the scale

    @classmethod
    def of(cls, given: Mapping[str, Array], place: tuple[int, int, slice]) -> _QuerySide:
        names = ("do", "q", "o", "lse", "dlse")
        do, q, o, lse, dlse = (np.ascontiguousarray(given[n][place], np.float32) for n in names)
        # A query without keys has o = 0, and then do does not matter, NaN or not.
        delta = np.multiply(do, o, where=o != 0, out=np.zeros_like(o)).sum(axis=1) - dlse
        finite = bool(np.isfinite(q).all() and np.isfinite(do).all())
        return cls(do, q, lse, delta, finite, np.zeros_like(q))


@dataclass(frozen=True)
class _Tile:
    """Some queries by some blocks of keys: M x N, and N' with what fills up the last block."""

    problem: _Problem
    side_q: _QuerySide
    side_k: _KeySide
    blocks: slice
    at: Block

    def add(self) -> None:
        """Compute P and dS, (M, N'), and add what they give each gradient."""
        rules, columns = self.problem.rules, self.at.shape[1]
        p = self._products(self.side_q.q, self.side_k.keys.k)
        derivatives = rules.linearize(p[:, :columns], self.at)
        hides = self._exponentiate(p)
        d = self._products(self.side_q.do, self.side_k.keys.v)
        d *= self.side_k.keys.v_unit * np.float32(rules.keep_scale)
        rules.drop(d[:, :columns], self.at)
        d -= self.side_q.delta[:, None]
        d *= p
        np.copyto(d, 0, where=p == 0)
        rules.drop(p[:, :columns], self.at)  # dV alone takes it from here on
        rules.pull_back(d[:, :columns], derivatives, self.problem.into, self.at)
        if hides and not (self.side_q.is_finite and self.side_k.is_finite):
            self._add_visible(p[:, :columns], d[:, :columns])
        else:
            self._add_all(self._by_block(p), self._by_block(d))

    def _products(self, rows: Float32Array, keys: Float32Array) -> Float32Array:
        """Rows (M, D) by a side of the keys, (M, N')."""
        chosen = keys[self.blocks]
        out = np.empty((len(rows), len(chosen) * chosen.shape[1]), np.float32)
        np.matmul(rows, chosen.transpose(0, 2, 1), out=self._by_block(out))
        return out

    def _by_block(self, x: Float32Array) -> Float32Array:
        """(M, N') as (blocks, M, block), a view."""
        blocks: Float32Array = x.reshape(len(x), -1, self.side_k.keys.block).transpose(1, 0, 2)
        return blocks

    def _exponentiate(self, scores: Float32Array) -> bool:
        """Turn scores into P, 0 where hidden, in place; return whether any may be."""
        lse = self.side_q.lse
        # Without keys it is -inf, and -inf - -inf is NaN: subtract 0 instead.
        scores -= np.where(lse == -np.inf, np.float32(0), lse)[:, None]
        np.exp(scores, out=scores)
        scores[:, self.at.shape[1] :] = 0
        doubtful = self.problem.rules.doubtful(self.at)
        first = self.at.keys.start
        for part in doubtful:
            edge = scores[:, part.keys.start - first : part.keys.stop - first]
            np.copyto(edge, 0, where=~self.problem.rules.visible(part))
        return bool(doubtful)

    def _add_all(self, p: Float32Array, d: Float32Array) -> None:
        """P and dS by blocks."""
        side_q, side_k, into = self.side_q, self.side_k, self.problem.into
        if "q" in into:
            np.add(side_q.dq, np.matmul(d, side_k.keys.k[self.blocks]).sum(0), out=side_q.dq)
        if "k" in into:
            side_k.dk[self.blocks] += np.matmul(d.transpose(0, 2, 1), side_q.q)
        if "v" in into:
            side_k.dv[self.blocks] += np.matmul(p.transpose(0, 2, 1), side_q.do)

    def _add_visible(self, p: Float32Array, d: Float32Array) -> None:
        """The same without what is hidden, which may be NaN."""
        side_q, seen = self.side_q, self.problem.rules.visible(self.at)
        k, dk, dv = (
            x.reshape(-1, x.shape[2])[self.at.keys]
            for x in (self.side_k.keys.k, self.side_k.dk, self.side_k.dv)
        )
        np.add(side_q.dq, product_of_visible(d, k, seen), out=side_q.dq)
        dk += product_of_visible(d.T, side_q.q, seen.T)
        dv += product_of_visible(p.T, side_q.do, seen.T)
