"""What it costs a call to ask its mask_mod ahead, and what that saves.

``python benchmarks/own_lists.py --json own_lists.json``; needs this package installed (or
PYTHONPATH=.) and a GPU with mma.sync (sm_80 or later).

Each problem is timed with ``config={"own_lists": True}`` and ``False``, by turns, in CUDA graphs:
so all launches of a call count, and nothing of Python. ``select/own_lists.py`` decides by the
sizes; where it decides for the slower way, a row says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from flashcore_cupy.attention import plan
from flashcore_cupy.check import machine
from flashcore_cupy.cli.tables import console
from flashcore_cupy.jit import compiler
from flashcore_cupy.measure import timing

#: Batch, heads, length, columns. The first two are those of docs/block_masks.md; those behind have
#: as many heads, queries or scores as the decision asks for, and half of it.
SHAPES = (
    *((2, 32, 8192, 64), (2, 16, 8192, 128)),
    *((1, 16, 8192, 128), (1, 8, 8192, 128)),
    *((4, 16, 2048, 64), (2, 16, 2048, 64)),
    *((16, 16, 1024, 64), (8, 16, 1024, 64)),
    *((1, 16, 32768, 128), (1, 8, 32768, 128)),
)
MASKS = {
    "nothing hidden": "kv_idx >= 0",
    "causal": "q_idx >= kv_idx",
    "documents of 1000, causal": "q_idx / 1000 == kv_idx / 1000 && q_idx >= kv_idx",
    "prefix of a quarter": "kv_idx < {length} / 4 || q_idx >= kv_idx",
    "window of 1024": "q_idx >= kv_idx && q_idx - kv_idx <= 1024",
    "each block mixed": "(q_idx ^ kv_idx) % 3 != 0",
}
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One problem; us of a call."""

    shape: tuple[int, int, int, int]
    mask: str
    ahead_us: float
    asked_us: float
    is_ahead: bool
    """What the call decides by itself."""

    @property
    def gain(self) -> float:
        """How much faster it is to ask ahead."""
        return self.asked_us / self.ahead_us


def measure(kernel: str) -> Iterator[Row]:
    """Time every problem."""
    import cupy

    for shape in SHAPES:
        rng = cupy.random.default_rng(1)
        arrays = [rng.standard_normal(shape, dtype=cupy.float32).astype("float16") for _ in "qkv"]
        for name, text in MASKS.items():
            rules: dict[str, Any] = {"mask_mod": text.format(length=shape[2]), "kernel": kernel}
            ways = [plan(*arrays, **rules, config={"own_lists": way}) for way in (True, False)]
            found = [[_time(bound) for bound in ways] for _ in range(ROUNDS)]
            ahead, asked = (sorted(times)[ROUNDS // 2] for times in zip(*found, strict=True))
            chosen = plan(*arrays, **rules).selection.config.tile.own_lists
            yield Row(shape, name, ahead, asked, chosen)


def _time(bound: Any) -> float:
    return timing.time_graph(bound, iters=10, warmup=2).median_us


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False)
)
@click.option("--kernel", type=click.Choice(["auto", "mma_sm80", "wgmma_sm90"]), default="auto")
def main(json_path: Path | None, kernel: str) -> None:
    """Time calls that ask their mask_mod ahead, and the same with the kernel asking."""
    reason = compiler.no_gpu_reason()
    if reason is not None:
        raise click.ClickException(f"needs a GPU: {reason}")
    table = Table("B, H, S, D", "mask", "ahead, us", "by the kernel, us", "gain", "decides")
    rows = []
    for row in measure(kernel):
        rows.append(row)
        decides = "ahead" if row.is_ahead else "by the kernel"
        table.add_row(
            *(", ".join(map(str, row.shape)), row.mask, f"{row.ahead_us:.0f}"),
            *(f"{row.asked_us:.0f}", f"{row.gain:.2f}"),
            decides + (", the slower way" if row.is_ahead != (row.gain > 1) else ""),
        )
    console().print(table)
    if json_path is not None:
        found = {
            "machine": machine.machine(compiler.device_arch()).to_json(),
            "kernel": kernel,
            "rows": [asdict(row) | {"gain": row.gain} for row in rows],
        }
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
