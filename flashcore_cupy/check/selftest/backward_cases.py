"""What the correctness matrix tries of the backward pass; of every kernel, as far as it takes it.

As in `cases`, a group varies one thing thoroughly; rules meet each other in pairs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

from flashcore_cupy.check.selftest.case import HIDES, SCORES, SINKS, Case, Choice, View, packed
from flashcore_cupy.check.selftest.gradients import configs_of
from flashcore_cupy.check.selftest.rule_cases import (
    POSITIONS,
    SCALES,
    UNPACKED,
    merged,
    pairwise,
)
from flashcore_cupy.cpu.reference import INPUT_KINDS
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.problem.attention_problem import DTYPES, Causal
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS, ROWS

_CAUSAL: tuple[Causal, ...] = (False, True, "top-left")
#: Beside the table's: padded, between the widths of loads, and apart from each other.
_MORE_DIMS = ((1, 1), (33, 33), (40, 40), (72, 72), (100, 100), (64, 32), (32, 96), (64, 256))
_STORED: tuple[Choice, ...] = ({}, {"stored": "fp32"}, {"stored": "added"}, {"dlse": True})
_SIZES: tuple[Choice, ...] = (
    {"heads": 4, "heads_kv": 2, "seqlen_q": 77, "seqlen_kv": 100},
    {"batch": 2, "heads": 2, "heads_kv": 2, "seqlen_q": 130, "seqlen_kv": 62},
    {"batch": 2, "heads": 4, "heads_kv": 1, "seqlen_q": 5, "seqlen_kv": 190},
)
_VIEWS: tuple[Choice, ...] = tuple({"view": view} for view in get_args(View))
_LAYOUTS: tuple[Choice, ...] = ({"layout": "bhsd"}, {"layout": "bshd"})
#: Dims of the cases in which rules meet.
_FEW_DIMS: tuple[Choice, ...] = tuple({"head_dim": n, "head_dim_v": n} for n in (33, 64, 128))
_PACKED: tuple[tuple[Choice, tuple[tuple[int, int], ...]], ...] = (
    ({"heads": 4, "heads_kv": 2}, ((0, 5), (77, 100), (130, 64), (1, 1), (33, 0), (0, 0))),
    ({"heads": 2, "heads_kv": 2}, ((1, 300), (1, 0), (65, 64), (0, 40), (128, 127))),
)
#: What is tried of rules with a gate.
_GATE_RULES: tuple[Choice, ...] = (
    {},
    {"causal": True},
    {"window": (33, 7)},
    {"softcap": 5.0},
    {"alibi": "bh"},
    {"bias": "1h1k"},
    {"score_mod": "table"},
    {"mask": "bhqk"},
    {"mask_mod": "thirds"},
    {"sink": True},
    {"dropout_p": 0.3},
)


def backward_cases() -> list[Case]:
    """Every case, for every kernel of the backward pass, in the same order each time."""
    return [case for kernel in reversed(tuple(BACKWARD_KERNELS)) for case in _cases_of(kernel)]


def _cases_of(kernel: str) -> Iterator[Case]:
    dtypes = [d for d in DTYPES if any(r.kernel == kernel and d in r.dtypes for r in ROWS)]
    yield from _head_dims(kernel, dtypes)
    yield from _shapes(kernel, dtypes)
    yield from _memory(kernel, dtypes)
    yield from _kinds(kernel, dtypes)
    yield from _alone(kernel)
    for dtype in dtypes:
        yield Case(
            *("backward repeat", kernel, dtype),
            heads=8, heads_kv=4, seqlen_q=300, seqlen_kv=300, repeats=10, seed=26,
        )  # fmt: skip
    yield from _in_any_order(kernel, dtypes)
    yield from _pairs(kernel, dtypes)
    if BACKWARD_KERNELS[kernel].takes_packed:
        yield from _packed_pairs(kernel, dtypes)
    yield from _gates(kernel, dtypes)


@functools.cache
def _configurable(case: Case) -> bool:
    try:
        configs_of(case, HOPPER)
    except ValueError:
        return False
    return True


def _taken(kernel: str, choices: Sequence[Choice], dtype: str = "float16") -> list[Choice]:
    """Those that the kernel has the gradients of."""
    return [choice for choice in choices if _configurable(Case("", kernel, dtype, **choice))]


def _dims(kernel: str, dtype: str) -> list[Choice]:
    """Every row's, and others that the kernel takes."""
    every = {row.dims for row in ROWS if row.kernel == kernel} | set(_MORE_DIMS)
    choices: list[Choice] = [{"head_dim": d, "head_dim_v": d_v} for d, d_v in sorted(every)]
    return _taken(kernel, choices, dtype)


