"""What the documents point at exists."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

from flashcore_cupy import tiles
from flashcore_cupy.request import ARGUMENTS

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels/README.md"])
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
EXCERPT = re.compile(r"\]\((examples/\w+\.py)\)[^`]*```python\n(.*?)```", re.DOTALL)
PATH = re.compile(r"`((?:kernels|flashcore_cupy|tests|docs|benchmarks|examples)/[\w./*-]*)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name}: {link}"
    for path in PATH.findall(text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{document.name}: {path}"


def test_readme_says_where_to_add_things() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where do I add")[2]
    rows = [line for line in table.splitlines() if line.startswith("| a")]
    assert len(rows) >= 6
    assert all(LINK.search(row) for row in rows)


def test_readme_has_every_argument() -> None:
    table = _section("README.md", "## What it does")
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert sorted(named) == sorted(ARGUMENTS)


def test_readme_has_the_widest_heads() -> None:
    rows = [row for kernel in tiles.AUTO_ORDER for row in tiles.rows_of(kernel)]
    half, full = (
        max(row.head_dim for row in rows if dtype in row.dtypes) for dtype in ("float16", "float32")
    )
    claim = f"D and Dv up to {half}, with float32 up to {full}."
    assert claim in _section("README.md", "## What it does")


def test_kernel_notes_show_tiles_of_the_table() -> None:
    table = _section("kernels/README.md", "#### Warps")
    shown = {
        (int(cells[1]), *map(int, found.groups()))
        for cells in (line.split("|") for line in table.splitlines() if re.match(r"\| \d", line))
        for found in map(re.compile(r" (\d+) x (\d+),").match, cells[2:])
        if found
    }
    rows = tiles.rows_of("mma_sm80")
    assert len(shown) > 8
    assert shown <= {(row.head_dim, row.tile.block_m, row.tile.block_n) for row in rows}


def test_readme_shows_what_the_examples_run() -> None:
    """Each paragraph of a code block stands in the script that its link names."""
    blocks = EXCERPT.findall(_section("README.md", "## Examples"))
    assert len(blocks) == 3
    for script, block in blocks:
        source = (ROOT / script).read_text(encoding="utf-8")
        for paragraph in block.strip().split("\n\n"):
            indented = textwrap.indent(paragraph, "    ")
            assert paragraph in source or indented in source, f"{script}: {paragraph}"


def test_kernel_notes_place_every_header_in_a_layer() -> None:
    table = _section("kernels/README.md", "## Layers")
    files: dict[str, list[str]] = {}
    for line in table.partition("| folder of")[2].splitlines():
        if found := re.match(r"\| (?:`(\w+)/` )?\| (`.*?) \|", line):
            files.setdefault(found[1] or "", []).extend(re.findall(r"`(\w+)`", found[2]))
    flashcore = ROOT / "kernels/flashcore"
    folders = [flashcore, *(path for path in flashcore.iterdir() if path.is_dir())]
    headers = {
        "" if folder == flashcore else folder.name: sorted(p.stem for p in folder.glob("*.cuh"))
        for folder in folders
    }
    assert {folder: sorted(names) for folder, names in files.items()} == headers


def test_readme_and_kernel_notes_name_every_rung() -> None:
    for name in ("README.md", "kernels/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [kernel for kernel in tiles.KERNELS if kernel not in text], name


def test_the_newest_receipt_is_of_every_kernel() -> None:
    """The last committed run on a GPU: complete and green."""
    files = (ROOT / "benchmarks/results").glob("*/selftest.json")
    receipts = [json.loads(path.read_text()) for path in files]
    newest = max(receipts, key=lambda receipt: receipt["date"])
    assert re.fullmatch("[0-9a-f]{12}", newest["kernels_digest"])
    assert newest["failed"] == 0 and newest["passed"] == len(newest["rows"]) > 700
    assert newest["emulated"] is False and re.search("H[12]00", newest["gpu"])
    assert {row["kernel"] for row in newest["rows"]} == set(tiles.KERNELS)


def _section(document: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level."""
    text = (ROOT / document).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    return text.partition("\n## ")[0]
