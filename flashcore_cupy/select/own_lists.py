"""Calls that ask their mask_mod ahead: which do, and what their kernels get to see.

A rule that hides keys may be asked by the kernel, for every score of every head. Or a launch ahead
asks it, once for all heads and batches that it does not tell apart, and lists the blocks in which
it hides nothing, or a part; then the kernel walks over the lists, as it does over those of a block
mask that is passed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from flashcore_cupy.problem.attention_problem import ITEMSIZE, AttentionProblem
from flashcore_cupy.problem.listed_blocks import BlockLists, blocks_of
from flashcore_cupy.select.config import KernelConfig

#: Queries and keys of a block: what the figures below are of.
BLOCK = (128, 128)

# By what one NVIDIA H200 took for 2 x 8192 tokens of float16 and 2048 columns over all heads, us at
# D=64 / D=128, with 64 and with 32 heads in all, which shared their lists:
#
#                                 lists made before   mask_mod alone   making the lists
#   causal                        1599 / 1080         2863 / 1914      170 to 180
#   causal documents of 1000       821 /  854         2040 / 1361      245
#   prefix of 2048                1626 / 1103         3121 / 2263      160 to 170
#   window of 1024                 936 /  859         2004 / 1244      170 to 180
#
# So lists save 12 to 36 us a head, and making them takes what 5 to 16 heads save. (What is near 850
# us may have been the host's time, so the most is rather less.) A mask that leaves each block mixed
# saves nothing, but the sizes do not tell.
_LEAST_HEADS = 16
"""Scores that the kernel would ask for, for each that the launch ahead asks for."""
# A thread block makes a list of 128 queries, and walks over all keys. In the table 64 of them ran
# side by side, which no GPU is filled by. With fewer queries there are fewer, but none is done
# sooner: so the queries of all heads count, and in the table 16 heads have as many as these.
_LEAST_QUERIES = _LEAST_HEADS * 8192
# 12 to 36 us for 8192 x 8192 scores are 48 to 144 us for these: enough for two more launches, too.
_LEAST_SCORES = 2**28


def with_lists(problem: AttentionProblem) -> AttentionProblem:
    """A problem as kernels see it that walk over lists which its own call makes."""
    mods, mask = problem.rules.mods, problem.rules.mask
    strides = (0, 0) if mask is None else mask.strides[:2]
    tells_batches = strides[0] != 0 or (mods is not None and mods.mask_asks("b"))
    tells_heads = strides[1] != 0 or (mods is not None and mods.mask_asks("h"))
    shape = (
        problem.batch if tells_batches else 1,
        problem.heads_q if tells_heads else 1,
        blocks_of(problem.seqlen_q, BLOCK[0]),
        blocks_of(problem.visible_kv, BLOCK[1]),
    )
    counts = _contiguous(shape[:-1])
    indices = _contiguous(shape)
    capacity = (shape[-1], shape[-1])
    strides_of = (counts, indices) * 2
    lists = BlockLists(BLOCK, shape[0], shape[1], capacity, strides_of, made=True)
    return replace(problem, rules=replace(problem.rules, block_mask=lists))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def check(problem: AttentionProblem) -> None:
    """Raise ``ValueError`` if there is nothing to make lists of."""
    reason = None
    if problem.rules.block_mask is not None:
        reason = "the block mask that is passed has lists already"
    elif problem.packed:
        reason = "sequences of a packed batch have no common lists"
    elif not _hides(problem):
        reason = "lists are made from a mask_mod or a mask, and there is none"
    if reason is not None:
        raise ValueError(f"config: own_lists=True, but {reason}")


def _hides(problem: AttentionProblem) -> bool:
    mods = problem.rules.mods
    return problem.rules.mask is not None or (mods is not None and mods.mask_mod is not None)


def is_asked(problem: AttentionProblem) -> bool:
    """Whether it has a mask_mod, and no lists: whether it is to be decided who asks."""
    mods = problem.rules.mods
    return mods is not None and mods.mask_mod is not None and problem.rules.block_mask is None


def why_not(problem: AttentionProblem) -> str | None:
    """Why lists of a problem's mask_mod do not pay, or do not keep a promise; None if they do."""
    if problem.packed:
        return "sequences of a packed batch have no common lists"
    if problem.batch_invariant:
        return "a packed batch has no lists, and batch_invariant promises its bits"
    if problem.gate is not None:
        return "a gate shows what the rule itself hides"
    lists = with_lists(problem).rules.block_mask
    assert lists is not None
    scores = problem.batch * problem.heads_q * problem.visible_pairs
    keys = problem.visible_kv
    ahead = lists.batches * lists.heads * problem.seqlen_q * keys
    if scores < _LEAST_HEADS * ahead:
        return (
            f"{lists.batches} x {lists.heads} lists take {ahead} scores, and the kernel asks for "
            f"{scores}; it pays from {_LEAST_HEADS} times as many on"
        )
    least = max(_LEAST_SCORES, _LEAST_QUERIES * keys)
    if scores < least:
        return f"the kernel asks for {scores} scores; it pays from {least} on"
    return None


def why_too_large(problem: AttentionProblem, config: KernelConfig) -> str | None:
    """Why the lists take too much memory: more than the output; None if they do not.

    ``problem``: ``with_lists``. Lists grow with the square of the length, all else does not.
    """
    lists = sum(
        math.prod(shape) * (ITEMSIZE.get(dtype) or np.dtype(dtype).itemsize)
        for shape, dtype in config.scratch(problem).values()
    )
    output = math.prod(problem.output_shape) * ITEMSIZE[problem.dtype]
    return None if lists <= output else f"they take {lists} bytes, and the output {output}"
