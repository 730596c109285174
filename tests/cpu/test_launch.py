"""Between the problem and the launch: parameters, grids, memory, what is remembered of a call.

All of it is arithmetic, and needs no GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random as rnd
import re
import sys
import threading
from collections import OrderedDict
from dataclasses import replace
from itertools import count, takewhile
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases_launch import HERE, fixed
from cases_reference import repeatable
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

import flashcore_cupy
from flashcore_cupy.cuda import captures
from flashcore_cupy.cuda.driver import OverlappingLaunch
from flashcore_cupy.launch import launch_cache, workspace
from flashcore_cupy.launch.parameter_block import ParameterBlock
from flashcore_cupy.launch.plan import LoadedKernel, Step
from flashcore_cupy.problem.array_spec import span_of, spec_of
from flashcore_cupy.problem.attention_problem import (
    AttentionProblem,
    contiguous_problem,
    describe,
)
from flashcore_cupy.problem.blocks import ScoreShape
from flashcore_cupy.problem.mods import MAX_MOD_ARGS
from flashcore_cupy.problem.rule import BROADCAST_STRIDES, HEAD_STRIDES
from flashcore_cupy.problem.rules import RULE_BITS, RULES, describe_rules
from flashcore_cupy.select import grids, params, selector
from flashcore_cupy.select.config import Tile

KERNELS = ROOT / "kernels"

# --- structs --------------------------------------------------------------------------------------

NUMPY_TYPES = {
    "int": np.dtype("i4"),
    "float": np.dtype("f4"),
    "int64": np.dtype("i8"),
    "uint64": np.dtype("u8"),
    "Strides": params.STRIDES,
    "HeadStrides": HEAD_STRIDES,
    "BroadcastStrides": BROADCAST_STRIDES,
    "ModArgs": np.dtype(("u8", (MAX_MOD_ARGS,))),
}


def fields_of(struct: str, file: str) -> list[tuple[str, np.dtype]]:
    """Names and types of a C++ struct's fields, in order; pointers are addresses."""
    text = re.sub(r"//[^\n]*", "", (KERNELS / file).read_text())
    (body,) = re.findall(rf"struct {struct} \{{(.*?)\}};", text, re.DOTALL)
    found = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+\*?)\s+(.*)", declaration, re.DOTALL).groups()
        dtype = np.dtype("u8") if kind.endswith("*") else NUMPY_TYPES[kind]
        for name in names.split(","):
            plain, count = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name.strip()).groups()
            found.append((plain, np.dtype((dtype, (int(count),))) if count else dtype))
    return found


@pytest.mark.parametrize(
    ("struct", "file", "dtype"),
    [
        ("Strides", "flashcore/params.cuh", params.STRIDES),
        ("HeadStrides", "flashcore/params.cuh", HEAD_STRIDES),
        ("BroadcastStrides", "flashcore/params.cuh", BROADCAST_STRIDES),
        ("AttentionParams", "flashcore/params.cuh", params.ATTENTION_PARAMS),
        ("QuantizeTensor", "ladder/fp8_quantize.cu", params.QUANTIZE_PARAMS["tensor"].base),
    ],
)
def test_structs_are_the_kernels_field_by_field(struct: str, file: str, dtype: np.dtype) -> None:
    """The sizes alone are asserted when a kernel is compiled: two fields could be exchanged."""
    mine = [(name, dtype[name]) for name in dtype.names]
    assert mine == fields_of(struct, file)
    assert dtype.isalignedstruct or all(kind.itemsize == 8 for _, kind in mine)


def test_rule_bits_are_the_kernels() -> None:
    text = (KERNELS / "flashcore" / "rules" / "score.cuh").read_text()
    bits = {name.lower(): int(bit) for name, bit in re.findall(r"int RULE_(\w+) = (\d+);", text)}
    assert bits == RULE_BITS
    assert all(bit & (bit - 1) == 0 for bit in bits.values()), "one bit each"
    assert len(set(bits.values())) == len(bits)


def test_the_first_fields_are_those_that_a_repeated_call_writes() -> None:
    block = np.zeros((), params.ATTENTION_PARAMS)
    raw = bytearray(block.tobytes())
    launch_cache._ADDRESSES.pack_into(raw, 0, 1, 2, 3, 4, 5)
    launch_cache._WORKSPACE.pack_into(raw, launch_cache._WORKSPACE_OFFSET, 6, 7)
    written = np.frombuffer(bytes(raw), params.ATTENTION_PARAMS)[0]
    names = ("q", "k", "v", "o", "lse", "split_partials", "counters")
    assert [int(written[name]) for name in names] == [1, 2, 3, 4, 5, 6, 7]
    rest = [name for name in params.ATTENTION_PARAMS.names if name not in names]
    assert all(written[name].tobytes().strip(b"\0") == b"" for name in rest)


# --- what a problem fixes -------------------------------------------------------------------------


