"""Attention next to torch's on one GPU, on the same inputs: errors against the float64 oracle.

``python benchmarks/errors.py``; needs this package installed (or PYTHONPATH=.) and torch with a
GPU. ``--from FILE`` shows a result again, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from side_by_side.backends import (
    Call,
    Torch,
    as_cupy,
    compile_ahead,
    dense,
    first_result,
    require_torch,
    to_numpy,
    to_torch,
)
from side_by_side.error_cases import Case, cases
from side_by_side.results import OURS, SDPA, geometric_mean
from side_by_side.tables import machine_line
from side_by_side.timing import Gpu, reason_of

from flashcore_cupy import attention
from flashcore_cupy.cli.tables import clean, console, progress
from flashcore_cupy.cpu import reference
from flashcore_cupy.jit import compiler
from flashcore_cupy.launch import builds

#: torch's function with nothing chosen: what a user gets.
TORCH = "torch"


def errors(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Largest, mean and root-mean-square absolute error; a reason where not all is finite."""
    error = np.abs(got.astype(np.float64) - expected)
    odd = int(error.size - np.isfinite(error).sum())
    if odd:
        return {"reason": f"{odd} values are NaN or infinite"}
    rms = float(np.sqrt(np.mean(error**2)))
    return {"max": float(error.max()), "mean": float(error.mean()), "rms": rms}


def ratio(row: Mapping[str, Any], measure: str) -> float | None:
    """Our error by that of torch's choice; None where one is missing or 0."""
    ours, torch = (row["backends"][name].get(measure) for name in (OURS, TORCH))
    return ours / torch if ours and torch else None


class Bench:
    """Runs cases through all implementations."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._selected: dict[str, Callable[[], Any]] = {TORCH: contextlib.nullcontext}
        self._selected |= {name: Torch(torch, name).selected for name in SDPA}

    def row(self, case: Case, expected: np.ndarray[Any, Any]) -> dict[str, Any]:
        """Errors of ours and of torch's, or why there are none."""
        tensors = [to_torch(self._torch, x) for x in case.arrays()]
        operands = {name: to_torch(self._torch, x) for name, x in case.operands().items()}
        runs = {OURS: functools.partial(self._ours, case, tensors, operands)}
        for name, selected in self._selected.items():
            runs[name] = functools.partial(self._torchs, case, tensors, operands, selected)
        found: dict[str, Any] = {}
        outputs: dict[str, bytes] = {}
        for name, run in runs.items():
            try:
                got = run()
            except Exception as error:
                found[name] = {"reason": reason_of(error)}
                continue
            found[name] = errors(got, expected)
            outputs[name] = got.tobytes()
        chose = [name for name in SDPA if TORCH in outputs and outputs.get(name) == outputs[TORCH]]
        return {
            **case.to_json(),
            "backends": found,
            "torch_chose": chose[0] if chose else "math" if TORCH in outputs else None,
        }

    def _ours(self, case: Case, tensors: Sequence[Any], operands: Mapping[str, Any]) -> Any:
        import cupy

        q, k, v = (as_cupy(self._torch, x) for x in tensors)
        rules: dict[str, Any] = {name: as_cupy(self._torch, x) for name, x in operands.items()}
        return cupy.asnumpy(attention(q, k, v, **case.rules, **rules))

    def _torchs(
        self,
        case: Case,
        tensors: Sequence[Any],
        operands: Mapping[str, Any],
        selected: Callable[[], Any],
    ) -> Any:
        run = functools.partial(
            self._torch.nn.functional.scaled_dot_product_attention,
            *tensors,
            attn_mask=operands.get("mask", operands.get("bias")),
            is_causal=case.causal,
            scale=case.rules["softmax_scale"],
            enable_gqa=case.heads != case.heads_kv,
        )
        return to_numpy(self._torch, first_result(run, selected))


def oracle(case: Case) -> np.ndarray[Any, Any]:
    """The float64 result of a case."""
    q, k, v = case.arrays()
    return reference.oracle(q, k, v, **case.rules, **case.operands())[0]


def call_of(case: Case) -> Call:
    """What ours compiles for a case."""
    shape = (case.batch, case.heads, case.seqlen_q, case.head_dim)
    kv_shape = (case.batch, case.heads_kv, case.seqlen_kv, case.head_dim)
    scores = (*shape[:3], case.seqlen_kv)
    kinds = {"mask": np.dtype(bool), "bias": case.element}
    operands = {name: dense(scores, kind) for name, kind in kinds.items() if getattr(case, name)}
    kv = dense(kv_shape, case.element)
    return Call(dense(shape, case.element), kv, kv, {**case.rules, **operands})


