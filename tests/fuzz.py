"""Whole problems at random, every argument of ``attention``, against the float64 oracle.

What a kernel is compiled for comes from a list of configurations, on a GPU all compiled in
parallel before the first example; lengths, heads, bounds and values are drawn freely. Every array
is cut from a buffer that is NaN elsewhere.

    pytest tests -k fuzz            the same examples each time
    python tests/fuzz.py 2000       others, on a GPU if there is one, else emulated

`fuzz_backward` does the same of the backward pass: ``--backward``.
"""

from __future__ import annotations

import functools
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from places import Place, place_of

from flashcore_cupy.check.selftest import matrix, rule_cases
from flashcore_cupy.check.selftest.arrays import Placed, set_up
from flashcore_cupy.check.selftest.case import MASK_MODS, SCORE_MODS, Case, packed
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler
from flashcore_cupy.select import registry

CONFIGURATIONS = 300
KERNEL = "mma_sm80"  # takes all of these; on Hopper "auto" has a faster one for some
DIMS = (8, 32, 33, 40, 64, 72, 80, 96, 100, 128, 160, 192, 256, 512)
KINDS = ("normal", "outliers", "constant", "onehot")

# Sizes by the tile that they get of either kernel, which is part of a configuration: the most heads
# in all batches, the fewest and the most queries, the most keys.
GRIDS = {
    "decode": (12, 1, 16, 3000),  # and at most 16 rows: queries times grouped heads
    "pairs": (48, 1, 16, 500),  # the same, by clusters of 2, 4 and 8 where they are not packed
    "fours": (48, 1, 16, 500),
    "eights": (48, 1, 16, 500),
    "grouped": (48, 3, 8, 500),  # 17 to 64 rows
    "few": (4, 17, 384, 700),
    "some": (48, 17, 128, 200),
    "enough": (104, 65, 128, 130),
    "invariant": (12, 1, 200, 300),
}
# Of q, of k and v: how many there are of the latter decides the cluster.
HEADS = {"pairs": ((8, 8), (4, 2)), "fours": ((8, 2),), "eights": ((8, 1),), "grouped": ((8, 1),)}
CLUSTERED = ("pairs", "fours", "eights")
OF_ANY_LENGTHS = ("decode", *CLUSTERED, "few", "invariant")
# By how many keys they have, these get one tile or another of cluster_sm90: more than so many, and
# up to the next.
KEYS_OF = ("few", "some")
KEY_STEPS = (0, 64, 128, 256, 512)
FULL = (*HEADS, "some", "enough")  # thread blocks are counted: all of the heads, always
SETTINGS = settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# ---- what is compiled ----------------------------------------------------------------------------


@functools.cache
def configurations() -> tuple[Case, ...]:
    """Cases of the smallest sizes; ``group`` names the line of GRIDS."""
    return tuple(dict.fromkeys(configuration(seed) for seed in range(CONFIGURATIONS)))


def draw_sometimes(rng: random.Random, chance: float, *values: Any) -> Any:
    """One of these with a chance, else what is none of their kind."""
    return rng.choice(values) if rng.random() < chance else type(values[0])()


def draw_either(rng: random.Random) -> dict[str, Any]:
    """Arguments of a case of either pass."""
    sometimes = functools.partial(draw_sometimes, rng)
    return {
        "causal": rng.choice([False, False, True, True, "top-left"]),
        "window": (rng.choice([-1, -1, 0]), rng.choice([-1, -1, 0])),
        "view": rng.choice(
            ["contiguous", "strided", "align8", "align4", "misaligned", "transposed"]
        ),
        "layout": rng.choice(["bhsd", "bshd"]),
        "softcap": sometimes(0.2, 1.0),
        "alibi": sometimes(0.25, "h", "bh"),
        "sink": sometimes(0.25, True),
        "score_mod": sometimes(0.15, *SCORE_MODS),
    }


def configuration(seed: int) -> Case:
    rng = random.Random(seed)
    grid = rng.choice([*GRIDS, "invariant"])
    packs = grid in OF_ANY_LENGTHS and rng.random() < 0.35
    dtype = rng.choice(registry.KERNELS[KERNEL].dtypes)
    dims = (rng.choice(DIMS), rng.choice(DIMS))
    while not rule_cases.takes_dims(KERNEL, dtype, dims) or rng.random() < 0.6:
        dims = (rng.choice(DIMS),) * 2

    sometimes = functools.partial(draw_sometimes, rng)
    case = Case(
        *(grid, rng.choice(["auto", "auto", KERNEL]), dtype),
        head_dim=dims[0],
        head_dim_v=dims[1],
        **draw_either(rng),
        mask_mod=sometimes(0.15, *MASK_MODS),
        bias="" if packs else sometimes(0.3, "bhqk", "1h1k", "qk", "b1q1", "1"),
        bias_fp32=rng.random() < 0.5,
        mask="" if packs else sometimes(0.3, "bhqk", "b11k", "1hqk", "k", "q1"),
        gate=None if packs or rng.random() < 0.85 else rng.choice(["qk", "softmax", "pv"]),
        boundaries=rng.choice(["host", "device"]),
        batch_invariant=grid == "invariant",
        # The first decides how a bias and a mask are loaded.
        seqlen_kv=rng.choice([2, 3, 16]) + rng.choice(key_steps(grid, packs)),
        softmax_scale=-0.2 if rng.random() < 0.15 else None,
        dropout_p=sometimes(0.15, 0.1, 0.5),
        # What comes last leaves the other draws as they are.
    )
    return at_smallest(case, packs)


def key_steps(grid: str, packs: bool) -> tuple[int, ...]:
    if grid not in KEYS_OF or packs:
        return (0,)
    return tuple(step for step in KEY_STEPS if step < GRIDS[grid][3])


def at_smallest(case: Case, packs: bool) -> Case:
    most_heads, fewest, _, _ = GRIDS[case.group]
    most = min(16 if packs and case.group in FULL else 8, most_heads)
    of_q, of_kv = (most, most) if packs else HEADS.get(case.group, ((most, most),))[0]
    heads = {"heads": of_q, "heads_kv": of_kv}
    batch = most_heads // of_q if case.group in FULL else 1
    fewest = max(fewest, 2)
    if packs:
        return packed(replace(case, **heads), ((fewest, case.seqlen_kv),))
    return replace(case, **heads, batch=batch, seqlen_q=fewest)


def compiled_for(case: Case, arch: str) -> Any:
    (config,) = matrix.case_config(case, arch)
    return config


# ---- what is drawn -------------------------------------------------------------------------------


@st.composite
def problems(draw: Any, groups: tuple[str, ...] = tuple(GRIDS)) -> Case:
    case = draw(st.sampled_from([case for case in configurations() if case.group in groups]))
    case = draw_packed(draw, case) if case.lengths else draw_sizes(draw, case)
    left, right = (n if n < 0 else draw(st.integers(0, 300)) for n in case.window)
    bare = replace(case, group="", seed=0, kind="normal")
    plain = not (case.softcap or case.alibi or case.bias or case.score_mod)
    scales = (None, None, 0.05, 0.3) if case.softmax_scale is None else (-0.2, -0.01, 0.0)
    scale = draw(st.sampled_from(scales))
    kinds = (*KINDS, "large") if plain and scale is None else KINDS
    return replace(
        bare,
        window=(left, right),
        softcap=case.softcap and draw(st.sampled_from([1.0, 5.0, 30.0])),
        softmax_scale=scale,
        kind=draw(st.sampled_from(kinds)),
        seed=draw(st.integers(0, 2**20)),
    )