def test_parameters_of_rules() -> None:
    bias, slopes = np.zeros((2, 1, 200, 300), np.float32), np.zeros((2, 8), np.float32)
    mask = np.ones((8, 1, 300), bool)
    rules = describe_rules(
        ScoreShape(2, 8, 200, 300),
        "float16",
        window=(50, -1),
        softcap=8.0,
        alibi_slopes=spec_of(slopes),
        bias=spec_of(bias),
        mask=spec_of(mask),
    )
    problem = replace(contiguous_problem(2, 8, 200, 64, heads_kv=2, seqlen_kv=300), rules=rules)
    p = fixed(problem)
    assert p["alibi_strides"].tolist() == (8, 1)
    assert p["bias_strides"].tolist() == (60_000, 0, 300, 1)
    assert p["mask_strides"].tolist() == (0, 300, 0, 1)
    assert (p["softcap"], p["inverse_softcap"]) == (8, 0.125)
    assert (p["window_left"], p["window_right"]) == (50, 0)
    assert (p["causal_offset"], p["top_left"], p["seqlen_kv"]) == (100, 0, 300)
    assert (p["heads_q"], p["heads_kv"], p["batch"], p["seqlen_q"]) == (8, 2, 2, 200)
    assert p["lse_strides"].tolist() == (1600, 200)
    p = fixed(replace(problem, causal="top-left"))
    assert (p["causal_offset"], p["top_left"], p["window_right"]) == (0, 1, 0)
    assert p["seqlen_kv"] == 200, "keys that no query sees are not read"


def test_scales_come_after_the_maximum_only_if_they_keep_the_order() -> None:
    """fwd_sm80 takes maxima of raw scores; a scale that is not positive is a rule before them."""
    problem = contiguous_problem(1, 2, 200, 64)
    smallest = float(np.finfo(np.float32).tiny)
    for scale, first in (
        *((-0.3, True), (0.0, True), (1e-60, True), (1e-42, True), (smallest / 2, True)),
        *((smallest, False), (0.3, False), (1e30, False)),
    ):
        changed = replace(problem, softmax_scale=scale)
        found = selector.select(changed, HERE.arch, kernel="mma_sm80")
        assert ("scale_first" in found.config.rules) == first
        assert bool(found.config.defines()["FC_RULES"]) == first
        for kernel in ("mma_sm80", "scalar"):
            p = fixed(replace(problem, softmax_scale=scale), kernel=kernel)
            assert p["softmax_scale"] == np.float32(scale)
            assert p["scale_log2"] == pytest.approx(np.float32(scale) * math.log2(math.e))


# --- which keys, and how many ---------------------------------------------------------------------

ALIGNMENTS = st.sampled_from((False, True, "top-left"))
SIDES = st.integers(-1, 14)


@repeatable
@given(st.integers(0, 12), st.integers(0, 12), ALIGNMENTS, SIDES, SIDES)
def test_visible_pairs(seqlen_q: int, seqlen_kv: int, causal: Any, left: int, right: int) -> None:
    """What the problem says of causal masks and windows, against every pair looked at."""
    rules = describe_rules(ScoreShape(2, 3, seqlen_q, seqlen_kv), "float16", window=(left, right))
    problem = contiguous_problem(2, 3, seqlen_q, 8, seqlen_kv=seqlen_kv, head_dim_v=5)
    problem = replace(problem, causal=causal, rules=rules)
    offset = 0 if causal == "top-left" else seqlen_kv - seqlen_q
    i, j = np.arange(seqlen_q)[:, None] + offset, np.arange(seqlen_kv)[None, :]
    visible = np.ones((seqlen_q, seqlen_kv), bool)
    visible &= (j >= i - left) | (left < 0)
    visible &= (j <= i + right) | (right < 0)
    visible &= (j <= i) | (causal is False)
    assert problem.causal_offset == offset
    assert problem.flops == 2 * 2 * 3 * visible.sum() * (8 + 5)
    seen = np.flatnonzero(visible.any(0))
    last = int(seen[-1]) + 1 if seen.size else 0
    assert last <= problem.visible_kv <= seqlen_kv
    if visible.any(1).all() and seqlen_q:
        assert problem.visible_kv == last


# --- packed batches as blocks ---------------------------------------------------------------------


def packed_problem(
    lengths_q: list[int], lengths_k: list[int], heads: tuple[int, int] = (8, 2), **rules: Any
) -> AttentionProblem:
    q = np.empty((sum(lengths_q), heads[0], 64), np.float16)
    k = np.empty((sum(lengths_k), heads[1], 64), np.float16)
    return describe(q, k, k, sequences=len(lengths_q), **rules)


