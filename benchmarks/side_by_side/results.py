"""Measured figures and what follows from them: ratios, geometric means, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from side_by_side.cells import Cell

OURS = "ours"
FLASH2 = "torch-flash2"
#: Backends of torch's scaled_dot_product_attention.
CUDNN = "torch-cudnn"
SDPA = (FLASH2, CUDNN, "torch-efficient")
#: torch's varlen_attn: packed sequences alone.
VARLEN = "torch-varlen"
#: torch's flex_attention, compiled: block masks alone.
FLEX = "torch-flex"
FA4 = "fa4"
PEERS = (*SDPA, VARLEN, FLEX, FA4)
BACKENDS = (OURS, *PEERS)
#: Of the backward pass: ours that adds in any order, and peers that repeat their bits, as "ours"
#: does.
OURS_ANY = "ours-any"
FLASH2_FIXED, FA4_FIXED = f"{FLASH2}-det", f"{FA4}-det"
FIXED = (FLASH2_FIXED, FA4_FIXED)
OWN = (OURS, OURS_ANY)
NAMES = (*OWN, *PEERS, *FIXED)
#: What ``Report.methods`` has of the load, beside the groups.
LOAD = "load"


@dataclass(frozen=True)
class Load:
    """What a backend does, and takes, when it runs for seconds without a pause."""

    us: float
    """Per call."""
    watts: float
    sm_mhz: float
    pj_per_flop: float


@dataclass(frozen=True)
class Entry:
    """One backend on one cell: microseconds per call over samples, or why there are none."""

    us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    samples: int = 0
    gpu_us: float | None = None
    """Time on the GPU, where ``us`` is the time that Python sees."""
    note: str = ""
    reason: str | None = None
    """Why there is no figure."""
    load: Load | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Read what ``asdict`` gave."""
        load = data.get("load")
        return cls(**{**data, "load": None if load is None else Load(**load)})

    @classmethod
    def of(cls, sample_us: Sequence[float], **more: Any) -> Entry:
        """Summarise samples; at least one."""
        p10, median, p90 = np.percentile(np.asarray(sample_us, float), [10, 50, 90])
        return cls(float(median), float(p10), float(p90), len(sample_us), **more)

    @property
    def spread(self) -> float | None:
        """(p90 - p10) / median."""
        if self.us is None or self.p10_us is None or self.p90_us is None:
            return None
        return (self.p90_us - self.p10_us) / self.us


@dataclass(frozen=True)
class Row:
    """One cell with all backends that were tried on it."""

    cell: Cell
    entries: Mapping[str, Entry]
    check: str = ""
    """What the correctness gate found of ours."""

    def us(self, name: str) -> float | None:
        """Microseconds of a backend, if it has them."""
        entry = self.entries.get(name)
        return None if entry is None else entry.us

    @property
    def beside_peers(self) -> str:
        """Which of ours promises what the peers do: backward, no bits."""
        return OURS_ANY if self.cell.is_backward else OURS

    def speedup(self, peer: str) -> float | None:
        """A peer's time by ours: above 1, ours is faster."""
        return _ratio(self.us(peer), self.us(self.beside_peers))

    def speedup_to_best(self) -> float | None:
        """The fastest peer's time by ours."""
        return self._to_best(PEERS, self.beside_peers)

    def speedup_with_bits(self) -> float | None:
        """Of those that give the same bits each time: the fastest peer's time by ours."""
        return self._to_best(FIXED, OURS)

    def speed_kept_with_bits(self) -> float | None:
        """Our time in any order by that with the same bits each time: what these leave."""
        return _ratio(self.us(OURS_ANY), self.us(OURS))

    def _to_best(self, peers: Sequence[str], ours: str) -> float | None:
        times = [t for t in map(self.us, peers) if t is not None]
        return _ratio(min(times), self.us(ours)) if times else None

    def load(self, name: str) -> Load | None:
        """What a backend takes under load, if that was measured."""
        entry = self.entries.get(name)
        return None if entry is None else entry.load

    def energy_to_best(self) -> float | None:
        """The thriftiest peer's energy by ours: above 1, ours takes less."""
        ours = self.load(self.beside_peers)
        energies = [load.pj_per_flop for load in map(self.load, PEERS) if load is not None]
        return None if ours is None or not energies else min(energies) / ours.pj_per_flop

    @property
    def spread(self) -> float | None:
        """The widest of its entries."""
        return max((e.spread for e in self.entries.values() if e.spread is not None), default=None)


@dataclass
class Report:
    """Everything that was measured in one run; its JSON is enough to draw it again."""

    machine: Mapping[str, Any]
    ceilings: Mapping[str, float]
    """"matmul_tflops" and "copy_gbs", measured in the same run."""
    methods: dict[str, str]
    """How each group is timed, and the load, if any."""
    rows: list[Row] = field(default_factory=list)

    def of_group(self, group: str) -> list[Row]:
        """The rows of one group."""
        return [row for row in self.rows if row.cell.group == group]

    @property
    def ok(self) -> bool:
        """Whether ours has a figure, of a right result, in every cell."""
        own = [(row, name) for row in self.rows for name in {OURS, row.beside_peers}]
        return all(row.us(name) is not None for row, name in own)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "ok": self.ok,
            "machine": dict(self.machine),
            "ceilings": dict(self.ceilings),
            "methods": dict(self.methods),
            "rows": [
                {
                    **row.cell.to_json(),
                    "check": row.check,
                    "backends": {name: asdict(entry) for name, entry in row.entries.items()},
                    "speedup_to_best": row.speedup_to_best(),
                    "speedup_to_flash2": row.speedup(FLASH2),
                    "speedup_with_bits": row.speedup_with_bits(),
                    "speed_kept_with_bits": row.speed_kept_with_bits(),
                    "energy_to_best": row.energy_to_best(),
                }
                for row in self.rows
            ],
        }

    def save(self, path: Path) -> None:
        """Write the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what ``save`` wrote. Raises ``ValueError`` for anything else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [
                Row(
                    Cell.from_json(row),
                    {name: Entry.from_json(entry) for name, entry in row["backends"].items()},
                    row["check"],
                )
                for row in data["rows"]
            ]
            return cls(data["machine"], data["ceilings"], data["methods"], rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a result of this benchmark: {error!r}") from None


def geometric_mean(values: Iterable[float | None]) -> tuple[float | None, int]:
    """The geometric mean of the values that are there, and how many those are."""
    logs = [math.log(v) for v in values if v is not None]
    return (math.exp(sum(logs) / len(logs)) if logs else None), len(logs)


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator
