"""Every wrapper of an instruction has a probe; tiles of float32 lie without conflicts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cases_ptx import lane_offsets_f32
from helpers import PROBES, ROOT

HEADERS = sorted((ROOT / "kernels" / "flashcore" / "ptx").glob("*.cuh"))
WRAPPER = re.compile(r"__device__ (?:__forceinline__ )?[\w<>:]+ (\w+)\(")


def test_every_wrapper_has_a_probe() -> None:
    probes = "".join(path.read_text() for path in PROBES)
    wrappers = {name for header in HEADERS for name in WRAPPER.findall(header.read_text())}
    assert len(wrappers) > 20
    missing = sorted(name for name in wrappers if not re.search(rf"\b{name}\b", probes))
    assert not missing, f"no probe in tests/probes/ uses {missing}"


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
