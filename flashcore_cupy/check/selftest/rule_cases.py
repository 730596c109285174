"""The cases of kernels that have windows, score rules, masks, sinks and packed batches.

Their choices are too many to try one by one, let alone together: every choice meets every choice
of every other kind in some case (pairwise testing), which is where rules that share code collide.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from flashcore_cupy.check.selftest.case import (
    GATE_RULES,
    HIDES,
    SCORES,
    SINKS,
    Case,
    Choice,
    View,
    packed,
)
from flashcore_cupy.problem.attention_problem import ITEMSIZE
from flashcore_cupy.problem.rules import RULES
from flashcore_cupy.select import registry, selector
from flashcore_cupy.select.tile_lists import TakesLists
from flashcore_cupy.select.units import round_up

#: Of q and k, and of v: between the table's rows, and apart from each other.
_MORE_DIMS = ((33, 33), (40, 40), (64, 256), (192, 128))

POSITIONS: tuple[Choice, ...] = (
    {},
    {"causal": True},
    {"causal": "top-left"},
    {"window": (70, -1)},
    {"window": (-1, 40)},
    {"window": (33, 7)},
    {"causal": True, "window": (50, -1)},
    {"causal": "top-left", "window": (20, 5)},
)
SCALES: tuple[Choice, ...] = ({}, {"softmax_scale": -0.2}, {"softmax_scale": 0.0})
_MEMORY: tuple[Choice, ...] = tuple(
    {"view": view, "layout": layout} for view in get_args(View) for layout in ("bhsd", "bshd")
)


def _size(batch: int, heads: int, heads_kv: int, seqlen_q: int, seqlen_kv: int) -> Choice:
    return {
        "batch": batch,
        "heads": heads,
        "heads_kv": heads_kv,
        "seqlen_q": seqlen_q,
        "seqlen_kv": seqlen_kv,
    }


#: Sizes by the tile that they get: one kernel is compiled for all sizes of a line. All have an even
#: number of keys, which is no multiple of 16: see _MORE_KEYS.
_GRIDS: tuple[tuple[Choice, ...], ...] = (
    (_size(2, 8, 2, 4, 254), _size(1, 8, 1, 2, 3000)),  # decode: the keys are split
    (_size(1, 2, 2, 77, 100), _size(2, 4, 1, 129, 190)),  # few blocks
    (_size(2, 8, 2, 300, 130), _size(6, 8, 8, 65, 62)),  # some
    (_size(9, 12, 4, 63, 130), _size(7, 16, 2, 127, 62)),  # enough
    tuple(
        size | {"batch_invariant": True}
        for size in (_size(3, 4, 2, 77, 200), _size(2, 2, 1, 5, 300))
    ),
)
UNPACKED = {rule.name for rule in RULES if rule.when_packed}
#: So many more keys, up to a multiple of the second number. How many there are decides how a bias
#: and a mask are loaded: in pairs, key by key, 16 at a time.
_MORE_KEYS = ((0, 1), (1, 1), (0, 16))
_PACKED: tuple[tuple[Choice, tuple[tuple[int, int], ...]], ...] = (
    ({"heads": 4, "heads_kv": 2}, ((0, 5), (77, 100), (130, 64), (1, 1), (33, 0), (0, 0))),
    ({"heads": 8, "heads_kv": 2}, ((1, 300), (1, 0), (1, 2000), (0, 40), (1, 77))),
    ({"heads": 8, "heads_kv": 1}, ((2, 900), (0, 0), (1, 65), (2, 2))),
    ({"heads": 16, "heads_kv": 2}, ((200, 300), (128, 128), (0, 7), (500, 90), (190, 191))),
    (
        {"heads": 4, "heads_kv": 4, "batch_invariant": True},
        ((65, 64), (1, 200), (0, 0), (128, 129)),
    ),
)


def rule_cases(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every case of the rules for a kernel that has them."""
    yield from _pairs(kernel, dtypes)
    if _takes_packed(kernel):
        yield from _packed_pairs(kernel, dtypes)
    yield from _gates(kernel, dtypes)
    yield from _decode(kernel, dtypes)
    yield from _invariant(kernel, dtypes)


