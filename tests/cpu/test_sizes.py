"""What kernels count in 32 bits: it fits, or a call is refused before anything is built."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases_reference import repeatable
from hypothesis import given
from hypothesis import strategies as st

from flashcore_cupy.launch.plan import LoadedKernel, Place, _fixed_params
from flashcore_cupy.problem import rules
from flashcore_cupy.problem.attention_problem import (
    MAX_SEQLEN,
    AttentionProblem,
    contiguous_problem,
    describe,
    operand,
)
from flashcore_cupy.problem.rules import Rules
from flashcore_cupy.select import grids, registry, selector
from flashcore_cupy.select.config import KernelConfig
from flashcore_cupy.select.sm90 import Sm90

HERE = Place(device=0, arch="sm_90a", multiprocessors=132, sources=None)
INT = 2**31
LENGTHS = (0, 1, 2, 63, 64, 65, 1000, 2**16, 2**24, MAX_SEQLEN - 1, MAX_SEQLEN)
COUNTS = (1, 2, 3, 8, 2**10, 2**20, 2**26, 2**28, INT - 1, INT, 2**40)
WINDOWS = (-1, 0, 1, 2**20, rules.UNBOUNDED_WINDOW - 1)


def config_of(problem: AttentionProblem, kernel: str = "auto") -> KernelConfig:
    return selector.select(problem, HERE.arch, kernel=kernel).config


def fixed(problem: AttentionProblem, config: KernelConfig) -> Any:
    """The parameters of a problem, without addresses."""
    built: Any = SimpleNamespace(entries={"fwd": SimpleNamespace(registers=128)})
    o = replace(problem.q, name="o")
    return _fixed_params(problem, LoadedKernel(config, built, {}), o, HERE)


def largest_numbers(problem: AttentionProblem, config: KernelConfig, p: Any) -> dict[str, int]:
    """What the kernels form in 32 bits, at its largest and its smallest."""
    tile = config.tile
    n = {name: int(p[name]) for name in p.dtype.names if p[name].dtype == np.int32}
    group = n["group"] if tile.pack_gqa else 1
    heads = (1 if problem.packed else n["batch"]) * (n["heads_q"] // group)
    blocks = heads * n["m_blocks"] * n["splits"]
    last_query = n["seqlen_q"] + tile.block_m
    found = {
        "batch * heads": heads,
        "batch * heads * m_blocks * parts": blocks,
        "gridDim.x + blocks": HERE.multiprocessors * isinstance(config, Sm90) + blocks,
        "section * m_blocks": n["section"] * n["m_blocks"],
        "(first block + 1) * block_m": n["m_blocks"] * tile.block_m,
        "seqlen_q * group": n["seqlen_q"] * group,
        "end of the last tile of keys": n["seqlen_kv"] + 2 * tile.block_n,
        "lane * step of 32 pieces": n["batch"] + 64 if problem.packed else 0,
        "gate_tiles": n["gate_tiles"],
    }
    # Of a packed batch any sequence may be as long as all.
    diagonals = [n["causal_offset"]]
    if problem.packed:
        diagonals = [0] if n["top_left"] else [-n["seqlen_q"], n["seqlen_kv"]]
    for d in diagonals:
        # Packed: a sequence's own positions end where its keys do.
        last = last_query + d if d <= 0 or not problem.packed else n["seqlen_kv"] + tile.block_m
        found |= {
            f"diagonal {d} + window_right": d + n["window_right"],
            f"diagonal {d} - window_left": d - n["window_left"],
            f"diagonal {d}, row_end": last + n["window_right"] + 1,
            f"diagonal {d}, position - key": d - n["seqlen_kv"],
        }
    return found


@st.composite
def problems(draw: Any) -> AttentionProblem:
    lengths, counts = st.sampled_from(LENGTHS), st.sampled_from(COUNTS)
    heads_kv, group = draw(counts), draw(st.sampled_from((1, 2, 8, 64)))
    window = draw(st.sampled_from(WINDOWS)), draw(st.sampled_from(WINDOWS))
    packed = draw(st.booleans())
    plain = contiguous_problem(
        *(1 if packed else draw(counts), heads_kv * group, draw(lengths), 64),
        heads_kv=heads_kv,
        seqlen_kv=draw(lengths),
        causal=draw(st.sampled_from((False, True, "top-left"))),
    )
    sequences = draw(st.sampled_from((0, *COUNTS))) if packed else None
    # Elements between rows are 64 bits wide anyway, and those of such sizes would not be.
    views = {name: replace(getattr(plain, name), strides=(0, 0, 64)) for name in "qkv"}
    return replace(plain, **views, rules=Rules(window=window), sequences=sequences)


@repeatable
@given(problems(), st.sampled_from(("auto", *registry.KERNELS)))
def test_what_is_accepted_fits(problem: AttentionProblem, kernel: str) -> None:
    try:
        config = config_of(problem, kernel)
        grids.check_sizes(problem, config)
    except ValueError:
        return
    found = largest_numbers(problem, config, fixed(problem, config))
    wrong = {name: n for name, n in found.items() if not -INT <= n < INT}
    assert not wrong


@pytest.mark.parametrize("kernel", registry.KERNELS)
def test_sizes_that_are_met_are_accepted(kernel: str) -> None:
    for sizes in ((1, 1, 1), (1024, 128, 2048), (1, 8, 2**20), (2**20, 8, 1), (4, 8, 0), (0, 8, 5)):
        problem = contiguous_problem(*sizes, 64)
        grids.check_sizes(problem, config_of(problem, kernel))


@pytest.mark.parametrize(
    ("kernel", "batch", "heads", "queries", "keys", "what"),
    [
        ("auto", INT, 8, 0, 1, "heads in all"),
        ("auto", 2**20, 2**11, 0, 0, "heads in all"),
        ("scalar", 2**20, 2**11, 1, 1, "heads in all"),
        ("scalar", 2**20, 2**10, 17, 1, "thread blocks"),
        ("mma_sm80", 2**20, 2**10, 1000, 1000, "thread blocks"),
        ("wgmma_sm90", 2**20, 2**10, 1000, 1000, "thread blocks"),
        ("wmma_unfused", 2**10, 2**10, 2**10, 2**16, "thread blocks"),
        ("fp8_wmma", 2**20, 2**10, 1, 1, "thread blocks"),
    ],
)
def test_what_does_not_fit_is_refused(
    kernel: str, batch: int, heads: int, queries: int, keys: int, what: str
) -> None:
    problem = contiguous_problem(batch, heads, queries, 64, seqlen_kv=keys)
    with pytest.raises(ValueError, match=f"^q: got .* {what}.*split the batch"):
        grids.check_sizes(problem, config_of(problem, kernel))


def test_rows_of_packed_heads_and_of_many_sequences_are_counted() -> None:
    grouped = contiguous_problem(1, 16, MAX_SEQLEN, 64, heads_kv=1)
    config = config_of(replace(grouped, sequences=MAX_SEQLEN), "mma_sm80")
    assert config.tile.pack_gqa
    with pytest.raises(ValueError, match="rows of a head"):
        grids.check_sizes(replace(grouped, sequences=1), config)
    many = replace(contiguous_problem(1, 8, 100, 64), sequences=2**31 - 2)
    with pytest.raises(ValueError, match=r"\(B, Hq, total\) = .* rows of a head"):
        grids.check_sizes(many, config_of(many))


@pytest.mark.parametrize(
    ("queries", "causal", "head_dim"), [(16384, True, 128), (24576, True, 64), (16384, False, 128)]
)
@pytest.mark.parametrize("keys", [0, 1, 100_000])
def test_a_section_has_no_more_heads_than_there_are(
    queries: int, causal: bool, head_dim: int, keys: int
) -> None:
    """Of keys that take no room there would be 2^32 / blocks, and the scheduler divided by 0."""
    problem = contiguous_problem(1, 8, queries, head_dim, seqlen_kv=keys, causal=causal)
    config = config_of(problem, "wgmma_sm90")
    assert 1 <= config.section(problem, HERE.multiprocessors) <= 8


def test_keys_are_split_as_far_as_the_grid_allows() -> None:
    problem = contiguous_problem(1, 8, 1, 64, seqlen_kv=100_000)
    config = config_of(problem, "mma_sm80")
    resident = 2**40  # all blocks would run at once, so the more parts the better
    assert config.splits(problem, resident) > 64
    for batch in (2**20, 2**24, 2**27, 2**28 - 2**14):
        many = contiguous_problem(batch, 8, 1, 64, seqlen_kv=100_000)
        parts = config.splits(many, resident)
        assert parts >= 1 and parts * grids.query_blocks(many, config) <= grids.MAX_BLOCKS


# ---- arrays --------------------------------------------------------------------------------------


def broadcast(*shape: int) -> np.ndarray:
    return np.broadcast_to(np.zeros((1,) * len(shape), np.float16), shape)


@pytest.mark.parametrize("length", [MAX_SEQLEN + 1, 2**30, INT - 1, INT])
@pytest.mark.parametrize("name", ["q", "k"])
def test_longer_sequences_are_refused(name: str, length: int) -> None:
    sizes = {"q": 5, "k": 7} | {name: length}
    q, k = (broadcast(1, 2, sizes[n], 64) for n in "qk")
    with pytest.raises(ValueError, match=f"^{name}: got sequence length {length}; at most"):
        describe(q, k, k)
    packed = [broadcast(sizes[n], 2, 64) for n in "qk"]
    with pytest.raises(ValueError, match=f"^{name}: got sequence length {length}; at most"):
        describe(*packed, packed[1], sequences=2)


@pytest.mark.parametrize("shape", [(2**31, 8, 0, 64), (2**20, 8, 1, 64), (1, 2**31, 0, 64)])
def test_strides_of_broadcast_and_of_empty_arrays(shape: tuple[int, ...]) -> None:
    x = np.empty(shape, np.float16) if 0 in shape else broadcast(*shape)
    problem = describe(x, x, x)
    config = config_of(problem)
    if problem.batch * problem.heads_q > grids.MAX_BLOCKS:
        with pytest.raises(ValueError, match="heads in all"):
            grids.check_sizes(problem, config)
    else:
        grids.check_sizes(problem, config)
        assert fixed(problem, config)["q_strides"].tolist() == operand("q", x, "bhsd").strides