def _few_dims(kernel: str) -> tuple[Choice, ...]:
    """Of the cases in which rules meet; a kernel of wide heads has its own."""
    own = dict.fromkeys(row.dims for row in ROWS if row.kernel == kernel)
    if min(own)[0] <= 128:
        return _FEW_DIMS
    return tuple({"head_dim": d, "head_dim_v": d_v} for d, d_v in own)


def _head_dims(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    causal = itertools.cycle(_CAUSAL)
    for dtype in dtypes:
        for dims in _dims(kernel, dtype):
            yield Case("backward head dim", kernel, dtype, **dims, causal=next(causal), seed=21)


def _shapes(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Lengths at, one below and one above the tiles of either side, one, and unequal."""
    lengths = [(1, 1), (1, 200), (200, 1), (200, 77), (77, 200), (300, 300)]
    row = next(row for row in ROWS if row.kernel == kernel and row.head_dim >= 64)
    sides = [(row.keys.block_n, row.keys.block_m), (row.queries.block_m, row.queries.block_n)]
    for m, n in dict.fromkeys(sides):
        lengths += [(m, n), (m - 1, n - 1), (m + 1, n + 1), (2 * m + 1, 2 * n - 1)]
    which = itertools.cycle(dtypes[:2])
    for (seqlen_q, seqlen_kv), causal in itertools.product(lengths, _CAUSAL):
        if causal == "top-left" and seqlen_q == seqlen_kv:
            continue  # the diagonal is the same
        yield Case(
            "backward shape", kernel, next(which), seqlen_q=seqlen_q, seqlen_kv=seqlen_kv,
            causal=causal, seed=22,
        )  # fmt: skip
    for heads, heads_kv, batch in ((8, 2, 2), (4, 1, 3)):
        sizes: Choice = {"batch": batch, "heads": heads, "heads_kv": heads_kv}
        yield Case("backward heads", kernel, **sizes, causal=True, seed=22)


def _memory(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Both layouts in every kind of view."""
    which = itertools.cycle(dtypes[:2])
    for view, layout in itertools.product(_taken(kernel, _VIEWS), _LAYOUTS):
        lies = view | layout
        yield Case("backward memory", kernel, next(which), batch=2, **lies, causal=True, seed=23)


def _kinds(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every kind of random input."""
    causal = itertools.cycle(_CAUSAL[:2])
    for kind, dtype in itertools.product(INPUT_KINDS, dtypes):
        yield Case(
            "backward inputs", kernel, dtype, kind=kind, seqlen_q=130, seqlen_kv=200,
            causal=next(causal), seed=24,
        )  # fmt: skip


def _alone(kernel: str) -> Iterator[Case]:
    """One gradient, so that kernels of the others are not launched, or store nothing."""
    rules: Choice = {"alibi": "h", "bias": "1hqk", "sink": True}
    names = ["alibi_slopes", "bias", "sink"]
    if not _configurable(Case("", kernel, **rules)):
        rules, names = {"sink": True}, ["sink"]
    for name in ("q", "k", "v", *names):
        yield Case("backward alone", kernel, only=name, **rules, seed=25)


def _in_any_order(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """What is computed otherwise where sums may come in any order: other kernels do it."""
    choices: tuple[Choice, ...] = (
        {"causal": True, "heads": 4},
        {"window": (33, 7), "stored": "fp32", "layout": "bshd"},
        {"softcap": 5.0, "stored": "added"},
        {"bias": "1h1k", "sink": True, "causal": "top-left"},
        {"causal": True, "dropout_p": 0.2},
        {"mask": "bhqk"},
        {"mask_mod": "blocks", "window": (33, 7)},
    )
    drawn = []
    for dims, dtype, choice in itertools.product(_few_dims(kernel), dtypes, choices):
        sizes = {"seqlen_q": 200, "seqlen_kv": 300, **dims}
        drawn.append(Case("backward any order", kernel, dtype, **sizes, **choice, seed=30))
    for dims, (heads, lengths) in itertools.product(_FEW_DIMS, _PACKED):
        case = Case("backward any order", kernel, **dims, **heads, causal=True, seed=30)
        drawn.append(packed(case, lengths))
    for case in filter(_configurable, drawn):
        free = replace(case, deterministic=False)
        if configs_of(free, HOPPER) != configs_of(case, HOPPER):
            yield free


def _pairs(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every two choices together."""
    chosen = pairwise(
        {
            "dtype": [{"dtype": dtype} for dtype in dtypes],
            "dims": _taken(kernel, _few_dims(kernel)),
            "size": _SIZES,
            "position": POSITIONS,
            "score": _taken(kernel, SCORES),
            "hide": _taken(kernel, HIDES),
            "sink": SINKS,
            "scale": SCALES,
            "view": _taken(kernel, _VIEWS),
            "layout": _LAYOUTS,
            "stored": _STORED,
        }
    )
    for row in chosen:
        case = Case("backward rules", kernel, **merged(row.values()), seed=27)
        plainer = replace(case, dtype=dtypes[0])
        yield next(filter(_configurable, (case, plainer, replace(plainer, dropout_p=0.0))))


def _packed_pairs(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """The same of packed batches, whose sequences may be empty on one side or on both."""
    names: tuple[View, ...] = ("contiguous", "strided", "misaligned", "transposed")
    views: list[Choice] = [{"view": name} for name in names]
    chosen = pairwise(
        {
            "dtype": [{"dtype": dtype} for dtype in dtypes],
            "dims": _taken(kernel, _FEW_DIMS),
            "lengths": _PACKED,
            "position": POSITIONS,
            "score": [choice for choice in SCORES if UNPACKED.isdisjoint(choice)],
            "hide": [choice for choice in HIDES if UNPACKED.isdisjoint(choice)],
            "sink": SINKS,
            "view": _taken(kernel, views),
            "boundaries": ({"boundaries": "host"}, {"boundaries": "device"}),
            "stored": _STORED,
        }
    )
    for row in chosen:
        heads, lengths = row.pop("lengths")
        rest = merged(row.values())
        case = packed(Case("backward packed", kernel, **rest | heads, seed=28), lengths)
        yield case if _configurable(case) else replace(case, dropout_p=0.0)


def _gates(kernel: str, dtypes: Sequence[str]) -> Iterator[Case]:
    """Every gate in every pass, with every rule."""
    chosen = pairwise(
        {
            "gate": ({"gate": "dp"}, {"gate": "ds"}),
            "pass": ({"only": "q"}, {"only": "k"}),
            "rule": _taken(kernel, _GATE_RULES),
            "size": _SIZES,
            "dtype": [{"dtype": dtype} for dtype in dtypes],
            "dims": [{"head_dim": n, "head_dim_v": n} for n in (64, 128)],
        }
    )
    for row in chosen:
        yield Case("backward gate", kernel, **merged(row.values()), seed=29)
    bias: Choice = {"bias": "1hqk", "only": "bias"}
    for gate in ("dp", "ds") if _configurable(Case("", kernel, **bias)) else ():
        yield Case("backward gate", kernel, gate=gate, **bias, causal=True, seed=29)
