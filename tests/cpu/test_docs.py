"""What the documents point at exists, what they show runs, and what they list is all there is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import ROOT, gpu_skip_reason

import flashcore_cupy
from flashcore_cupy.cpu.emulator.build import cxx
from flashcore_cupy.problem.request import ARGUMENTS
from flashcore_cupy.select import registry, selector
from flashcore_cupy.select.backward_table import BACKWARD_KERNELS

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/kernels").glob("*.md")])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES, ROOT / "kernels/README.md"])
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
# A block of Python, and what the comment above it says that it needs besides NumPy.
BLOCK = re.compile(r"(?:<!-- needs: ([\w-]+) -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHOWN_PAGES = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
PATH = re.compile(r"`((?:kernels|flashcore_cupy|tests|docs|benchmarks|examples)/[\w./*-]*)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name}: {link}"
    for path in PATH.findall(text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{document.name}: {path}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1500
    notes = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    assert len(notes.splitlines()) <= 150


def test_contributing_says_where_to_add_things() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for what in ("a head dim or a tile", "a rule", "a kernel"):
        assert LINK.search(text.partition(f"\n## Add {what}\n")[2].partition("\n## ")[0]), what


def test_the_manual_has_every_argument() -> None:
    table = _section("docs/attention.md", "## Every argument")
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert sorted(named) == sorted(ARGUMENTS)


def test_the_manual_has_every_environment_variable() -> None:
    package = Path(flashcore_cupy.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    read = set(re.findall(r"\bFLASHCORE_[A-Z][A-Z_]*[A-Z]\b", sources))
    table = _section("docs/caches.md", "## Environment variables")
    assert read == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) != set()


def test_the_manual_lists_commands_and_options_by_itself() -> None:
    """Sphinx asks click for all of them; the page's own table has each command once."""
    page = (ROOT / "docs/command_line.md").read_text(encoding="utf-8")
    assert ".. click:: cli:main\n   :prog: flashcore-cupy\n   :nested: full\n" in page
    asked = "import cli; print(*cli.main.commands)"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert sorted(table) == sorted(done.stdout.split())


def test_the_manual_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in flashcore_cupy.__all__:
        assert f":: flashcore_cupy.{name}\n" in page, name


@pytest.mark.parametrize("page", SHOWN_PAGES, ids=lambda page: page.stem)
def test_the_examples_of_the_manual_run(page: Path) -> None:
    """The blocks of a page, one after the other, as far as what they need is here."""
    has_gpu = gpu_skip_reason() is None
    here = {
        "": True,
        "gpu": has_gpu,
        "torch": importlib.util.find_spec("torch") is not None,
        "jax": importlib.util.find_spec("jax") is not None,
        "torch-gpu": has_gpu and importlib.util.find_spec("torch") is not None,
        "compiler": cxx() is not None,
        "flash_attn": has_gpu and importlib.util.find_spec("flash_attn") is not None,
    }
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    code = ""
    for block in blocks:
        line = text.count("\n", 0, block.start(2))
        compile("\n" * line + block[2], str(page), "exec")  # those that do not run here, too
        if here[block[1] or ""]:
            code += block[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(flashcore_cupy.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_manual_has_the_widest_heads() -> None:
    rows = [row for kernel in registry.AUTO_ORDER for row in selector.rows_of(kernel)]
    half, full = (
        max(row.head_dim for row in rows if dtype in row.dtypes) for dtype in ("float16", "float32")
    )
    claim = f"D and Dv up to {half}, with float32 up to {full}."
    assert claim in _section("docs/attention.md", "## Every argument")
    shown = " ".join(_section("README.md", "## What it takes").split())
    assert f"Heads of up to {half} columns, with float32 up to {full}." in shown


def test_kernel_notes_show_tiles_of_the_table() -> None:
    table = _section("docs/kernels/mma_sm80.md", "## Warps")
    shown = {
        (int(cells[1]), *map(int, found.groups()))
        for cells in (line.split("|") for line in table.splitlines() if re.match(r"\| \d", line))
        for found in map(re.compile(r" (\d+) x (\d+),").match, cells[2:])
        if found
    }
    rows = selector.rows_of("mma_sm80")
    assert len(shown) > 8
    assert shown <= {(row.head_dim, row.tile.block_m, row.tile.block_n) for row in rows}


def test_readme_shows_what_an_example_runs() -> None:
    """Each paragraph of the block that has no imports of its own stands in a script."""
    blocks = [block[2] for block in BLOCK.finditer((ROOT / "README.md").read_text("utf-8"))]
    (block,) = (block for block in blocks if "import " not in block)
    source = (ROOT / "examples/score_mod.py").read_text(encoding="utf-8")
    for paragraph in block.strip().split("\n\n"):
        assert paragraph in source or textwrap.indent(paragraph, "    ") in source, paragraph


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


def test_kernel_notes_name_every_rung() -> None:
    """In the ladder, and on a page that explains it."""
    pages = [path for path in (ROOT / "docs/kernels").glob("*.md") if path.stem != "index"]
    for places in ([ROOT / "kernels/README.md"], pages):
        text = "".join(path.read_text(encoding="utf-8") for path in places)
        named = set(re.findall(r"`(\w+)`", text))
        assert not set(flashcore_cupy.KERNELS) - named, places


def test_the_newest_receipt_is_of_every_kernel() -> None:
    """The last committed run on a GPU: complete and green."""
    files = (ROOT / "benchmarks/results").glob("*/selftest.json")
    receipts = [json.loads(path.read_text()) for path in files]
    newest = max(receipts, key=lambda receipt: receipt["date"])
    assert re.fullmatch("[0-9a-f]{12}", newest["kernels_digest"])
    assert newest["failed"] == 0 and newest["passed"] == len(newest["rows"]) > 700
    assert newest["emulated"] is False and re.search("H[12]00", newest["gpu"])
    assert {row["kernel"] for row in newest["rows"]} == {*flashcore_cupy.KERNELS, *BACKWARD_KERNELS}


def _section(document: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level."""
    text = (ROOT / document).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    return text.partition("\n## ")[0]
