"""One search for a tile on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

from cases_tune import invoke, row_of, tune
from helpers import runs_here


def test_a_search_on_this_gpu(tmp_path: Path) -> None:
    kernel = "wgmma_sm90" if runs_here("wgmma_sm90") else "mma_sm80"
    path = tmp_path / "x.json"
    asked = ("--kernel", kernel, "--D", "64", "--S", "1024", "--block-m", "64", "--block-n", "64")
    done = invoke(*asked, "--stages", "2", "--top", "2", "--rounds", "5", "--json", str(path))
    data = json.loads(path.read_text())
    assert tune.source_of(row_of(done.stdout.splitlines()[-1])) == data["best"]
    timed = [c for c in data["candidates"] if c["dropped"] is None]
    assert len(timed) >= 2 and all(c["speed"] > 0 and c["error"] < 1 for c in timed)
    assert all(set(c["cells"]) == {"1024", "1024c"} for c in timed)
    assert next(c for c in timed if c["current"])["speed"] == 1.0
