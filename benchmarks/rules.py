"""What float32 and every rule cost on this GPU, next to what their arithmetic and bytes would.

``python benchmarks/rules.py --json rules.json``; needs this package installed (or PYTHONPATH=.) and
a GPU with mma.sync (sm_80 or later).

The yardstick of a row is the time of the same kernel (``--kernel``), plain and float16, on the same
shape and mask, times the arithmetic (float32: three TF32 products at half the rate of a 16-bit one,
so six times; windows: the pairs of query and key that remain), plus the bytes of bias or mask, read
once (causal: half of them), at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
from flashcore_cupy.select.registry import KERNELS

SEQLEN = 4096
SHAPES = ((4, 32, SEQLEN, 64), (4, 16, SEQLEN, 128))
WINDOW = 1024
_SOURCES = {
    "score_mod": {"score_mod": "score + 0.01f * (kv_idx - q_idx)"},
    # It leaves no block empty or full, so to ask it ahead would only cost more.
    "mask_mod": {"mask_mod": "(q_idx ^ kv_idx) % 3 != 0", "config": {"own_lists": False}},
}


@dataclass(frozen=True)
class Row:
    """One measurement; ``us`` / ``cost_us`` is how far it is from its yardstick."""

    head_dim: int
    rule: str
    causal: bool
    us: float
    cost_us: float

    @property
    def ratio(self) -> float:
        """Measured over the yardstick."""
        return self.us / self.cost_us


def arguments(shape: tuple[int, int, int, int], causal: bool) -> dict[str, dict[str, Any]]:
    """What ``attention`` is given, by the row's name; "plain" first."""
    import cupy

    batch, heads, seqlen, _ = shape
    rng = cupy.random.default_rng(0)
    full, shared = (batch, heads, seqlen, seqlen), (1, 1, seqlen, seqlen)

    def bias(form: tuple[int, ...], dtype: str) -> Any:
        return rng.standard_normal(form, dtype=cupy.float32).astype(dtype)

    def mask(form: tuple[int, ...]) -> Any:
        return rng.random(form, dtype=cupy.float32) < 0.9

    rows: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap": {"softcap": 30.0},
        "dropout": {"dropout_p": 0.1, "rng": (1, 0)},
        "alibi": {"alibi_slopes": cupy.linspace(0.01, 0.5, heads, dtype=cupy.float32)},
        "sink": {"sink": cupy.zeros(heads, cupy.float32)},
        "bias, shared": {"bias": bias(shared, "float16")},
        "bias": {"bias": bias(full, "float16")},
        "bias, float32": {"bias": bias(full, "float32")},
        "mask, shared": {"mask": mask(shared)},
        "mask": {"mask": mask(full)},
        **_SOURCES,
    }
    if causal:
        rows["window"] = {"window": (WINDOW, 0)}
    return rows


def cost_us(plain_us: float, causal: bool, chosen: Mapping[str, Any], gb_per_s: float) -> float:
    """The yardstick: see the top."""
    us = plain_us
    if "window" in chosen:
        seen = sum(min(i, WINDOW) + 1 for i in range(SEQLEN))
        us *= seen / (SEQLEN * (SEQLEN + 1) / 2)
    for value in chosen.values():
        if hasattr(value, "nbytes"):
            us += value.nbytes / (2 if causal else 1) / gb_per_s / 1e3
    return us


def copy_rate() -> float:
    """GB/s of a large copy, bytes read and written."""
    import cupy

    source = cupy.zeros(1 << 30, cupy.int8)
    target = cupy.empty_like(source)

    def copy() -> None:
        cupy.copyto(target, source)

    copied = timing.time_calls(copy, synchronize=cupy.cuda.Device().synchronize, iters=10)
    return 2 * source.nbytes / copied.median_us / 1e3


def measure(kernel: str, report: Callable[[Row], None]) -> dict[str, float]:
    """Measure every row; returns the rates that the yardsticks used."""
    import cupy

    gb_per_s = copy_rate()
    for shape in SHAPES:
        rng = cupy.random.default_rng(1)
        q, k, v = (rng.standard_normal(shape, dtype=cupy.float32) for _ in "qkv")
        half = [x.astype("float16") for x in (q, k, v)]
        for causal in (False, True):
            plain_us = 0.0
            for name, chosen in arguments(shape, causal).items():
                us = _time(kernel, half, causal, chosen)
                plain_us = plain_us or us
                report(
                    Row(shape[-1], name, causal, us, cost_us(plain_us, causal, chosen, gb_per_s))
                )
            if "float32" in KERNELS[kernel].dtypes:
                us = _time(kernel, [q, k, v], causal, {})
                report(Row(shape[-1], "float32", causal, us, 6 * plain_us))
    return {"copy_gbs": gb_per_s}


def _time(kernel: str, arrays: list[Any], causal: bool, chosen: Mapping[str, Any]) -> float:
    launched = plan(*arrays, causal=causal, kernel=kernel, **chosen)
    return timing.time_graph(launched, iters=10, warmup=2).median_us


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--json", "json_path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False)
)
@click.option(
    "--kernel",
    type=click.Choice([name for name, kernel in KERNELS.items() if kernel.has_rules]),
    default="mma_sm80",
    show_default=True,
)
def main(json_path: Path | None, kernel: str) -> None:
    """Time float32 and every rule, and compare with what they would have to cost."""
    reason = compiler.no_gpu_reason()
    if reason is not None:
        raise click.ClickException(f"needs a GPU: {reason}")
    rows: list[Row] = []
    rates = measure(kernel, rows.append)
    table = Table("D", "causal", "rule", "us", "yardstick, us", "ratio")
    for row in rows:
        table.add_row(
            *(str(row.head_dim), "yes" if row.causal else "no", row.rule),
            *(f"{row.us:.0f}", f"{row.cost_us:.0f}", f"{row.ratio:.2f}"),
        )
    console().print(table)
    if json_path is not None:
        found = {
            "machine": machine.machine(compiler.device_arch()).to_json(),
            "kernel": kernel,
            "rates": rates,
            "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
        }
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
