"""What the correctness matrix tries: every kernel, each choice with a few of the others.

The full product would be many thousands of cases. Each group below varies one thing thoroughly and
lets the others rotate, so that every pair of choices that shares code meets somewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from flashcore_cupy.check.selftest.case import Case
from flashcore_cupy.check.selftest.rule_cases import rule_cases, takes_dims, takes_views
from flashcore_cupy.cpu.reference import INPUT_KINDS
from flashcore_cupy.problem.attention_problem import Causal, Gate, Layout
from flashcore_cupy.select import registry, selector, table

__all__ = ["Case", "cases"]

_CAUSAL: tuple[Causal, ...] = (False, True, "top-left")
_GATES: tuple[Gate, ...] = ("qk", "softmax", "pv")
#: Head dims that are padded to a row's, or fall between the widths of loads.
_ODD_HEAD_DIMS = (1, 40, 72, 100)


def cases() -> list[Case]:
    """Every case, for every kernel of the ladder, in the same order each time."""
    return [case for kernel in registry.KERNELS for case in _cases_of(kernel)]


def _cases_of(kernel: str) -> Iterator[Case]:
    dtypes = registry.KERNELS[kernel].dtypes
    yield from _head_dims(kernel, dtypes)
    yield from _shapes(kernel, dtypes)
    if any({row.max_blocks, row.above_blocks} != {None} for row in selector.rows_of(kernel)):
        yield from _grids(kernel, dtypes)
    yield from _memory(kernel, dtypes)
    yield from _kinds(kernel, dtypes)
    yield from _gates(kernel, dtypes)
    for dtype in dtypes:
        yield Case("repeat", kernel, dtype, heads=8, heads_kv=8, seqlen_q=300, repeats=10, seed=6)
    if registry.KERNELS[kernel].has_rules:
        yield from rule_cases(kernel, dtypes)


def _head_dims(kernel: str, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Every row's head dim, odd ones between them, and Dv apart from D."""
    rows = {row.head_dim for row in selector.rows_of(kernel)} | set(table.WMMA_HEAD_DIMS)
    causal = itertools.cycle(_CAUSAL)
    for dim in sorted(rows | set(_ODD_HEAD_DIMS)):
        for dtype in dtypes:
            if not takes_dims(kernel, dtype, (dim, dim)):
                continue
            yield Case(
                "head dim", kernel, dtype, head_dim=dim, head_dim_v=dim, causal=next(causal), seed=1
            )
    for dim, dim_v in ((64, 32), (32, 96), (40, 72)):
        yield Case("head dim", kernel, head_dim=dim, head_dim_v=dim_v, causal=next(causal), seed=1)


def _shapes(kernel: str, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Lengths at, one below and one above the tiles, one, long, and unequal; grouped heads."""
    lengths = [(1, 1), (77, 77), (512, 512), (1000, 1000)]
    lengths += [(1, 512), (512, 1), (200, 77), (77, 200)]
    for m, n in _tiles(kernel):
        lengths += [(m, n), (m - 1, n - 1), (m + 1, n + 1), (3 * m, 2 * n + 1)]
    which = itertools.cycle(dtypes[:2])
    for (seqlen_q, seqlen_kv), causal in itertools.product(lengths, _CAUSAL):
        if causal == "top-left" and seqlen_q == seqlen_kv:
            continue  # the diagonal is the same
        yield Case(
            "shape",
            kernel,
            next(which) if max(seqlen_q, seqlen_kv) < 500 else "float16",
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            causal=causal,
            seed=2,
        )
    for heads, heads_kv, batch in ((8, 2, 2), (4, 1, 3)):
        for causal in _CAUSAL[:2]:
            yield Case(
                "heads", kernel, batch=batch, heads=heads, heads_kv=heads_kv, causal=causal, seed=2
            )


def _tiles(kernel: str) -> list[tuple[int, int]]:
    """Queries and keys per tile of 64 columns, for few queries and for many."""
    rows = [row for row in selector.rows_of(kernel) if row.head_dim >= 64]
    many = next(row for row in rows if row.max_blocks is row.max_rows is None)
    sizes = [(row.tile.block_m, row.tile.block_n) for row in (rows[0], many)]
    return list(dict.fromkeys(sizes))


def _grids(kernel: str, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Heads enough for the tile of a full grid, at the edges of that tile."""
    rows = [row for row in selector.rows_of(kernel) if row.max_blocks is row.max_rows is None]
    which = itertools.cycle(dtypes[:2])
    for dim in sorted({row.head_dim for row in rows}):
        tile = next(row for row in rows if row.head_dim == dim).tile
        for more, causal in itertools.product((-1, 0, 1), _CAUSAL[:2]):
            yield Case(
                "grid",
                kernel,
                next(which),
                batch=9,
                heads=8,
                heads_kv=2,
                seqlen_q=tile.block_m + more,
                seqlen_kv=2 * tile.block_n + more,
                head_dim=dim,
                head_dim_v=dim,
                causal=causal,
                seed=7,
            )


def _memory(kernel: str, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Both layouts in every kind of view, and head dims that no wide load divides."""
    layouts: tuple[Layout, ...] = ("bhsd", "bshd")
    which = itertools.cycle(dtypes[:2])
    for view, layout in itertools.product(takes_views(kernel), layouts):
        yield Case(
            "memory", kernel, next(which), batch=2, layout=layout, view=view, causal=True, seed=3
        )
    for dim in (36, 33):
        if not takes_dims(kernel, dtypes[0], (dim, dim)):
            continue
        yield Case("memory", kernel, head_dim=dim, head_dim_v=dim, view="strided", seed=3)


def _kinds(kernel: str, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Every kind of random input."""
    causal = itertools.cycle(_CAUSAL[:2])
    for kind, dtype in itertools.product(INPUT_KINDS, dtypes):
        yield Case(
            "inputs", kernel, dtype, kind=kind, seqlen_q=200, seqlen_kv=300, causal=next(causal),
            seed=4,
        )  # fmt: skip


def _gates(kernel: str, dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Every gate on one tile, on tails, and on several tiles."""
    lengths = [(100, 130)]
    for m, n in _tiles(kernel):
        lengths += [(m, n), (m + 1, n - 1)]
    for gate, (seqlen_q, seqlen_kv), causal in itertools.product(_GATES, lengths, _CAUSAL[:2]):
        yield Case(
            "gate",
            kernel,
            dtypes[1] if seqlen_q == 100 else dtypes[0],
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            causal=causal,
            gate=gate,
            seed=5,
        )
