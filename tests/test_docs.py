"""What the documents point at exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from flashcore_cupy import tiles

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels/README.md"])
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
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


def test_readme_and_kernel_notes_name_every_rung() -> None:
    for name in ("README.md", "kernels/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [kernel for kernel in tiles.KERNELS if kernel not in text], name


def test_the_receipt_is_one_of_every_kernel() -> None:
    """The committed GPU run: complete, green, and from a real GPU."""
    receipt = json.loads((ROOT / "benchmarks/results/h200/selftest.json").read_text())
    assert re.fullmatch("[0-9a-f]{12}", receipt["kernels_digest"])
    assert receipt["failed"] == 0 and receipt["passed"] == len(receipt["rows"]) > 700
    assert receipt["emulated"] is False and "H200" in receipt["gpu"]
    assert {row["kernel"] for row in receipt["rows"]} == set(tiles.KERNELS)
