"""The directions of includes, and the size limits, that docs and reviews rely on."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

KERNELS = ROOT / "kernels"
DEVICE_FILES = sorted(KERNELS.rglob("*.cu*"))
ENTRIES = sorted(KERNELS.rglob("*.cu"))
COLUMNS, FUNCTION_LINES = 100, 60
ENTRY_LINES, HEADER_LINES = 350, 250

# A header of flashcore/ includes headers of lower layers, or of its own, without a cycle: files and
# folders of flashcore/, lowest first. A new one gets its place.
DEVICE_LAYERS = (
    "types",
    "ptx",
    "params",
    "params_hopper",
    "params_backward",
    "params_backward_hopper",
    "debug",
    "tile",
    "pipeline",
    "rules",
    "scheduler",
    "softmax",
    "output",
)
# The pages of one family, in a folder that is called like its entry file, or of the teaching
# kernels: they alone, and entry files, include config. Families of the backward pass share pages.
FORWARD = tuple(path.stem.removeprefix("fwd_") for path in KERNELS.glob("fwd_*.cu"))
FAMILIES = (
    *("ladder", *FORWARD, "backward"),
    *("sm80_backward", "sm90_backward", "sm90_wide_backward"),
)
#: Folders that others than the family itself may include.
SHARED = {
    "backward": ("sm80_backward", "sm90_backward", "sm90_wide_backward"),
    "sm90_backward": ("sm90_wide_backward",),
}
#: What only flashcore/ptx may say: instructions, and CUDA's own names.
CUDA_BUILTIN = re.compile(
    r"\basm\b|\b__(?!global__|device__|host__|constant__|restrict__|forceinline__|"
    r"noinline__|launch_bounds__|align__|grid_constant__|cluster_dims__|builtin_bit_cast)\w*\s*\("
    r"|\b(?:threadIdx|blockIdx|blockDim|gridDim|warpSize)\b|\b__shared__\b|\b__CUDA_ARCH__\b"
    r"|\batomic[A-Z]\w*"
)
FUNCTION_START = re.compile(r"^[^\n#/]*\b__(?:device|global)__\b[^;{}]*\{", re.MULTILINE)


def _includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE)


def _device_name(path: Path) -> str:
    """Such as "flashcore/tile/tile_copy.cuh"."""
    return path.relative_to(KERNELS).as_posix()


def _device_folder(name: str) -> str:
    """The first folder: flashcore, a family, or none for entry files and the configuration."""
    return name.rpartition("/")[0].partition("/")[0]


def _device_layer(name: str) -> int:
    layer = name.removeprefix("flashcore/").removesuffix(".cuh").partition("/")[0]
    assert layer in DEVICE_LAYERS, f"{name} has no layer yet: give it one in {Path(__file__).name}"
    return DEVICE_LAYERS.index(layer)


def _code(path: Path) -> str:
    """A device file's text with comments blanked, line by line as before."""
    blank = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    return blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), path.read_text())


def test_there_is_something_to_look_at() -> None:
    assert len(ENTRIES) >= 3 and len(DEVICE_FILES) >= 10


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
def test_device_includes_run_one_way(path: Path) -> None:
    own = _device_name(path)
    folder = _device_folder(own)
    for include in _includes(path):
        name = include.strip('<>"')
        assert include.startswith("<"), f"{include}: angle brackets, from kernels/"
        assert (KERNELS / name).is_file(), f"{include} does not exist"
        target = _device_folder(name)
        if folder == "flashcore":
            assert target == "flashcore", f"{own} → {name}: building blocks know no family"
            assert _device_layer(name) <= _device_layer(own), f"{own} → {name}"
        elif own == "config.cuh":
            assert target == "flashcore", f"{own} → {name}"
        elif folder in FAMILIES:
            shared = {shared for shared, users in SHARED.items() if folder in users}
            assert target in {"", "flashcore", folder} | shared, f"{own} → {name}: another family's"
        else:
            families = {target} & set(FAMILIES)
            assert families <= _families_of(path), f"{own} → {name}: another family's"


def _families_of(entry: Path) -> set[str]:
    """The folders that an entry file may include."""
    pass_, _, family = entry.stem.partition("_")
    if pass_ == "fwd":
        return {family}
    own = f"{family.removesuffix('_bias')}_backward"
    return {"backward", own} | {shared for shared, users in SHARED.items() if own in users}


def test_device_folders_are_known() -> None:
    folders = {_device_folder(_device_name(path)) for path in DEVICE_FILES}
    assert {"", "flashcore"} <= folders <= {"", "flashcore", *FAMILIES}
    assert {_device_name(path) for path in DEVICE_FILES if path.parent == KERNELS} == {
        "config.cuh",
        *("block_mask.cu", "tile_lists.cu"),  # what makes and reads block masks
        *(path.name for path in KERNELS.glob("[fb]wd_*.cu")),
    }


def test_device_includes_have_no_cycle() -> None:
    graph = {
        _device_name(path): {include.strip('<>"') for include in _includes(path)}
        for path in DEVICE_FILES
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
def test_cuda_is_spoken_in_the_ptx_headers_alone(path: Path) -> None:
    found = CUDA_BUILTIN.search(_code(path))
    if _device_name(path).startswith("flashcore/ptx/"):
        assert found, "a ptx header wraps instructions"
    else:
        assert found is None, f"{found[0]!r} belongs into flashcore/ptx/" if found else ""


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
def test_only_config_reads_the_defines(path: Path) -> None:
    if _device_name(path) != "config.cuh":
        assert not re.search(r"\bFC_\w+", _code(path))


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
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
