"""The directions of includes, and the size limits, that docs and reviews rely on."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

KERNELS = ROOT / "kernels"
DEVICE_FILES = sorted(KERNELS.rglob("*.cu*"))
ENTRIES = sorted(KERNELS.glob("*.cu"))
COLUMNS, FUNCTION_LINES = 100, 60
ENTRY_LINES, HEADER_LINES = 710, 250

# A header includes headers of lower layers, or of its own, without a cycle.
DEVICE_LAYERS = (
    {"types"},
    {"ptx"},  # stands for every ptx*.cuh
    {"key_bits", "mod_array", "mods"},
    {"params"},
    {
        "debug",
        "mask",
        "score",
        "schedule",
        "shared_layout",
        "smem_tile",
        "places",
        "tma_pipeline",
        "work_queue",
        "wgmma_tile",
        "mma_tile",
        "mma_sync_tile",
        "mma_tf32_tile",
        "row_sharing",
        "seen_keys",
        "rows",
        "split_merge",
        "finish_row",
        "exact_row",
        "softmax",
        "epilogue",
    },
)
INTRINSIC = re.compile(
    r"\basm\b|\b__(?!global__|device__|host__|shared__|constant__|restrict__|forceinline__|"
    r"noinline__|launch_bounds__|align__|grid_constant__|cluster_dims__|builtin_bit_cast)\w*\s*\("
)
FUNCTION_START = re.compile(r"^[^\n#/]*\b__(?:device|global)__\b[^;{}]*\{", re.MULTILINE)


def _layer_of(name: str, layers: tuple[set[str], ...]) -> int:
    for number, layer in enumerate(layers):
        if name in layer:
            return number
    raise AssertionError(f"{name} has no layer yet: give it one in {Path(__file__).name}")


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*(["<][^">]*[">])', path.read_text(), re.MULTILINE)


def _header_name(include: str) -> str:
    return include.strip('<>"').removeprefix("flashcore/").removesuffix(".cuh")


def _device_layer(name: str) -> int:
    return _layer_of("ptx" if name.startswith("ptx") else name, DEVICE_LAYERS)


def _code(path: Path) -> str:
    """A device file's text with comments blanked, line by line as before."""
    blank = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    return blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), path.read_text())


def test_there_is_something_to_look_at() -> None:
    assert len(ENTRIES) >= 3 and len(DEVICE_FILES) >= 10


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: path.name)
def test_device_includes_run_one_way(path: Path) -> None:
    is_entry = path.suffix == ".cu"
    for include in _includes(path):
        header = KERNELS / include.strip('<>"')
        assert include.startswith("<flashcore/"), f"{include}: angle brackets, from kernels/"
        assert header.is_file(), f"{include} does not exist"
        name = _header_name(include)
        if name == "config":
            assert is_entry, "only entry files include config.cuh"
        elif not is_entry and path.stem != "config":
            assert _device_layer(name) <= _device_layer(path.stem), f"{path.stem} → {name}"


def test_device_includes_have_no_cycle() -> None:
    graph = {
        path.stem: {_header_name(include) for include in _includes(path)}
        for path in DEVICE_FILES
        if path.suffix == ".cuh"
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: path.name)
def test_instructions_stand_in_the_ptx_headers(path: Path) -> None:
    if path.name.startswith("ptx") and path.suffix == ".cuh":
        assert INTRINSIC.search(_code(path)), "a ptx header wraps instructions"
    else:
        found = INTRINSIC.search(_code(path))
        assert found is None, f"{found[0]!r} belongs into a ptx header" if found else ""


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: path.name)
def test_only_config_reads_the_defines(path: Path) -> None:
    if path.stem != "config":
        uses = re.findall(r"\bFC_\w+", _code(path))
        allowed = {"FC_SMEM_BYTES", "FC_PARAMS_BYTES"} if path.suffix == ".cu" else set()
        assert set(uses) <= allowed


@pytest.mark.parametrize("path", DEVICE_FILES, ids=lambda path: path.name)
def test_device_files_stay_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= (ENTRY_LINES if path.suffix == ".cu" else HEADER_LINES)
    assert _too_long(lines) == []
    code = _code(path)
    for start in FUNCTION_START.finditer(code):
        length = code.count("\n", start.start(), _closing_brace(code, start.end())) + 1
        head = code[start.start() : start.end()].strip().splitlines()[0]
        assert length <= FUNCTION_LINES, f"{head}: {length} lines"


def _too_long(lines: list[str]) -> list[int]:
    return [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]


def _closing_brace(code: str, position: int) -> int:
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(code[position], 0)
        position += 1
    return position
