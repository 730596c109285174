"""Every function of the PTX layer has a probe and a twin; fp32 tiles lie without conflicts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from cases_ptx import lane_offsets_f32
from helpers import PROBES, ROOT

LAYER = ROOT / "kernels" / "flashcore" / "ptx"
TWINS = ROOT / "flashcore_cupy" / "cpu" / "emulator" / "include" / "flashcore" / "ptx"
HEADERS = sorted(path.name for path in LAYER.glob("*.cuh"))
#: What a kernel may name of the layer: functions, macros like functions, types and constants.
FUNCTION = re.compile(
    r"^(?:__\w+__ |inline |constexpr )+[\w<>:*& ]+?\b(\w+)(?:<\w+>)?\(|^#define ([a-z]\w+)\(",
    re.MULTILINE,
)
TYPE = re.compile(r"^struct (?:alignas\(\d+\) )?(\w+) \{|^constexpr \w+ (\w+) =", re.MULTILINE)


def names(pattern: re.Pattern[str], header: Path) -> set[str]:
    return {one or other for one, other in pattern.findall(header.read_text())}


def test_every_function_has_a_probe() -> None:
    probes = "".join(re.sub("//.*", "", path.read_text()) for path in PROBES)
    functions = set().union(*(names(FUNCTION, LAYER / header) for header in HEADERS))
    assert {"thread_index", "swizzled", "wgmma", "from_float", "cp_async_4"} <= functions
    assert len(functions) > 80
    called = set(re.findall(r"\b(\w+)(?:<[^;()]*>)?\(", probes))
    assert sorted(functions - called) == []


@pytest.mark.parametrize("header", HEADERS)
def test_every_function_has_a_twin(header: str) -> None:
    for pattern in (FUNCTION, TYPE):
        own = names(pattern, LAYER / header)
        # Sometimes a twin stands in another header, which that one includes.
        twins = set().union(*(names(pattern, TWINS / other) for other in HEADERS))
        assert sorted(own - twins) == []


def test_every_probe_has_its_tests() -> None:
    folder = ROOT / "tests" / "probes"
    assert {path.stem for path in PROBES} == {
        path.stem.removeprefix("test_") for path in folder.glob("test_*.py")
    }


@pytest.mark.parametrize("head_dim", range(16, 513, 16))
def test_fp32_tiles_are_read_without_bank_conflicts(head_dim: int) -> None:
    q, k, v = lane_offsets_f32(head_dim + 4)
    for offsets in (q, k):  # ldmatrix: eight lanes' rows of 16 bytes at a time
        assert (offsets % 16 == 0).all()
        for rows in offsets.reshape(4, 8):
            banks = (rows[:, None] // 4 + np.arange(4)) % 32
            assert np.unique(banks).size == 32
    assert np.unique(v // 4 % 32).size == 32
    assert np.unique((v // 4 + head_dim + 4) % 32).size == 32  # the lane's other key
