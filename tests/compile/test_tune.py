"""The search for a tile, as far as the compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases_tune import invoke, kinds_of, row_of, search_of, tune

from flashcore_cupy.jit import compiler
from flashcore_cupy.select.config import Tile
from flashcore_cupy.select.table import ROWS

# --- what the compiler says ----------------------------------------------------------------------


def test_what_spills_is_dropped() -> None:
    search = search_of(space=tune.Space((64,), (64,), (1,), (16,), (1, 8)), masks=(True,))
    tune.compile_all(search)
    assert kinds_of(search) == {
        search.current.name: None,
        "64x64 s1": None,
        "64x64 s1 b8": "spills",
    }
    assert all(c.builds[True].registers for c in search.candidates)
    (line,) = tune.dropped_lines(search)
    assert line.startswith("1 dropped, spills: 64x64 s1 b8 (") and line.endswith(" bytes)")


def test_without_a_gpu_the_search_ends_at_the_compiler(tmp_path: Path) -> None:
    if not compiler.no_gpu_reason():
        pytest.skip("a GPU is here")
    path = tmp_path / "x.json"
    asked = ("--kernel", "mma_sm80", "--D", "64", "--block-m", "64", "--block-n", "32")
    done = invoke(*asked, "--stages", "1", "--causal", "--S", "512", "--json", str(path))
    assert "compiled, but neither checked nor timed" in done.stdout.splitlines()[-1]
    assert "7 tiles" in done.stdout and "64x32 s1 w2 b3" in done.stdout
    data = json.loads(path.read_text())
    assert data["best"] is None and data["machine"]["gpu"] is None
    assert row_of(data["current"]) in ROWS and list(data["cells"]) == ["512c"]
    assert len(data["candidates"]) == 7 and data["candidates"][0]["current"] is True
    for found in data["candidates"]:
        assert Tile(**found["tile"]) == row_of(found["row"]).tile
        assert found["builds"]["causal"]["registers"] > 0 and found["speed"] is None