class PackedBatch:
    """``PackedBatch`` of work.cuh, for any values of cu_seqlens."""

    def __init__(self, cu_seqlens: list[int], total: int, rows_per_query: int, block_m: int):
        self.cu_seqlens, self.total = cu_seqlens, total
        self.sequences = len(cu_seqlens) - 1
        self.rows_per_query, self.block_m = rows_per_query, block_m

    def boundary(self, n: int) -> int:
        return min(max(self.cu_seqlens[n], 0), self.total)

    def start(self, piece: int) -> int:
        return 0 if piece == 0 else self.boundary(piece - 1)

    def length(self, piece: int) -> int:
        end = self.total if piece > self.sequences else self.boundary(piece)
        return max(end - self.start(piece), 0)

    def first_block(self, piece: int) -> int:
        return self.start(piece) * self.rows_per_query // self.block_m + piece

    def blocks(self, piece: int) -> int:
        return -(-self.length(piece) * self.rows_per_query // self.block_m)

    def find(self, block: int) -> int:
        first, count = 0, self.sequences + 2
        while count > 1:
            step = -(-count // 32)
            candidates = [
                lane * step < count and self.first_block(first + lane * step) <= block
                for lane in range(32)
            ]
            chosen = max(sum(candidates), 1) - 1
            first += chosen * step
            count = min(step, count - chosen * step)
        return first

    def place(self, block: int, heads: int) -> tuple[int, int]:
        """``find_work``: the piece of a block, and its number among the piece's, of all heads."""
        piece = self.find(block // heads)
        return piece, block - self.first_block(piece) * heads

    def rows(self, place: tuple[int, int], heads: int) -> tuple[int, range] | None:
        """Head, and rows of q (heads of a group apart) of a place; None if it has no work."""
        piece, index = place
        blocks = self.blocks(piece)
        if not 0 <= index < blocks * heads:
            return None
        head, nth = divmod(index, blocks)
        first, start = nth * self.block_m, self.start(piece) * self.rows_per_query
        rows = self.length(piece) * self.rows_per_query
        return head, range(start + first, start + min(first + self.block_m, rows))


class PackedOrder:
    """``PackedOrder`` of packed_batch.cuh."""

    def __init__(self, q: PackedBatch, kv: PackedBatch, heads: int, most: int, block_n: int):
        self.q, self.kv, self.heads, self.most, self.block_n = q, kv, heads, most, block_n
        self.level, self.next_level, self.group, self.before = 32, -2, 0, 0

    def level_of(self, piece: int) -> int:
        if piece >= self.q.sequences + 2 or self.q.length(piece) == 0:
            return -2
        is_sequence = 0 < piece <= self.q.sequences
        keys = self.kv.length(piece) if is_sequence else 0
        bits = 4 if self.q.sequences + 2 > 2048 else 1
        return -(-(-(-keys // self.block_n)).bit_length() // bits) - 1

    def find(self, index: int) -> tuple[int, int] | None:
        while self.level > -2:
            levels = [self.level_of(self.group + lane) for lane in range(32)]
            self.next_level = max([self.next_level, *(x for x in levels if x < self.level)])
            ends, end = [], self.before
            for lane, level in enumerate(levels):
                if level == self.level:
                    end = min(end + self.q.blocks(self.group + lane) * self.heads, self.most)
                ends.append(end)
            found = sum(end <= index for end in ends)
            if found < 32:
                begin = ends[found - 1] if found else self.before
                return self.group + found, index - begin
            self.before = end
            self.group += 32
            if self.group < self.q.sequences + 2:
                continue
            self.group, self.level, self.next_level = 0, self.next_level, -2
        return None


def lengths(seed: int) -> list[int]:
    """Many short ones, or few long ones; some empty."""
    random = rnd.Random(seed)
    many = random.choice((1, 2, 31, 32, 33, 200, 2100))
    longest = random.choice([n for n in (1, 3, 40, 700) if n * many <= 8000])
    return [random.choice((0, 1, random.randint(0, longest))) for _ in range(many)]


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_every_row_of_a_packed_batch_has_one_block(seed: int, block_m: int) -> None:
    """Piece n starts at block floor(first row / block_m) + n; rows of no sequence count, too."""
    seqlens = lengths(seed)
    before, behind = rnd.Random(seed).choice(((0, 0), (0, 0), (0, 77), (3, 0), (130, 1)))
    total = before + sum(seqlens) + behind
    for heads, group in (((8, 2), 1), ((8, 2), 4)):
        q = np.empty((total, heads[0], 64), np.float16)
        k = np.empty((9, heads[1], 64), np.float16)
        problem = describe(q, k, k, sequences=len(seqlens))
        chosen = selector.select(problem, HERE.arch, kernel="mma_sm80").config
        tile = replace(chosen.tile, block_m=block_m, pack_gqa=group > 1)
        blocks = grids.blocks_per_head(problem, replace(chosen, tile=tile))
        cu_seqlens = [before + sum(seqlens[:n]) for n in range(len(seqlens) + 1)]
        batch = PackedBatch(cu_seqlens, total, group, block_m)
        pieces = [before, *seqlens, behind]
        for piece, length in enumerate(pieces):
            assert batch.length(piece) == length
            enough = batch.first_block(piece) + -(-length * group // block_m)
            if piece + 1 < len(pieces):
                assert enough <= batch.first_block(piece + 1), "the next piece starts behind"
            assert enough <= blocks
        q_heads = heads[0] // group
        every = sorted((head, row) for head in range(q_heads) for row in range(total * group))
        worked = [batch.rows(batch.place(n, q_heads), q_heads) for n in range(blocks * q_heads)]
        assert covered(worked) == every
        assert blocks <= total * group // block_m + len(pieces)
        keys = PackedBatch([5 * n for n in cu_seqlens], 5 * total, 1, 1)
        order = PackedOrder(batch, keys, q_heads, blocks * q_heads, 128)
        places = list(takewhile(bool, map(order.find, count())))
        assert covered([batch.rows(place, q_heads) for place in places]) == every
        assert order.before == len(places), "no block is empty"
        levels = [order.level_of(piece) for piece, _ in places]
        assert levels == sorted(levels, reverse=True), "those with the most keys come first"


def covered(worked: list[tuple[int, range] | None]) -> list[tuple[int, int]]:
    """All rows of all heads that blocks work on."""
    return sorted((work[0], row) for work in worked if work is not None for row in work[1])


@pytest.mark.parametrize("total", [0, 1, 50])
def test_rows_of_a_packed_batch_without_sequences_have_a_block(total: int) -> None:
    batch = PackedBatch([0], total, 4, 16)
    worked = [batch.rows(batch.place(n, 2), 2) for n in range((total * 4 // 16 + 2) * 2)]
    assert covered(worked) == [(head, row) for head in (0, 1) for row in range(total * 4)]


@repeatable
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 60), min_size=2, max_size=70))
def test_no_boundary_leads_outside(cu_seqlens: list[int]) -> None:
    """On a GPU nobody checks them; what is computed then means nothing, but stays inside."""
    total, group, block_m, heads = 50, 4, 16, 2
    batch = PackedBatch(cu_seqlens, total, group, block_m)
    most = (total * group // block_m + len(cu_seqlens) + 1) * heads
    order = PackedOrder(batch, batch, heads, most, 8)
    for block in range(most + 3):
        for place in (batch.place(block, heads), order.find(block)):
            work = None if place is None else batch.rows(place, heads)
            assert work is None or 0 <= work[1].start < work[1].stop <= total * group
    assert order.find(most) is None and order.before <= most, "and every launch ends"


def test_the_header_has_this_arithmetic() -> None:
    folder = KERNELS / "flashcore" / "scheduler"
    text = "".join((folder / name).read_text() for name in ("packed_batch.cuh", "work.cuh"))
    text = " ".join(text.split())
    for line in (
        "int pieces() const { return sequences + 2; }",
        "return piece > 0 && piece <= sequences;",
        "return min(max(cu_seqlens[n], 0), total);",
        "return piece == 0 ? 0 : boundary(piece - 1);",
        "return max((piece > sequences ? total : boundary(piece)) - start(piece), 0);",
        "return first_block(piece, start(piece));",
        "return int(int64(start) * rows_per_query / block_m) + piece;",
        "return div_up(length(piece) * rows_per_query, block_m);",
        "int first = 0, count = pieces();",
        "const int step = div_up(count, WARP_SIZE);",
        "lane * step < count && first_block(first + lane * step) <= block;",
        "const int chosen = max(warp_count(candidate), 1) - 1;",
        "first += chosen * step;",
        "count = min(step, count - chosen * step);",
        "const int piece = q.find(which.block / heads);",
        "which.block - q.first_block(piece) * heads}",
        "if (place.index < 0 || place.index >= blocks * heads) return false;",
        "w.head = place.index / blocks; nth_block = place.index - w.head * blocks;",
        "w.first_row = nth_block * block_m;",
        "if (piece >= q.pieces() || q.length(piece) == 0) return NO_PIECE;",
        "const int bits = q.pieces() > MANY ? 4 : 1;",
        "tiles >>= bits) ++level;",
        "if (own < level) next_level = max(next_level, own);",
        "if (lane >= step) sum = min(sum + got, uint32(most));",
        "const int found = warp_count(end <= index);",
        "const int begin = found == 0 ? before : shfl(end, max(found - 1, 0));",
        "place = {group + found, index - begin};",
    ):
        assert line in text


def test_grids() -> None:
    plain = contiguous_problem(3, 8, 300, 64, heads_kv=2)
    few = contiguous_problem(3, 8, 3, 64, heads_kv=2)
    for problem, packed_heads in ((plain, False), (few, True)):
        chosen = selector.select(problem, HERE.arch, kernel="mma_sm80").config
        assert chosen.tile.pack_gqa == packed_heads
        heads, rows = (2, 3 * 4) if packed_heads else (8, 300)
        expected = 3 * heads * math.ceil(rows / chosen.tile.block_m)
        assert grids.query_blocks(problem, chosen) == expected
    problem = packed_problem([300, 0, 5], [7, 8, 9])
    chosen = selector.select(problem, HERE.arch, kernel="mma_sm80").config
    assert grids.query_blocks(problem, chosen) == 8 * (305 // chosen.tile.block_m + 3 + 2)


def splits(batch: int, seqlen_kv: int, registers: int = 128, **changes: Any) -> int:
    problem = replace(contiguous_problem(batch, 8, 1, 64, seqlen_kv=seqlen_kv), **changes)
    return int(fixed(problem, registers=registers)["splits"])


def test_keys_are_shared_out_until_the_gpu_is_full() -> None:
    counts = [splits(batch, 100_000) for batch in (1, 2, 4, 1000)]
    assert counts == sorted(counts, reverse=True) and counts[0] > 32 > counts[-1]
    counts = [splits(1, n) for n in (0, 1, 64, 1000, 4000, 16_000, 100_000)]
    assert counts == sorted(counts) and counts[:3] == [1, 1, 1]
    assert max(counts) <= grids._MOST_SPLITS
    assert splits(20, 8192, registers=255) <= splits(20, 8192, registers=32)
    assert fixed(contiguous_problem(1, 8, 1000, 64))["splits"] == 1, "queries enough"


@pytest.mark.parametrize("seqlen_kv", [1, 100, 1000, 5000])
def test_parts_of_the_keys_are_not_empty(seqlen_kv: int) -> None:
    problem = contiguous_problem(1, 8, 1, 64, seqlen_kv=seqlen_kv)
    tile = selector.select(problem, HERE.arch, kernel="mma_sm80").config.tile
    assert tile.split_kv and splits(1, seqlen_kv) <= math.ceil(seqlen_kv / tile.block_n)


def test_batch_invariant_keys_are_not_shared_out() -> None:
    """How many parts would fill the GPU is a matter of the batch."""
    assert splits(1, 100_000, batch_invariant=True) == 1


def test_blocks_that_run_side_by_side() -> None:
    problem = contiguous_problem(1, 8, 1000, 64)
    chosen = selector.select(problem, "sm_80", kernel="wmma_fused_64").config

    def side_by_side(registers: int, arch: str) -> int:
        entries = {"a": SimpleNamespace(registers=registers), "b": SimpleNamespace(registers=8)}
        kernel = LoadedKernel(chosen, SimpleNamespace(entries=entries), {})
        return kernel.blocks_per_multiprocessor(arch)

    assert chosen.threads == 256 and 32 * 1024 < chosen.smem_bytes < 80 * 1024
    assert side_by_side(255, "sm_90a") == 1, "255 registers are 256: one block of 256 threads"
    assert side_by_side(127, "sm_90a") == 2
    by_memory = 228 * 1024 // (chosen.smem_bytes + 1024)
    assert side_by_side(16, "sm_90a") == by_memory > side_by_side(16, "sm_89") >= 1


# --- batch_invariant ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_dim", [32, 64, 100, 128, 256])
@pytest.mark.parametrize("seqlen_q", [1, 5, 100, 3000])
def test_batch_invariant_tiles_do_not_look_at_the_batch(
    seqlen_q: int, head_dim: int, dtype: str
) -> None:
    def tile(problem: AttentionProblem) -> Tile:
        return selector.select(replace(problem, batch_invariant=True), HERE.arch).config.tile

    alone = contiguous_problem(1, 8, seqlen_q, head_dim, heads_kv=2, dtype=dtype)
    chosen = tile(alone)
    for batch in (2, 7, 500):
        many = contiguous_problem(batch, 8, seqlen_q, head_dim, heads_kv=2, dtype=dtype)
        assert tile(many) == chosen
        packed = [np.empty((batch * seqlen_q, heads, head_dim), dtype) for heads in (8, 2, 2)]
        assert tile(describe(*packed, sequences=batch)) == chosen


def test_tiles_look_at_the_batch_otherwise() -> None:
    found = {
        selector.select(contiguous_problem(batch, 8, 300, 64), HERE.arch).config.tile
        for batch in (1, 100)
    }
    assert len(found) == 2


# --- what a repeated call knows -------------------------------------------------------------------


class _Data(NamedTuple):
    ptr: int
    device_id: int = 0


def _looked_at(x: np.ndarray[Any, Any]) -> dict[str, Any]:
    contiguous = x.flags.c_contiguous
    return {"shape": x.shape, "strides": x.strides, "dtype": x.dtype, "_c_contiguous": contiguous}


class _Array(SimpleNamespace):
    """A CuPy array, as far as a repeated call looks at it."""

    @classmethod
    def like(cls, x: Any, address: int = 0, device: int = 0) -> _Array:
        return cls(**_looked_at(x), data=_Data(address, device))


def plan_of(*operands: Any) -> Any:
    """The plan of a call on q, k, v, o, as far as a repeated call looks at it."""
    step = Step(0, 1, 32, 0, ParameterBlock(np.zeros((), params.ATTENTION_PARAMS)))
    problem = SimpleNamespace(output_shape=operands[3].shape, lse_shape=(), gate=None)
    arrays = dict(zip("qkvo", map(_Array.like, operands), strict=True))
    return SimpleNamespace(
        problem=problem, steps=(step,), arrays=arrays, views=(), workspace_bytes=(0, 0)
    )


def known_of(q: Any, k: Any, v: Any, o: Any) -> launch_cache._KnownCall:
    """What a repeated call knows of arrays, as far as their places."""
    return launch_cache._KnownCall(plan_of(q, k, v, o))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What repeated calls hand to the driver, which is not there; nothing is remembered yet."""
    calls: list[tuple[Any, ...]] = []
    fakes = {
        "_known": {},
        "_ndarray": _Array,
        "_empty": lambda shape, dtype: _Array.like(np.empty(shape, dtype), 2**30),
        "_current_device": lambda: 0,
        "_set_device": lambda device: None,
        "_current_stream": lambda: SimpleNamespace(ptr=7),
        "_is_captured": lambda stream: False,
        "_launch_kernel": lambda *arguments: calls.append(arguments),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(launch_cache, name, fake)
    for variable in ("FLASHCORE_KERNELS_DIR", "FLASHCORE_ARCH"):
        monkeypatch.delenv(variable, raising=False)
    return calls


class _Unhashable(float):
    __hash__ = None  # type: ignore[assignment]


def choices_of(
    softmax_scale: Any = 0.5,
    causal: Any = True,
    window: Any = launch_cache.NO_WINDOW,
    softcap: Any = 0.0,
) -> tuple[Any, ...]:
    """What ``attention`` keys a call on, besides its arrays."""
    return (
        *(window, "bhsd", "auto", causal, type(causal), softcap, type(softcap)),
        *(softmax_scale, type(softmax_scale), False, bool),
    )


class _Mutable:
    """A number that can be hashed, and be another one tomorrow: a tensor without axes."""


@pytest.mark.parametrize(
    ("changes", "remembered"),
    [
        ({}, True),
        ({"window": (20, 5)}, True),
        ({"window": [20, 5]}, False),
        ({"softcap": _Unhashable(30.0)}, False),
        ({"softmax_scale": _Unhashable(0.5)}, False),
        ({"softmax_scale": None}, True),
        ({"softmax_scale": np.float32(0.5), "causal": np.True_}, True),
        ({"softmax_scale": _Mutable()}, False),
        ({"window": (_Mutable(), 5)}, False),
    ],
)
def test_what_cannot_key_a_call_is_launched_but_not_remembered(
    launched: list[tuple[Any, ...]], changes: dict[str, Any], remembered: bool
) -> None:
    """``remember`` runs after the launch: whatever it raises comes too late."""
    choices = choices_of(**changes)
    plan = plan_of(*[np.empty((1, 2, 3, 8), np.float16)] * 4)
    q, k, v = (plan.arrays[name] for name in "qkv")
    assert launch_cache.launch_again(q, k, v, None, False, choices) is None
    launch_cache.remember(plan, choices, out_given=False)
    assert len(launch_cache._known) == remembered
    result = launch_cache.launch_again(q, k, v, None, False, choices)
    assert (result is not None) == (len(launched) == 1) == remembered


def test_addresses_are_looked_at_only_where_they_are_new(
    launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output must not meet an input, and all be on the current device."""
    plan = plan_of(*[np.empty((1, 2, 3, 8), np.float16)] * 4)
    choices = choices_of()
    launch_cache.remember(plan, choices, out_given=True)
    looked: list[tuple[int, ...]] = []
    overlaps = launch_cache._KnownCall.overlaps
    monkeypatch.setattr(
        launch_cache._KnownCall,
        "overlaps",
        lambda self, *at: looked.append(at) or overlaps(self, *at),
    )

    def call(*addresses: int, device_of_v: int = 0) -> Any:
        x = np.empty((1, 2, 3, 8), np.float16)
        devices = (0, 0, device_of_v, 0)
        q, k, v, o = (_Array.like(x, *at) for at in zip(addresses, devices, strict=True))
        return launch_cache.launch_again(q, k, v, o, False, choices)

    here, there = (0, 512, 1024, 1536), (0, 512, 1024, 2048)
    for place in (here, here, there, there, here):
        assert call(*place) is not None
    assert looked == [here, there, here] and len(launched) == 5
    assert call(0, 512, 1024, 1040) is None, "o meets v"
    assert call(0, 512, 4096, 1536, device_of_v=1) is None
    assert len(launched) == 5
    assert call(*here) is not None


def test_a_repeated_call_overlaps_if_its_kernel_does(launched: list[tuple[Any, ...]]) -> None:
    plan, choices = plan_of(*[np.empty((1, 2, 3, 8), np.float16)] * 4), choices_of()
    enqueued: list[tuple[int, int]] = []
    overlapping: Any = lambda stream, address: enqueued.append((stream, address))  # noqa: E731
    plan.steps = tuple(replace(step, overlapping=overlapping) for step in plan.steps)
    launch_cache.remember(plan, choices, out_given=False)
    q, k, v = (plan.arrays[name] for name in "qkv")
    assert launch_cache.launch_again(q, k, v, None, False, choices) is not None
    assert [stream for stream, _ in enqueued] == [7] and not launched


def test_an_overlapping_launch_has_one_configuration_per_stream() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    launch, seen, answer = OverlappingLaunch(0x1000, 24, 256, 65536), [], [0]
    launch._launch = lambda config, *rest: seen.append((config, *rest)) or tuple(answer)
    for stream in (7, 0, 7):
        launch(stream, 4096)
    configs = [config for config, *_ in seen]
    assert configs[0] is configs[2] is not configs[1]
    assert [int(config.hStream) for config in configs] == [7, 0, 7]
    assert {int(function) for _, function, *_ in seen} == {0x1000}
    assert {(params, extra) for *_, params, extra in seen} == {(4096, 0)}
    config = configs[0]
    sizes = ("gridDim", "blockDim")
    shape = [getattr(config, size + axis) for size in sizes for axis in "XYZ"]
    assert [*shape, config.sharedMemBytes] == [24, 1, 1, 256, 1, 1, 65536]
    (attribute,) = config.attrs
    ids = driver.CUlaunchAttributeID
    assert attribute.id == ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert attribute.value.programmaticStreamSerializationAllowed == 1
    for stream in range(100):
        launch(stream, 4096)
    assert len(launch._configs) <= 64
    answer[0] = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match=r"a launch: the driver answers .*INVALID_VALUE"):
        launch(7, 4096)


@repeatable
@given(st.lists(st.integers(0, 60), min_size=4, max_size=4), st.booleans(), st.integers(1, 3))
def test_overlaps_of_spans(places: list[int], backwards: bool, rows: int) -> None:
    """True exactly where the output's first to last byte meets an input's."""
    step = -1 if backwards else 1
    shapes = ((rows, 4), (2, 3), (1, 5), (rows, 2))
    arrays = [np.zeros(shape, np.float16)[::step] for shape in shapes]
    got = known_of(*arrays).overlaps(*places)
    taken = [set(range(*span_of(x, place))) for x, place in zip(arrays, places, strict=True)]
    assert got == any(taken[3] & span for span in taken[:3])


def test_spans_reach_from_the_first_byte_to_the_last() -> None:
    x = np.zeros((4, 5), np.float32)
    assert span_of(x, 100) == (100, 180)
    assert span_of(x[:, ::2], 100) == (100, 180)
    assert span_of(x[::-1], 160) == (100, 180)
    assert span_of(x[1:3, 1:2], 0) == (0, 24)
    assert span_of(x[:0], 100) == (100, 100)


def test_keys_of_repeated_calls_tell_arguments_apart() -> None:
    """1 and True are equal and hash alike, but are not the same argument."""

    def key(
        scale: Any = 1.0, causal: Any = True, address: int = 256, device: int = 0, **of_q: Any
    ) -> Any:
        x = SimpleNamespace(**_looked_at(np.empty((1, 2, 3, 4), np.float16)))
        q = SimpleNamespace(**{**vars(x), **of_q})
        choices = choices_of(scale, causal, (-1, -1))
        return launch_cache._key(q, x, x, None, address, False, device, choices)

    assert key() == key() == key(address=256 + 16)
    others = [
        key(scale=True),
        key(scale=1),
        key(causal=1),
        key(causal=False),
        key(address=258),
        key(device=1),
        key(shape=(1, 2, 4, 3)),
        key(_c_contiguous=False),
        key(_c_contiguous=False, strides=(48, 24, 8, 4)),
        key(dtype=np.dtype(np.int16)),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_parts_of_the_keys_on_hopper() -> None:
    """As split_combine.cuh lays them out; the first counter is of the blocks that are claimed."""
    problem = contiguous_problem(1, 32, 1, 128, heads_kv=8, seqlen_kv=65536)
    chosen = selector.select(problem, "sm_90a").config
    assert chosen.kernel == "wgmma_sm90" and chosen.tile.split_kv and chosen.tile.cluster == 1
    rows = chosen.tile.block_m
    assert chosen.workspace_bytes(8, 4, 132) == (8 * 4 * rows * (128 + 2) * 4, 4 * (1 + 8))
    assert chosen.workspace_bytes(133, 1, 132) == (0, 4), "blocks are taken from a counter"
    assert chosen.workspace_bytes(132, 1, 132) == (0, 0), "each has one"
    text = (KERNELS / "flashcore" / "output" / "split_combine.cuh").read_text()
    assert "FLOATS = ROWS * (COLS + 2)" in text and "counters_of(params).arrivals[block]" in text
    assert "struct WorkCounters {\n    int claimed;\n    int arrivals[1];" in re.sub(
        r" *//.*", "", (KERNELS / "flashcore" / "params.cuh").read_text()
    )
    for seqlen_kv in (0, 1, 128, 129, 5000, 100_000):
        one = replace(contiguous_problem(1, 32, 1, 128, heads_kv=8, seqlen_kv=seqlen_kv))
        parts = chosen.splits(one, 132)
        assert 1 <= parts <= max(1, math.ceil(seqlen_kv / chosen.tile.block_n))
    assert chosen.splits(problem, 132) == 16, "one round; of equals the most"
    many = contiguous_problem(128, 32, 1, 128, heads_kv=8, seqlen_kv=8192)
    assert chosen.splits(many, 132) == 1


@pytest.mark.parametrize(
    ("batch", "heads_kv", "keys", "cluster"),
    [
        *((1, 8, 1, 8), (1, 8, 24_576, 8), (1, 8, 24_577, 1), (8, 1, 24_576, 8), (2, 8, 1000, 4)),
        *((3, 3, 1000, 4), (4, 8, 6144, 2), (4, 8, 6145, 1), (8, 8, 3072, 2), (5, 13, 1000, 1)),
    ],
)
def test_clusters_share_out_the_keys_of_a_few_heads(
    batch: int, heads_kv: int, keys: int, cluster: int
) -> None:
    problem = contiguous_problem(batch, 4 * heads_kv, 1, 128, heads_kv=heads_kv, seqlen_kv=keys)
    chosen = selector.select(problem, "sm_90a").config
    assert chosen.kernel == "wgmma_sm90" and chosen.tile.cluster == cluster
    if cluster > 1:
        assert chosen.splits(problem, 132) == cluster
        invariant = selector.select(replace(problem, batch_invariant=True), "sm_90a").config
        assert invariant.tile.cluster == 1, "which would depend on the batch"


@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [(128, {"num_stages": 1}), (128, {"block_n": 32}), (256, {"num_stages": 2})],
)
def test_tiles_whose_partials_do_not_fit_over_k_have_no_cluster(
    head_dim: int, changes: dict[str, int]
) -> None:
    problem = contiguous_problem(1, 32, 1, head_dim, heads_kv=8, seqlen_kv=1024)
    chosen = selector.select(problem, "sm_90a", kernel="wgmma_sm90", overrides=changes).config
    assert chosen.tile.split_kv and chosen.tile.cluster == 1
    with pytest.raises(ValueError, match="cluster=8: partials do not fit"):
        selector.select(problem, "sm_90a", kernel="wgmma_sm90", overrides=changes | {"cluster": 8})


# --- workspaces -----------------------------------------------------------------------------------


class FakeCuPy:
    """As much of CuPy as workspaces take; arrays are NumPy's."""

    uint8 = np.uint8

    def __init__(self) -> None:
        self.stream = SimpleNamespace(ptr=7)
        self.device = SimpleNamespace(id=0)
        runtime = SimpleNamespace(getDevice=lambda: self.device.id, streamPerThread=2)
        self.cuda = SimpleNamespace(get_current_stream=lambda: self.stream, runtime=runtime)

    @staticmethod
    def empty(size: int, dtype: Any) -> np.ndarray:
        return np.full(size, 255, dtype)

    @staticmethod
    def zeros(size: int, dtype: Any) -> np.ndarray:
        return np.zeros(size, dtype)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCuPy:
    fake = FakeCuPy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(workspace, "_areas", OrderedDict())
    return fake


def test_a_stream_keeps_its_workspace_until_it_is_too_small(cupy: FakeCuPy) -> None:
    first = workspace.workspace(5000, 100)
    assert first.partials_array.nbytes == 8192 and first.counter_array.nbytes == 4096
    assert not first.counter_array.any(), "counters are 0 between launches"
    assert workspace.workspace(8192, 4096) is first and workspace.workspace(1, 1) is first
    wider = workspace.workspace(8193, 1)
    assert wider is not first and wider.partials_array.nbytes == 16384
    longer = workspace.workspace(8193, 5000)
    assert longer.counter_array.nbytes == 8192 and longer.holds(8193, 5000)
    assert workspace.workspace(16384, 8192) is longer
    assert not longer.holds(16385, 1) and not longer.holds(1, 8193)


def test_streams_devices_and_threads_share_no_workspace(cupy: FakeCuPy) -> None:
    areas = [workspace.workspace(1, 1)]
    cupy.stream.ptr = 8
    areas.append(workspace.workspace(1, 1))
    cupy.device.id = 1
    areas.append(workspace.workspace(1, 1))
    cupy.stream.ptr = 2  # each thread's own default stream
    areas.append(workspace.workspace(1, 1))
    thread = threading.Thread(target=lambda: areas.append(workspace.workspace(1, 1)))
    thread.start()
    thread.join()
    assert len({id(area) for area in areas}) == 5
    assert workspace.workspace(1, 1) is areas[3]


def test_a_captured_call_has_a_workspace_of_its_own(
    cupy: FakeCuPy, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = workspace.workspace(5000, 100)
    monkeypatch.setattr(captures, "is_active", lambda: True)
    monkeypatch.setattr(captures, "beside", contextlib.nullcontext)
    captured = [workspace.workspace(5000, 100) for _ in range(2)]
    assert len({id(usual), *map(id, captured)}) == 3
    assert captured[0].partials_array.nbytes == 5000 and not captured[0].counter_array.any()
    monkeypatch.setattr(captures, "is_active", lambda: False)
    assert workspace.workspace(5000, 100) is usual


def test_workspaces_of_streams_that_are_gone_are_given_back(cupy: FakeCuPy) -> None:
    first = workspace.workspace(1, 1)
    for stream in range(100, 100 + workspace._MOST_AREAS - 1):
        cupy.stream.ptr = stream
        workspace.workspace(1, 1)
    cupy.stream.ptr = 7
    assert workspace.workspace(1, 1) is first, "as many streams as are remembered"
    for stream in range(200, 200 + workspace._MOST_AREAS):
        cupy.stream.ptr = stream
        workspace.workspace(1, 1)
    assert len(workspace._areas) == workspace._MOST_AREAS
    cupy.stream.ptr = 7
    assert workspace.workspace(1, 1) is not first


def test_workspaces_hold_what_warps_leave_in_them() -> None:
    """``WarpRows::VALUES`` floats per lane, warp and part; a counter per block of rows."""
    text = (KERNELS / "flashcore" / "softmax" / "warp_rows.cuh").read_text()
    assert "VALUES_OF_ROW = 2 + TILES_D * 2;" in text
    assert "VALUES = FRAGMENTS_M * 2 * VALUES_OF_ROW;" in text
    problem = contiguous_problem(1, 8, 1, 64, seqlen_kv=10_000)
    chosen = selector.select(problem, HERE.arch, kernel="mma_sm80").config
    tile = replace(chosen.tile, block_m=64, warps_m=2, warps_n=2)
    fragments_m, tiles_d = 64 // 2 // 16, 128 // 8
    values = fragments_m * 2 * (2 + tiles_d * 2)
    partial, arrivals = replace(chosen, tile=tile, head_dim_v=128).workspace_bytes(10, 3, 2**31 - 1)
    assert (partial, arrivals) == (10 * 3 * 2 * values * 32 * 4, 10 * 4)


def test_no_rule_is_forgotten_by_the_launch_cache() -> None:
    """A value is part of a call's key; an array or a formula is known to ``ruled_cache``."""
    module = sys.modules["flashcore_cupy.attention"]
    text = inspect.getsource(flashcore_cupy.attention)
    choices, plain = (
        re.search(rf"{begin}(.*?)\)[:]?  # fmt", text, re.S)
        for begin in (r"choices = \(", r"if \(\n +alibi_slopes")
    )
    assert choices is not None and plain is not None
    arrays = [rule.name for rule in RULES if rule.takes != "value"]
    for name in (rule.name for rule in RULES if rule.takes == "value"):
        assert re.search(rf"\b{name}\b", choices[1]), name
    for name in (*arrays, "rng", "mod_args", "cu_seqlens_q", "cu_seqlens_k"):
        assert name == "alibi_slopes" or f"{name} is None" in plain[1], name
        assert name in module._KNOWN_RULES, name
