"""Whole problems of the backward pass at random, against the float64 oracle.

As in `fuzz`: what kernels are compiled for comes from a list of configurations, on a GPU all
compiled in parallel before the first problem; lengths, heads, bounds and values are drawn freely.
Every array is cut from a buffer that is NaN elsewhere. Not by hypothesis, which tries what it has
drawn five times with small changes: here each problem is of the next configuration.

    pytest tests -k fuzz                       the same problems each time
    python tests/fuzz.py 1000 --backward       others, on a GPU if there is one, else emulated
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from fuzz import DIMS, KINDS, draw_either, draw_sometimes, is_padded
from places import Place

from flashcore_cupy.check.selftest import gradients
from flashcore_cupy.check.selftest.case import MASK_MODS, Case, packed
from flashcore_cupy.check.selftest.outcome import Emulated, failures
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler
from flashcore_cupy.problem.attention_problem import DTYPES
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

CONFIGURATIONS = 450
# Lengths at which tiles of either side begin and end are drawn as often as all others.
EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)


# ---- what is compiled ----------------------------------------------------------------------------


@functools.cache
def configurations(arch: str) -> tuple[Case, ...]:
    """Cases of the smallest sizes that a target's kernels take, by turns."""
    kernels = [name for name in BACKWARD_KERNELS if arch == HOPPER or "sm90" not in name]
    found: dict[Case, None] = {}
    seeds = itertools.count()
    while len(found) < CONFIGURATIONS:
        kernel = kernels[len(found) % len(kernels)]
        case = configuration(kernel, next(seeds))
        if compiled_for(case, arch):
            found[case] = None
    return tuple(found)


def configuration(kernel: str, seed: int) -> Case:
    """Some of these the kernel does not take."""
    rng = random.Random(seed)
    packs = rng.random() < 0.25
    dtype = rng.choice(DTYPES)
    dims = (rng.choice((64, 128, *DIMS)),) * 2
    if rng.random() < 0.3:
        dims = rng.choice([(192, 128), (dims[0], rng.choice(DIMS))])

    sometimes = functools.partial(draw_sometimes, rng)
    bias = "" if packs else sometimes(0.3, "bhqk", "1h1k", "qk", "b1q1", "1h11", "k", "1")
    mask = "" if packs else sometimes(0.2, "bhqk", "b11k", "1hqk", "k", "q1")
    case = Case(
        *("fuzz", kernel, dtype),
        batch=fewest_batches(bias, mask),
        head_dim=dims[0],
        head_dim_v=dims[1],
        **draw_either(rng),
        mask_mod=sometimes(0.1, *MASK_MODS),
        bias=bias,
        bias_fp32=rng.random() < 0.5,
        mask=mask,
        boundaries=rng.choice(["host", "device"]),
        batch_invariant=rng.random() < 0.1,
        seqlen_q=2,
        seqlen_kv=rng.choice([2, 3, 16]),  # decides how a bias and a mask are loaded
        softmax_scale=-0.2 if rng.random() < 0.15 else None,
        dropout_p=sometimes(0.2, 0.1, 0.5),
        deterministic=rng.random() < 0.6,
        dlse=rng.random() < 0.3,
        stored=sometimes(0.4, "fp32", "added"),
        # What comes last leaves the other draws as they are.
    )
    if rng.random() < 0.25:
        case = replace(case, only=rng.choice(case.wrt + 2 * case.wrt[3:]))
    if not packs and rng.random() < 0.15:
        blocks = rng.choice(["64x64 11", "64x128 1h", "128x64 bh", "128x128 b1"])
        case = replace(case, block_mask=blocks, batch=fewest_batches(bias, mask, blocks))
    return packed(case, ((2, case.seqlen_kv),)) if packs else case


def fewest_batches(*arrays: str) -> int:
    """How the batches of an array lie decides how it is loaded, if there are several."""
    return 2 if "b" in "".join(arrays) else 1


def compiled_for(case: Case, arch: str) -> tuple[Any, ...]:
    """What is compiled, in launch order; nothing where the kernel does not take the case."""
    try:
        configs = gradients.configs_of(case, arch)
    except ValueError:
        return ()
    return tuple((c.source, tuple(sorted(c.defines().items())), c.headers) for c in configs)


# ---- what is drawn -------------------------------------------------------------------------------


def problem(arch: str, seed: int, number: int, most: int = 300) -> Case:
    """Of lengths up to ``most``, or two of that together where sequences are packed."""
    case = configurations(arch)[number % CONFIGURATIONS]
    for attempt in itertools.count():
        drawn = draw(random.Random(f"{seed} {number}" + " again" * attempt), case, most)
        # Positions that hide keys from all queries give bwd_sm90 another pass, or do not.
        if case.kernel != "bwd_sm90" or compiled_for(drawn, arch) == compiled_for(case, arch):
            return drawn
    raise AssertionError("counting ends")