def measure() -> dict[str, Any]:
    """Run all cases; the oracle works on other threads meanwhile."""
    torch = require_torch()
    wanted = cases()
    shown = console(stderr=True)
    with progress(shown) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        expected = [pool.submit(oracle, case) for case in wanted]
        task = bar.add_task("compiling", total=None, last="")

        def on_done(done: compiler.CompiledKernel | Exception) -> None:
            bar.update(task, advance=1, last=builds.what(done))

        compile_ahead(map(call_of, wanted), on_done)
        bench, rows = Bench(torch), []
        bar.reset(task, description="comparing", total=len(wanted))
        for case, future in zip(wanted, expected, strict=True):
            bar.update(task, last=case.name)
            rows.append(bench.row(case, future.result()))
            bar.advance(task)
    means = {m: geometric_mean(ratio(row, m) for row in rows)[0] for m in ("rms", "max")}
    machine = Gpu(torch).machine()
    return {"machine": machine, "rows": rows, "ours_by_torch": means}


def table(result: Mapping[str, Any]) -> Group:
    """What is printed."""
    shown = Table(
        title="Errors against float64, ours beside torch's",
        title_justify="left",
        caption="max and mean absolute error; ratios are ours / torch, below 1: ours is closer",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    shown.add_column("case", no_wrap=True)
    peers = [f"{name.removeprefix('torch-')} max" for name in SDPA]
    names = ("ours max", "ours mean", "torch max", "torch mean", *peers, "rms ratio", "max ratio")
    for name in names:
        shown.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    shown.add_column("torch\nchose", no_wrap=True)
    reasons: dict[str, int] = {}
    for row in result["rows"]:
        columns = [(OURS, "max"), (OURS, "mean"), (TORCH, "max"), (TORCH, "mean")]
        columns += [(name, "max") for name in SDPA]
        cells = [_cell(row, name, measure, reasons) for name, measure in columns]
        ratios = [_ratio(ratio(row, measure)) for measure in ("rms", "max")]
        chose = (row["torch_chose"] or "").removeprefix("torch-")
        shown.add_row(row["name"], *cells, *ratios, chose)
    shown.add_section()
    means = [_ratio(result["ours_by_torch"][measure]) for measure in ("rms", "max")]
    shown.add_row("geometric mean", *[""] * (len(names) - 2), *means, "", style="bold")
    notes = [Text(f"[{number}] {reason}", style="dim") for reason, number in reasons.items()]
    return Group(machine_line(result["machine"]), "", shown, *notes)


def _cell(row: Mapping[str, Any], name: str, measure: str, reasons: dict[str, int]) -> Text:
    found = row["backends"][name]
    if "reason" in found:
        number = reasons.setdefault(f"{name}: {found['reason']}", len(reasons) + 1)
        return Text(f"[{number}]", style="red" if name == OURS else "yellow")
    figure = f"{found[measure]:.1e}".replace("e-0", "e-")
    return Text(figure, style="bold" if name == OURS else "")


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def load(path: Path) -> dict[str, Any]:
    """Read a result. Raises ``click.ClickException`` for anything else."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        table(result)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise click.ClickException(f"{path}: not a result of this benchmark: {error!r}") from error
    return result


def default_path(gpu: str) -> Path:
    """Where the result of a GPU belongs: "NVIDIA H200" in results/h200."""
    folder = gpu.removeprefix("NVIDIA ").lower().replace(" ", "_")
    return Path(__file__).resolve().parent / "results" / folder / "errors.json"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the result; default: results/<gpu>/errors.json beside this file.",
)
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Show this result instead of measuring.",
)
def main(json_path: Path | None, source: Path | None) -> None:
    """Compare our errors with torch's, case by case.

    Exit code 1: ours failed in some case.
    """
    try:
        if source is None:
            result = measure()
            path = json_path or default_path(result["machine"]["gpu"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(clean(result), indent=1) + "\n", encoding="utf-8")
        else:
            result = load(source)
        console().print(table(result))
    except (OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    if any("reason" in row["backends"][OURS] for row in result["rows"]):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
