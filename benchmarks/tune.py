"""The fastest tile for a head dim: a search for the row of ``flashcore_cupy/select/table.py``.

    python benchmarks/tune.py --D 128
    python benchmarks/tune.py --D 192 --Dv 128 --block-m 128 --stages 2 --json d192.json
    python benchmarks/tune.py --kernel mma_sm80 --D 96 --S 2048 --S 8192 --causal

Needs this package installed (or PYTHONPATH=.). In turn:

1. Every tile of the kernel's ``Space`` is put in place of the current one, that of the row which
   serves these lengths now. What the kernel or the target has no room for is dropped.
2. The rest is compiled, in parallel. What spills is dropped, and so is what the compiler says it
   serialises: a wgmma that waits for the one before.
3. On a GPU, the rest is checked against float64, on a problem with tails on both sides, and timed
   as the forward grid of ``peers.py`` is, at every length: 16384 tokens, 2048 columns, the L2
   flushed before each call. All tiles take turns. The fastest (``--top``) are timed again, longer.

Printed are the tiles by their speed relative to the current one (the geometric mean over lengths
and masks), the TFLOP/s of each length, and last the row to paste into the table. Let
``pytest tests/compile`` build it with every rule then: those that spill go into its
``spills_with``. Its ``round_cost`` is the current row's: with another block_m, measure it anew, on
a full round of blocks. A head dim without rows gets the next wider one's, so give it a row of any
tile first. Without a GPU, and then with fewer columns and without the row:

    $ python benchmarks/tune.py --block-m 128 --block-m 192 --block-n 128 --block-n 192 --stages 2
    wgmma_sm90, D=128 Dv=128 bfloat16, no GPU, sm_90a
    now Row("wgmma_sm90", 128, Tile(128, 128, warps_m=8, num_stages=2), above_blocks=12, ...)
    4 tiles
    1 dropped, spills: 192x128 s2 (576 bytes)
    1 dropped, too large: such as 192x192 s2 (needs 247808 bytes of shared memory at head dim 128,
    sm_90a has 232448; smaller tiles (block_m, block_n, num_stages) may fit)

    tile        regs    KiB
    ───────────────────────
    128x128 s2   168  194.0
    128x192 s2   168  226.0
    tile: queries x keys, s: stages, w: warps, if not of 16 rows, b: min_blocks; bold: now
    there is no NVIDIA driver: compiled, but neither checked nor timed
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from side_by_side import cells
from side_by_side.results import Entry, geometric_mean
from side_by_side.timing import FLUSH_BYTES, Timer, take_turns

from flashcore_cupy.attention import plan
from flashcore_cupy.check import inputs, machine, verify
from flashcore_cupy.cli.options import POSITIVE, writable
from flashcore_cupy.cli.tables import clean, console, kib, progress, significant
from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import compiler, nvrtc
from flashcore_cupy.launch import builds
from flashcore_cupy.measure.problems import problem_json, to_gpu
from flashcore_cupy.problem.attention_problem import DTYPES, AttentionProblem, contiguous_problem
from flashcore_cupy.select import selector
from flashcore_cupy.select.config import KernelConfig, Tile
from flashcore_cupy.select.row import Row

GRID = cells.cells("grid")
LENGTHS = tuple(sorted({cell.seqlen_q for cell in GRID}))
TOKENS = GRID[0].batch * GRID[0].seqlen_q
COLUMNS = GRID[0].heads * GRID[0].head_dim
#: (B, H, S) of the problem that results are checked on: more blocks than multiprocessors.
CHECKED = (2, 16, 2003)
METHOD = "CUDA events around one call, L2 flushed before it; medians of rounds, all in turns"
_HEATS = 5  # rounds of the first pass
_BUDGET_S = 30.0  # of one cell
_PATIENCE_S = 20.0  # with one launch
#: Slow, but legal: the current row stays in, whatever the compiler says.
_SLOW = ("spills", "serialised")
_CHECKS = ("illegal", "too large")
_SERIALIZED = re.compile(r"\(C75\d\d\)|wgmma.*serializ", re.IGNORECASE)

Step = Callable[[str], None]
"""Told about each step as it is done."""


@dataclass(frozen=True)
class Space:
    """The values that a tile's fields may take; other fields stay the current row's."""

    block_m: Sequence[int]
    block_n: Sequence[int]
    num_stages: Sequence[int]
    rows_per_warp: Sequence[int] = (16,)
    min_blocks: Sequence[int] = (1,)

    def restricted(self, **given: Sequence[int]) -> Space:
        """Given values, where there are some, in place of these."""
        return replace(self, **{name: values for name, values in given.items() if values})

    def tiles(self, base: Tile) -> Iterator[Tile]:
        """Every combination."""
        for m, n, stages, rows, blocks in product(
            *(self.block_m, self.block_n, self.num_stages, self.rows_per_warp, self.min_blocks)
        ):
            tile = replace(base, block_m=m, warps_m=max(1, m // rows), block_n=n)
            yield replace(tile, num_stages=stages, min_blocks=blocks)


SPACES = {
    "wgmma_sm90": Space((64, 128, 192), range(32, 257, 16), (1, 2, 3, 4)),
    "mma_sm80": Space((64, 96, 128), range(32, 129, 16), (1, 2), (16, 32), (1, 2, 3)),
}


@dataclass
class Candidate:
    """A row with another tile, and what the search has found out about it."""

    row: Row
    is_current: bool = False
    dropped: tuple[str, str] | None = None
    """The kind of reason, and the reason."""
    builds: dict[bool, builds.Build] = field(default_factory=dict)
    """By causal."""
    error: float | None = None
    """The largest, as a share of what is allowed."""
    entries: dict[str, Entry] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    """The current row's time by this one's, taken in the same rounds."""

    @property
    def name(self) -> str:
        """Short, and unique within a space."""
        t = self.row.tile
        warps = "" if t.block_m == 16 * t.warps_m else f" w{t.warps_m}"
        blocks = "" if t.min_blocks == 1 else f" b{t.min_blocks}"
        return f"{t.block_m}x{t.block_n} s{t.num_stages}{warps}{blocks}"

    @property
    def speed(self) -> float | None:
        """Relative to the current row; None before it is timed."""
        return geometric_mean(self.ratios.values())[0]

    def drop(self, kind: str, reason: str) -> None:
        """Take it out. Raises ``RuntimeError`` where it is what all others are compared with."""
        if not self.is_current:
            self.dropped = kind, reason
        elif kind not in _SLOW:
            raise RuntimeError(f"the current row, {self.name}: {kind}: {reason}")

    def judge(self, check: verify.Check) -> None:
        """Note how far it is from float64, and drop it if that is too far."""
        share = check.comparison.max_error / (check.comparison.allowed_error or 1)
        self.error = max(self.error or 0.0, share)
        if not check.ok:
            self.drop("wrong", check.reason)

    def arguments(self, causal: bool) -> dict[str, Any]:
        """What ``plan`` takes for it beside the arrays."""
        return {"kernel": self.row.kernel, "config": asdict(self.row.tile), "causal": causal}


@dataclass
class Search:
    """The cells by name, such as "512c" for causal, and the candidates, the current row first."""

    arch: str
    cells: Mapping[str, AttentionProblem]
    candidates: list[Candidate]

    @property
    def current(self) -> Candidate:
        """What all others are compared with."""
        return self.candidates[0]

    @property
    def alive(self) -> list[Candidate]:
        """The candidates that are left, the fastest first."""
        left = [candidate for candidate in self.candidates if candidate.dropped is None]
        return sorted(left, key=lambda candidate: -(candidate.speed or 0))

    @property
    def masks(self) -> list[bool]:
        """Causal first: it takes more registers."""
        return sorted({problem.causal is True for problem in self.cells.values()}, reverse=True)

    def example(self, causal: bool) -> AttentionProblem:
        """A cell with this mask; lengths decide nothing of what is compiled."""
        return next(problem for problem in self.cells.values() if problem.causal is causal)


def cells_of(
    dims: tuple[int, int], dtype: str, lengths: Sequence[int], masks: Sequence[bool]
) -> dict[str, AttentionProblem]:
    """The forward grid's problems at a head dim, by name."""
    heads = max(1, COLUMNS // dims[0])
    return {
        f"{length}{'c' * causal}": contiguous_problem(
            *(max(1, TOKENS // length), heads, length, dims[0]),
            head_dim_v=dims[1],
            dtype=dtype,
            causal=causal,
        )
        for length, causal in product(lengths, masks)
    }


def current_row(kernel: str, problems: Sequence[AttentionProblem], arch: str) -> Row:
    """The row that all these problems get; ``ValueError`` if there is none, or several."""
    found: dict[Row, dict[str, None]] = {}
    for problem in problems:
        config = selector.select(problem, arch, kernel=kernel).config
        shape = config.tile, (config.head_dim, config.head_dim_v)
        rows = [row for row in selector.rows_of(kernel) if row.serves(problem)]
        row = next(row for row in rows if (row.tile, row.dims) == shape)
        found.setdefault(row, {})[str(problem.seqlen_q)] = None
    if len(found) > 1:
        groups = " or ".join(map(", ".join, found.values()))
        raise ValueError(f"several rows serve these lengths; take those of one: {groups}")
    return next(iter(found))


def begin(kernel: str, problems: Mapping[str, AttentionProblem], space: Space, arch: str) -> Search:
    """Enumerate the candidates and drop those that cannot be built."""
    row = current_row(kernel, list(problems.values()), arch)
    found = dict.fromkeys([row.tile, *space.tiles(row.tile)])
    candidates = [Candidate(replace(row, tile=tile), tile == row.tile) for tile in found]
    search = Search(arch, problems, candidates)
    for candidate in candidates:
        try:
            config = selector.configure_row(candidate.row, search.example(search.masks[0]))
        except ValueError as error:
            candidate.drop("illegal", str(error))
            continue
        try:
            _check_blocks(selector.check_target(candidate.row, config, arch), arch)
        except ValueError as error:
            candidate.drop("too large", str(error))
    return search


def _check_blocks(config: KernelConfig, arch: str) -> None:
    """Registers for more blocks than shared memory has room for are registers wasted."""
    blocks = (targets.smem_limit(arch) + 1024) // (config.smem_bytes + 1024)
    if config.tile.min_blocks > max(1, blocks):
        raise ValueError(f"min_blocks={config.tile.min_blocks}: shared memory is for {blocks}")


def compile_all(search: Search, on_done: builds.OnDone | None = None) -> None:
    """Build what is left, in parallel, and drop what the compiler makes slow, or cannot build."""
    for causal in search.masks:
        left, problem = search.alive, search.example(causal)
        configs = [selector.configure_row(candidate.row, problem) for candidate in left]
        jobs = [builds.job_of(config, search.arch) for config in configs]
        made = compiler.compile_each(jobs, on_done=on_done)
        for candidate, config, done in zip(left, configs, made, strict=True):
            if isinstance(done, nvrtc.CompileError):
                candidate.drop("does not compile", re.split(r"\n|\. ", done.log.strip())[0])
                continue
            if isinstance(done, Exception):
                raise done
            candidate.builds[causal] = builds.describe_build(config, done)
            for kind, reason in faults(candidate.builds[causal], done.log):
                candidate.drop(kind, reason)
                break


def faults(build: builds.Build, log: str) -> Iterator[tuple[str, str]]:
    """Why a build would be slow, by kind."""
    if build.spill_bytes or build.local_bytes:
        yield "spills", f"{max(build.spill_bytes, build.local_bytes)} bytes"
    if found := _SERIALIZED.search(log):
        yield "serialised", found[0].strip("()")


class Arena:
    """The GPU: checks, and rounds in which all candidates take turns on the same inputs."""

    def __init__(self, search: Search) -> None:
        import cupy

        self._search = search
        largest = max(search.cells.values(), key=lambda problem: problem.batch * problem.seqlen_q)
        self._inputs = [x.ravel() for x in to_gpu(inputs.inputs(largest, seed=0))]
        self._flushed = cupy.empty(FLUSH_BYTES, cupy.int8)

    def check(self, step: Step) -> None:
        """Drop every candidate that is further from float64 than it may be."""
        for causal in self._search.masks:
            like = self._search.example(causal)
            problem = contiguous_problem(
                *(*CHECKED, like.head_dim),
                head_dim_v=like.head_dim_v,
                dtype=like.dtype,
                causal=causal,
            )
            host = inputs.inputs(problem, seed=0)
            known, arrays = verify.expect(problem, *host), to_gpu(host)
            blank = np.full(problem.output_shape, np.nan, host[0].dtype)
            for candidate in self._search.alive:
                step(f"checking {candidate.name}")
                (out,) = to_gpu([blank])
                try:
                    bound = plan(*arrays, out=out, return_lse=True, **candidate.arguments(causal))
                    bound.arrays["lse"].fill(np.nan)
                    bound.launch()
                    _wait()
                except RuntimeError as error:  # it takes the GPU from all that come after it
                    raise RuntimeError(f"{candidate.name}, causal={causal}: {error}") from error
                candidate.judge(verify.check_plan(bound, *host, known=known))

    def race(self, candidates: Sequence[Candidate], rounds: int, step: Step) -> None:
        """Time candidates, the current row among them, at every cell."""
        import cupy

        for name, problem in self._search.cells.items():
            step(f"timing {len(candidates)} tiles at {name}")
            operands = zip(self._inputs, (problem.q, problem.k, problem.v), strict=True)
            q, k, v = (_shaped(x, *operand.shape) for x, operand in operands)
            out = cupy.empty((*q.shape[:3], problem.head_dim_v), q.dtype)
            timers = {}
            for c in candidates:
                arguments = c.arguments(problem.causal is True)
                bound = plan(q, k, v, out=out, layout="bshd", **arguments)
                timers[c.name] = self._timer(bound.launch)
            record(self._search, candidates, name, take_turns(timers, rounds, _BUDGET_S))

    def _timer(self, run: Callable[[], None]) -> Timer:
        import cupy

        start, end = cupy.cuda.Event(), cupy.cuda.Event()

        def timer() -> float:
            self._flushed.fill(0)
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(cupy.cuda.get_elapsed_time(start, end)) * 1e3

        return timer


def _shaped(x: Any, b: int, h: int, s: int, d: int) -> Any:
    """So many of the first elements, as (B, S, H, D)."""
    return x[: b * h * s * d].reshape(b, s, h, d)


def _wait() -> None:
    """Wait for the GPU, but not for ever: a tile may be the first on which a kernel hangs."""
    import cupy

    end, begun = cupy.cuda.Event(), time.monotonic()
    end.record()
    while not end.done:
        if time.monotonic() - begun > _PATIENCE_S:
            raise RuntimeError(f"still running after {_PATIENCE_S:.0f} s")
        time.sleep(1e-3)


def record(
    search: Search, candidates: Sequence[Candidate], cell: str, entries: Mapping[str, Entry]
) -> None:
    """Note what was measured at a cell, and drop what failed."""
    base = entries[search.current.name].us
    for candidate in candidates:
        entry = entries[candidate.name]
        if entry.us is None:
            candidate.drop("fails", f"{cell}: {entry.reason}")
        elif base is not None:
            candidate.entries[cell] = entry
            candidate.ratios[cell] = base / entry.us


def measure(search: Search, top: int, rounds: int, step: Step) -> list[Candidate]:
    """Check and race all that is left; returns the finalists, the fastest first."""
    arena = Arena(search)
    arena.check(step)
    arena.race(search.alive, _HEATS, step)
    finalists = search.alive[:top]
    if search.current not in finalists:
        finalists.append(search.current)
    arena.race(finalists, rounds, step)
    return [candidate for candidate in search.alive if candidate in finalists]


def run(search: Search, top: int, rounds: int, *, on_gpu: bool) -> list[Candidate]:
    """The whole search, or what of it needs no GPU; returns what is worth showing."""
    with progress(console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=None, last="")
        compile_all(search, lambda done: bar.update(task, advance=1, last=builds.what(done)))
        if not on_gpu:
            return search.alive
        bar.reset(task, description="measuring", total=None)
        return measure(search, top, rounds, lambda word: bar.update(task, advance=1, last=word))


# --- what is shown -------------------------------------------------------------------------------

_POSITIONAL = {Row: 3, Tile: 2}


def source_of(value: Any) -> str:
    """A row as it would stand in the table: without fields that have their default."""
    if type(value) not in _POSITIONAL:
        return repr(value).replace("'", '"')
    count, parts = _POSITIONAL[type(value)], []
    for index, known in enumerate(fields(value)):
        own = getattr(value, known.name)
        if index < count:
            parts.append(source_of(own))
        elif own != known.default:
            parts.append(f"{known.name}={source_of(own)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def report(search: Search, shown: Sequence[Candidate], where: str) -> Group:
    """What is printed, but for the last line."""
    problem, row = next(iter(search.cells.values())), search.current.row
    what = f"{row.kernel}, D={problem.head_dim} Dv={problem.head_dim_v} {problem.dtype}"
    lines = [f"{what}, {where}", f"now {source_of(row)}", f"{len(search.candidates)} tiles"]
    lines += dropped_lines(search)
    return Group(*map(Text, lines), "", table_of(search, shown))


def dropped_lines(search: Search) -> Iterator[str]:
    """How many candidates were dropped, and which, by kind; of those not even built, an example."""
    kinds: dict[str, list[Candidate]] = {}
    for candidate in search.candidates:
        if candidate.dropped is not None:
            kinds.setdefault(candidate.dropped[0], []).append(candidate)
    for kind, those in kinds.items():
        told = [f"{c.name} ({c.dropped[1]})" for c in those if c.dropped is not None]
        listed = f"such as {told[0]}" if kind in _CHECKS else ", ".join(told)
        yield f"{len(those)} dropped, {kind}: {listed}"


def table_of(search: Search, shown: Sequence[Candidate]) -> Group:
    """Resources, and speeds where there are some."""
    timed = any(candidate.ratios for candidate in shown)
    names = list(search.cells) if timed else []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("tile", no_wrap=True)
    for name in (*["speed"] * timed, "regs", "KiB", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in shown:
        used = builds.combined(list(candidate.builds.values()))
        row = [f"{candidate.speed:.3f}"] if candidate.speed is not None else [""] * timed
        row += [str(used["registers"]), kib(used["shared_bytes"])]
        row += [_rate(search.cells[name], candidate.entries.get(name)) for name in names]
        table.add_row(candidate.name, *row, style="bold" if candidate.is_current else "")
    note = "tile: queries x keys, s: stages, w: warps, if not of 16 rows, b: min_blocks; bold: now"
    if timed:
        note += f"\nspeed: relative to now's; then TFLOP/s by length, c: causal\n{METHOD}"
    return Group(table, Text(note, style="dim"))


def _rate(problem: AttentionProblem, entry: Entry | None) -> str:
    return "" if entry is None or not entry.us else significant(problem.flops / entry.us / 1e6)


def to_json(search: Search, machine: Mapping[str, Any], best: Candidate | None) -> dict[str, Any]:
    """Everything that was found out."""
    return {
        "machine": machine,
        "method": METHOD,
        "cells": {name: problem_json(problem) for name, problem in search.cells.items()},
        "current": source_of(search.current.row),
        "best": None if best is None else source_of(best.row),
        "candidates": [
            {
                "name": c.name,
                "row": source_of(c.row),
                "tile": asdict(c.row.tile),
                "current": c.is_current,
                "dropped": c.dropped and dict(zip(("kind", "reason"), c.dropped, strict=True)),
                "builds": {
                    "causal" if causal else "full": build.to_json()
                    for causal, build in c.builds.items()
                },
                "error": c.error,
                "speed": c.speed,
                "cells": {
                    name: asdict(entry) | {"speed": c.ratios[name]}
                    for name, entry in c.entries.items()
                },
            }
            for c in search.candidates
        ],
    }


def _values(name: str, flag: str) -> Callable[[Any], Any]:
    return click.option(flag, name, type=POSITIVE, multiple=True, help="Values to try instead.")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kernel", type=click.Choice(list(SPACES)), default="wgmma_sm90", show_default=True)
@click.option("--D", "dim", type=POSITIVE, default=128, show_default=True, help="Head dim.")
@click.option("--Dv", "dim_v", type=POSITIVE, help="That of v, where it differs.")
@click.option("--dtype", type=click.Choice(DTYPES), default=cells.DTYPE, show_default=True)
@click.option("--S", "lengths", type=POSITIVE, multiple=True, default=LENGTHS, show_default=True)
@click.option("--causal/--no-causal", default=None, help="One of them alone.")
@_values("block_m", "--block-m")
@_values("block_n", "--block-n")
@_values("num_stages", "--stages")
@click.option("--top", type=POSITIVE, default=12, show_default=True, help="Tiles timed again.")
@click.option("--rounds", type=POSITIVE, default=20, show_default=True, help="Of that.")
@click.option("--json", "json_path", callback=writable(), type=click.Path(path_type=Path))
def main(
    kernel: str,
    dim: int,
    dim_v: int | None,
    dtype: str,
    lengths: tuple[int, ...],
    causal: bool | None,
    top: int,
    rounds: int,
    json_path: Path | None,
    **given: tuple[int, ...],
) -> None:
    """Search for the tile that is fastest at a head dim, and print its row of the table.

    The options for tiles, and --S, may be given several times.
    """
    no_gpu = compiler.no_gpu_reason()
    masks = (False, True) if causal is None else (causal,)
    try:
        arch = builds.target(None, on_gpu=no_gpu is None)
        problems = cells_of((dim, dim_v or dim), dtype, lengths, masks)
        search = begin(kernel, problems, SPACES[kernel].restricted(**given), arch)
        shown = run(search, top, rounds, on_gpu=no_gpu is None)
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    here = machine.machine(arch)
    console().print(report(search, shown, f"{here.gpu or 'no GPU'}, {arch}"))
    best = shown[0] if no_gpu is None else None
    if json_path is not None:
        found = clean(to_json(search, here.to_json(), best))
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if best is None:
        click.echo(f"{no_gpu}: compiled, but neither checked nor timed")
    else:
        click.echo(source_of(best.row))


if __name__ == "__main__":
    main()