def draw(rng: random.Random, case: Case, most: int) -> Case:
    """What no compiled kernel depends on."""
    case = draw_packed(rng, case, most) if case.lengths else draw_sizes(rng, case, most)
    left, right = (n if n < 0 else rng.randint(0, rng.choice([10, most])) for n in case.window)
    plain = not (case.softcap or case.alibi or case.bias or case.score_mod)
    scales = (None, None, 0.05, 0.3) if case.softmax_scale is None else (-0.2, -0.01, 0.0)
    scale = rng.choice(scales)
    kinds = ("normal", *KINDS, "large") if plain and scale is None else ("normal", *KINDS)
    return replace(
        case,
        window=(left, right),
        softcap=case.softcap and rng.choice([1.0, 5.0, 30.0]),
        softmax_scale=scale,
        kind=rng.choice(kinds),
        seed=rng.randrange(2**20),
    )


def draw_heads(rng: random.Random, case: Case) -> dict[str, int]:
    """Heads of k and v, times how many query heads share one; several where rows are padded."""
    group = rng.choice([1, 1, 2, 3, 4, 8])
    fewest = 2 if is_padded(case) else 1
    heads_kv = rng.randint(fewest, 2 if group > 2 else 3)
    return {"heads": group * heads_kv, "heads_kv": heads_kv}


def length(rng: random.Random, fewest: int, most: int) -> int:
    edges = [n for n in EDGES if fewest <= n <= most]
    return rng.choice(edges) if edges and rng.random() < 0.4 else rng.randint(fewest, most)


def draw_sizes(rng: random.Random, case: Case, most: int) -> Case:
    fewest = 2 if is_padded(case) or case.view == "transposed" else 1
    sizes = draw_heads(rng, case)
    fewest_b = fewest_batches(case.bias, case.mask, case.block_mask)
    sizes["batch"] = rng.randint(fewest_b, max(fewest_b, 8 // sizes["heads"]))
    sizes["seqlen_q"] = length(rng, fewest, most)
    if case.bias or case.mask:
        step = 16 if case.seqlen_kv % 16 == 0 else 2
        keys = rng.randrange(case.seqlen_kv, most, step)
        sizes["seqlen_kv"] = keys + (2 if step == 2 and keys % 16 == 0 else 0)
    else:
        sizes["seqlen_kv"] = length(rng, fewest, most)
    return replace(case, **sizes)


def draw_packed(rng: random.Random, case: Case, most: int) -> Case:
    """Sequences may be empty on one side or on both."""
    count = rng.randint(1, 5)

    def drawn() -> list[int]:
        longest = 2 * most // count
        lengths = [0 if rng.random() < 0.25 else length(rng, 0, longest) for _ in range(count)]
        lengths[rng.randrange(count)] += 2
        return lengths

    sides = drawn(), drawn()
    return packed(replace(case, **draw_heads(rng, case)), tuple(zip(*sides, strict=True)))


# ---- what has to hold ----------------------------------------------------------------------------


def fault(case: Case, emulated: Emulated | None = None) -> str:
    """What is wrong with a case: against the oracle, the same bits again, nothing written beside.

    On the GPU, or emulated: then each launch has another schedule. Empty if nothing is wrong.
    """
    try:
        return gradients.run_case(case, emulated).reason
    except failures(emulated) as error:
        return f"{type(error).__name__}: {error}"


def warm_up(cases: Iterable[Case], arch: str) -> None:
    wanted = dict.fromkeys(one for case in cases for one in compiled_for(case, arch))
    compiler.compile_many([(source, dict(defines), arch, h) for source, defines, h in wanted])


def run(
    numbers: range, on: Place, seed: int = 0, *, workers: int = 1, report_every: int = 0
) -> list[str]:
    """Try the problems of these numbers, and tell which fail; ``workers``: processes."""
    if on.kind == "gpu":
        arch = compiler.device_arch()
        cases = [problem(arch, seed, n) for n in numbers]
        places: list[Emulated | None] = [None] * len(cases)
        warm_up(cases, arch)
    else:
        cases = [problem(HOPPER, seed, n, most=130) for n in numbers]
        places = [Emulated(HOPPER, 2 * n) for n in numbers]
    with contextlib.ExitStack() as stack:
        mapped: Any = map
        if workers > 1:  # most of the time goes into the oracle
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of each worker
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            mapped = stack.enter_context(pool).map
        failed = []
        for done, reason in enumerate(mapped(fault, cases, places), 1):
            if reason:
                number, case = numbers[done - 1], cases[done - 1]
                failed.append(f"seed {seed}, number {number}: {reason}\n{case!r}")
                if report_every:
                    print(failed[-1], flush=True)
            if report_every and done % report_every == 0:
                print(f"{done} tried, {len(failed)} failed", flush=True)
    return failed
