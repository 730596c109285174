"""The search for a tile, as its tests begin one and read what it prints."""

from __future__ import annotations

import sys
from typing import Any

from click.testing import CliRunner
from helpers import ROOT

from flashcore_cupy.select.config import Tile
from flashcore_cupy.select.row import Row

sys.path.insert(0, str(ROOT / "benchmarks"))

import tune

ARCH = "sm_90a"
SMALL = tune.Space((64,), (32, 64), (1,), (16, 32))


def search_of(
    kernel: str = "mma_sm80", dim: int = 64, space: tune.Space = SMALL, masks: Any = (False, True)
) -> tune.Search:
    problems = tune.cells_of((dim, dim), "bfloat16", (1024, 2048), masks)
    return tune.begin(kernel, problems, space, ARCH)


def kinds_of(search: tune.Search) -> dict[str, str | None]:
    return {c.name: c.dropped and c.dropped[0] for c in search.candidates}


def row_of(text: str) -> Row:
    row = eval(text, {"Row": Row, "Tile": Tile})
    assert isinstance(row, Row)
    return row


def invoke(*arguments: str) -> Any:
    done = CliRunner().invoke(tune.main, arguments)
    assert done.exit_code == 0, done.output
    return done