def draw_heads(draw: Any, case: Case, most: int) -> dict[str, int]:
    """Heads of k and v, times how many query heads share one; several where rows are padded."""
    group = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n <= most]))
    fewest = 2 if group == 1 and is_padded(case) else 1
    heads_kv = draw(st.integers(fewest, min(3, most // group)))
    return {"heads": group * heads_kv, "heads_kv": heads_kv}


def is_padded(case: Case) -> bool:
    """Whether an axis of length 1, whose stride does not count, could change the alignment."""
    return case.view not in ("contiguous", "transposed")


def draw_sizes(draw: Any, case: Case) -> Case:
    most_heads, fewest, most, most_keys = GRIDS[case.group]
    batch = 1
    if case.group in FULL:
        heads = draw(st.sampled_from(HEADS.get(case.group, ((8, 8), (8, 2), (8, 1), (4, 2)))))
        sizes = {"heads": heads[0], "heads_kv": heads[1]}
        batch = most_heads // heads[0]
    else:
        sizes = draw_heads(draw, case, min(8, most_heads))
        batch = draw(st.integers(1, min(3, most_heads // sizes["heads"])))
    group = sizes["heads"] // sizes["heads_kv"]
    if case.group in ("decode", *CLUSTERED):
        most = 16 // group
    elif case.group in KEYS_OF and group > 1:  # fewer are packed
        fewest = max(fewest, 64 // group + 1)
    # A bias of one query lies the same way transposed, and its keys can be loaded in pairs.
    fewest = max(fewest, 2 if case.view == "transposed" else 1)
    sizes["seqlen_q"] = draw(st.integers(fewest, most))
    sizes["seqlen_kv"] = draw_keys(draw, case, most_keys)
    return replace(case, batch=batch, **sizes)


def draw_keys(draw: Any, case: Case, most: int) -> int:
    """At least one more than the case's step, and no more than the next."""
    first = 0
    for step in key_steps(case.group, bool(case.lengths)):
        if step < case.seqlen_kv:
            first = step
        else:
            most = min(most, step)
            break
    if case.bias or case.mask:
        step = 16 if case.seqlen_kv % 16 == 0 else 2
        return case.seqlen_kv + step * draw(st.integers(0, max(0, most - case.seqlen_kv) // step))
    fewest = 2 if is_padded(case) else 0
    return draw(st.integers(max(fewest, first + 1 if first else 0), most))


def draw_packed(draw: Any, case: Case) -> Case:
    count = draw(st.integers(1, 5))
    if case.group in CLUSTERED:
        count, group = min(count, 2), draw(st.sampled_from([1, 2, 4, 8]))
        heads = {"heads": 16, "heads_kv": 16 // group}
    else:
        heads = draw_heads(draw, case, 4 if case.group == "few" else 8)
    decodes = case.group in ("decode", *CLUSTERED)
    most = 16 // (heads["heads"] // heads["heads_kv"]) if decodes else 150
    if case.group == "few":
        most = GRIDS["few"][2] // count - 17
    if case.group in CLUSTERED:
        most -= 1
    queries = [draw(st.integers(0, most)) for _ in range(count)]
    keys = [draw(st.integers(0, 400)) for _ in range(count)]
    if case.group == "few":  # the mean decides, for only the device knows the lengths
        queries[-1] += 17 * count
    if case.group in CLUSTERED:  # without queries there are no blocks
        queries[-1] += 1
    keys[0] += 2 * is_padded(case)
    return packed(replace(case, **heads), tuple(zip(queries, keys, strict=True)))


# ---- what has to hold ----------------------------------------------------------------------------


def check(case: Case, on: Place) -> None:
    setup = set_up(case)
    placed = Placed.of(case, setup, on_gpu=on.kind == "gpu", in_kernel=not on.is_numpy)
    first = attend(case, placed, on)
    if on.kind == "gpu":  # on the short way, if nothing keeps it from being remembered
        again = attend(case, placed, on)
        assert all(x.tobytes() == y.tobytes() for x, y in zip(first, again, strict=True))
    assert setup.out.surroundings_are_nan(on.to_host(placed.out_buffer)), "wrote beside the output"
    lse = first[1] if len(first) > 1 else None
    result = matrix.judge(case, setup.host, matrix.Launched(first[0], lse, None, 64))
    assert result.ok, f"{case.dtype} {case.name}: {result.reason}"


def attend(case: Case, placed: Placed, on: Place) -> list[np.ndarray]:
    wanted: dict[str, Any] = {}
    if case.gate not in ("qk", "softmax"):
        wanted = {"out": placed.out, "return_lse": case.gate is None}
        placed.out.fill(np.nan)
    kernel = "auto" if on.is_numpy else case.kernel
    if on.is_emulated:  # where "auto" is NumPy
        kernel = compiled_for(case, HOPPER).kernel
    got = on.by(kernel).attention(*placed.inputs, **wanted, **placed.arguments)
    arrays = [on.to_host(x) for x in (got if isinstance(got, tuple) else (got,))]
    return arrays if case.gate in ("qk", "softmax") else matrix.canonical(case, *arrays)


def warm_up() -> None:
    arch = compiler.device_arch()
    wanted = dict.fromkeys(compiled_for(case, arch) for case in configurations())
    compiler.compile_many([(c.source, c.defines(), arch, c.headers) for c in wanted])


def run(examples: int, on: Place, *, derandomize: bool, report_every: int = 0) -> None:
    groups, how = tuple(GRIDS), {}
    if on.kind == "gpu":
        warm_up()
    if on.is_emulated:  # small grids; and no search for a smaller example, which would be builds
        groups, how = OF_ANY_LENGTHS, {"phases": [Phase.generate]}
    clean = 0

    @settings(SETTINGS, max_examples=examples, derandomize=derandomize, **how)
    @given(problems(groups))
    def each(case: Case) -> None:
        nonlocal clean
        check(case, on)
        clean += 1
        if report_every and clean % report_every == 0:
            print(f"{clean} clean", flush=True)

    each()


def main() -> None:
    """Arguments: how many problems; with --backward of that pass, and after it a seed."""
    numbers = [int(word) for word in sys.argv[1:] if word != "--backward"]
    here = place_of(Path(__file__))
    if "--backward" not in sys.argv:
        run(*(numbers or [2000]), here, derandomize=False, report_every=50)
        return
    from fuzz_backward import run as run_backward

    count, seed = numbers + [1000, random.randrange(2**32)][len(numbers) :]
    print(f"seed {seed}", flush=True)
    workers = min(16, os.cpu_count() or 1) if here.kind == "gpu" else 1
    if run_backward(range(count), here, seed, workers=workers, report_every=50):
        sys.exit(1)


if __name__ == "__main__":
    main()
