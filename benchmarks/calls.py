"""What a call costs from Python: on arrays that were seen before, on some in turn, and on new ones.

Then on the same arrays with rules: a mask, a bias, dropout by two integers, a block mask.

``python benchmarks/calls.py --json calls.json``; needs this package installed (or PYTHONPATH=.) and
a GPU with mma.sync (sm_80 or later); ``wgmma_sm90`` is measured where there is wgmma.

The problem is so small that the GPU is done before the next call comes, so what is measured is the
host: validation, a launch's parameters, for ``wgmma_sm90`` its tensor maps, and the driver. Kernels
take turns; each figure is the median of many runs of some calls without a wait in between.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.table import Table

import flashcore_cupy
from flashcore_cupy.check import machine
from flashcore_cupy.cli.tables import console
from flashcore_cupy.cuda.targets import HOPPER
from flashcore_cupy.jit import compiler

SHAPE = (1, 8, 64, 64)
RUNS, CALLS, SETS = 200, 20, 5
RULES = ("mask", "bias", "dropout", "block mask")
ARRAYS = ("the same", f"{SETS} sets in turn", "new", *RULES)


def rules_of(arrays: str) -> dict[str, Any]:
    """What a call brings besides q, k, v and out."""
    import cupy

    seqlen = SHAPE[2]
    if arrays == "mask":
        return {"mask": cupy.random.random((seqlen, seqlen)) < 0.9}
    if arrays == "bias":
        return {"bias": cupy.random.random((SHAPE[1], 1, seqlen), dtype=cupy.float32)}
    if arrays == "dropout":
        return {"dropout_p": 0.1, "rng": (1, 2)}
    if arrays == "block mask":
        lengths = {"seqlen_q": seqlen, "seqlen_kv": seqlen}
        return {"block_mask": flashcore_cupy.block_mask(mask_mod="kv_idx <= q_idx", **lengths)}
    return {}


def sets_of_arrays(arrays: str) -> Iterator[tuple[Any, Any, Any, Any]]:
    """q, k, v and out for one call after the other; what is new stays alive, so that it is new."""
    import cupy

    rng = cupy.random.default_rng(0)

    def new() -> tuple[Any, Any, Any, Any]:
        q, k, v, out = (rng.standard_normal(SHAPE, dtype=cupy.float32) for _ in range(4))
        return q.astype("float16"), k.astype("float16"), v.astype("float16"), out.astype("float16")

    known = [new() for _ in range(SETS if "turn" in arrays else 1)]
    while True:
        if arrays == "new":
            known.append(new())
            yield known[-1]
        else:
            yield from known


def run(kernel: str, arrays: Iterator[tuple[Any, Any, Any, Any]], rules: dict[str, Any]) -> float:
    """Microseconds per call of some calls in a row."""
    import cupy

    upcoming = [next(arrays) for _ in range(CALLS)]
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    for q, k, v, out in upcoming:
        flashcore_cupy.attention(q, k, v, out=out, kernel=kernel, **rules)
    seconds = time.perf_counter() - start
    cupy.cuda.Device().synchronize()
    return seconds / CALLS * 1e6


def measure(kernels: tuple[str, ...], report: Callable[[str, str, float], None]) -> None:
    """Report the median of every kernel on every kind of arrays."""
    for arrays in ARRAYS:
        sources = {kernel: sets_of_arrays(arrays) for kernel in kernels}
        rules = rules_of(arrays)
        times: dict[str, list[float]] = {kernel: [] for kernel in kernels}
        for turn in range(RUNS + 5):
            for kernel in kernels:
                us = run(kernel, sources[kernel], rules)
                if turn >= 5:  # the first ones compile, and are remembered
                    times[kernel].append(us)
        for kernel in kernels:
            report(arrays, kernel, statistics.median(times[kernel]))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False)
)
def main(json_path: Path | None) -> None:
    """Time calls of the kernels that a GPU has, by what arrays they are given."""
    reason = compiler.no_gpu_reason()
    if reason is not None:
        raise click.ClickException(f"needs a GPU: {reason}")
    arch = compiler.device_arch()
    kernels = ("mma_sm80", "wgmma_sm90") if arch == HOPPER else ("mma_sm80",)
    rows: list[dict[str, Any]] = []
    measure(
        kernels, lambda *row: rows.append(dict(zip(("arrays", "kernel", "us"), row, strict=True)))
    )
    table = Table("arrays, or the rule", *(f"{kernel}, us" for kernel in kernels))
    for arrays in ARRAYS:
        times = {row["kernel"]: row["us"] for row in rows if row["arrays"] == arrays}
        table.add_row(arrays, *(f"{times[kernel]:.2f}" for kernel in kernels))
    console().print(table)
    if json_path is not None:
        found = {"machine": machine.machine(arch).to_json(), "shape": SHAPE, "rows": rows}
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