def _pairs(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every two choices together, at every size that the compiled kernel serves."""
    chosen = pairwise(
        {
            "dtype": [{"dtype": dtype} for dtype in dtypes],
            "dims": _dims(kernel),
            "grid": _GRIDS,
            "position": POSITIONS,
            "score": _taken(kernel, SCORES),
            "hide": _taken(kernel, HIDES),
            "sink": SINKS,
            "scale": SCALES,
            "memory": _taken(kernel, _MEMORY),
            "more keys": _MORE_KEYS,
        }
    )
    for row in chosen:
        sizes, (more, multiple) = row.pop("grid"), row.pop("more keys")
        rest = _in_dtype_taken(kernel, merged(row.values()))
        for size in sizes:
            keys = {"seqlen_kv": round_up(size["seqlen_kv"] + more, multiple)}
            yield Case("rules", kernel, **_whole_masks(kernel, rest | size | keys), seed=8)


def _packed_pairs(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """The same of packed batches, whose sequences may be empty on one side or on both."""
    chosen = pairwise(
        {
            "dtype": [{"dtype": dtype} for dtype in dtypes],
            "dims": [dim for dim in _dims(kernel) if dim["head_dim"] in (33, 64, 128, 192)],
            "lengths": _PACKED,
            "position": POSITIONS,
            "score": [choice for choice in _taken(kernel, SCORES) if UNPACKED.isdisjoint(choice)],
            "hide": [choice for choice in _taken(kernel, HIDES) if UNPACKED.isdisjoint(choice)],
            "sink": SINKS,
            "view": _taken(
                kernel,
                [{"view": v} for v in ("contiguous", "strided", "misaligned", "transposed")],
            ),
            "boundaries": ({"boundaries": "host"}, {"boundaries": "device"}),
        }
    )
    for row in chosen:
        heads, lengths = row.pop("lengths")
        rest = _in_dtype_taken(kernel, merged(row.values()))
        yield packed(Case("packed", kernel, **rest | heads, seed=9), lengths)


def _gates(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every gate with every rule, few blocks, split keys, and a full grid's tile."""
    chosen = pairwise(
        {
            "gate": [{"gate": gate} for gate in ("qk", "softmax", "pv")],
            "rule": _taken(kernel, GATE_RULES),
            "grid": [_GRIDS[n][0] for n in (0, 1, 4)],
            "dtype": [{"dtype": dtype} for dtype in dtypes],
            "dims": [{"head_dim": n, "head_dim_v": n} for n in (64, 128)],
        }
    )
    for row in chosen:
        yield Case("rules gate", kernel, **_whole_masks(kernel, merged(row.values())), seed=10)


def _decode(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """One query and a few, grouped heads, and keys enough for many blocks."""
    which = itertools.cycle(dtypes)
    causal = itertools.cycle((True, False, "top-left"))
    sizes = [_size(1, 8, kv, q, 9000 + q) for q, kv in itertools.product((1, 2, 3, 4), (2, 1))]
    sizes += [_size(2, 16, 4, 16, 1001), _size(1, 16, 2, 5, 3000), _size(5, 16, 8, 20, 300)]
    # Clusters of eight, most of which have no keys, of four and of two; parts in global memory.
    sizes += [_size(1, 8, 2, 1, 33), _size(3, 16, 4, 2, 700), _size(5, 16, 8, 1, 130)]
    sizes += [_size(1, 8, 2, 2, 100_000)]
    for size, dim in itertools.product(sizes, (64, 128)):
        dims = {"head_dim": dim, "head_dim_v": dim}
        rest = {"dtype": next(which), "causal": next(causal)}
        yield Case("decode", kernel, **size | dims | rest, repeats=3, seed=11)


def _invariant(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Sequences that are to give the same bits alone, of all dtypes, packed and not."""
    which = itertools.cycle((64, 128, 80))
    for dtype, causal, packs in itertools.product(dtypes, (False, True), (False, True)):
        dim = next(which)
        case = Case(
            *("invariant", kernel, dtype),
            **_size(5, 8, 2, 90, 150),
            head_dim=dim,
            head_dim_v=dim,
            causal=causal,
            seed=12,
            batch_invariant=True,
        )
        if packs and _takes_packed(kernel):
            yield packed(case, ((90, 150), (1, 700), (300, 20), (64, 64)))
        elif not packs:
            yield case


def _takes_packed(kernel: str) -> bool:
    return registry.KERNELS[kernel].family.takes_packed


@functools.cache
def _dims(kernel: str) -> tuple[Choice, ...]:
    rows = {row.dims for row in selector.rows_of(kernel)}
    dims = rows | {more for more in _MORE_DIMS if takes_dims(kernel, "float16", more)}
    return tuple({"head_dim": d, "head_dim_v": d_v} for d, d_v in sorted(dims))


def takes_views(kernel: str) -> tuple[View, ...]:
    """How arrays may lie in memory, as far as the kernel needs its rows aligned."""
    views: tuple[View, ...] = get_args(View)
    aligned = ("contiguous", "strided", "transposed")
    anywhere = registry.KERNELS[kernel].family.row_align == 1
    return tuple(v for v in views if v in aligned or anywhere)


def _taken(kernel: str, choices: Sequence[Choice]) -> list[Choice]:
    """Without memory that the kernel cannot read, and block masks that it does not take."""
    views, family = takes_views(kernel), registry.KERNELS[kernel].family
    listed = issubclass(family, TakesLists) and family.takes_blocks
    return [
        choice
        for choice in choices
        if choice.get("view", views[0]) in views and (listed or "block_mask" not in choice)
    ]


def takes_dims(kernel: str, dtype: str, dims: tuple[int, int]) -> bool:
    """Whether the kernel takes heads of so many columns, of q and k and of v."""
    align = registry.KERNELS[kernel].family.row_align
    if any(dim * ITEMSIZE[dtype] % align for dim in dims):
        return False  # contiguous rows would not start on it
    rows = [row.dims for row in selector.rows_of(kernel) if dtype in row.dtypes]
    return any(row[0] >= dims[0] and row[1] >= dims[1] for row in rows)


def _in_dtype_taken(kernel: str, choice: Choice) -> Choice:
    dims = choice["head_dim"], choice["head_dim_v"]
    return choice if takes_dims(kernel, choice["dtype"], dims) else choice | {"dtype": "bfloat16"}


def _whole_masks(kernel: str, choice: Choice) -> Choice:
    """With masks that the kernel can read so many keys at a time as it does."""
    keys = registry.KERNELS[kernel].family.mask_keys
    if keys == 1 or not choice.get("mask"):
        return choice
    return choice | {"view": "contiguous", "seqlen_kv": round_up(choice["seqlen_kv"], keys)}


def merged(choices: Any) -> Choice:
    """All fields of some choices."""
    fields: Choice = {}
    for choice in choices:
        fields |= choice
    return fields


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows of one choice per factor, so that every two choices of two factors meet in one.

    Greedy: each row starts from a pair that has not met, and takes of every other factor the choice
    that meets most others for the first time. The same factors give the same rows.
    """
    names, rng = list(factors), random.Random(0)
    choices = [[(n, i) for i in range(len(factors[name]))] for n, name in enumerate(names)]
    lines = itertools.combinations(choices, 2)
    missing = {pair for line in lines for pair in itertools.product(*line)}

    def gain(choice: tuple[int, int], row: dict[int, int]) -> tuple[int, float]:
        met = sum((min(choice, other), max(choice, other)) in missing for other in row.items())
        return met, rng.random()

    rows = []
    while missing:
        row = dict(min(missing))
        others = [n for n in range(len(names)) if n not in row]
        rng.shuffle(others)
        for n in others:
            best = max(choices[n], key=functools.partial(gain, row=row))
            row[n] = best[1]
        missing.difference_update(itertools.combinations(sorted(row.items()), 2))
        rows.append({name: factors[name][row[n]] for n, name in enumerate(names)})
    return rows
