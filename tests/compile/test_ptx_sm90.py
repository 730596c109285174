"""The probes of Hopper's instructions compile, without a word of the compiler."""

from __future__ import annotations

import re

import pytest
from cases_ptx_sm90 import PRODUCTS

from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import compiler

REPORT = re.compile(
    r"ptxas info\s*: (\d+ bytes gmem.*|Compiling entry function .*|Function properties for \w+"
    r"|Used \d+ registers.*|Compile time = .*)"
    r"|(ptxas\s+\.)?\s*0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    r"|\s*"
)
"""A line of a compiler's report that has nothing to object."""


@pytest.mark.parametrize("name", ["cluster", "launches", "mbarrier", "tma", "wgmma"])
def test_the_compiler_has_nothing_to_object(probe_folder: object, name: str) -> None:
    """Such as wgmma serialized for want of a fence, setmaxnreg ignored, or spills."""
    compiled = compiler.compile_kernel(f"probe_{name}.cu", {}, "sm_90a")
    lines = compiled.log.splitlines()
    assert [line for line in lines if not REPORT.fullmatch(line)] == []
    if name == "wgmma":
        assert len(compiled.entries) == len(PRODUCTS) + 1
        assert compiled.entries["shared_out"].registers == 65536 // 384 // 8 * 8


@pytest.mark.parametrize("arch", targets.TARGETS)
@pytest.mark.parametrize("name", ["mbarrier", "tma", "wgmma"])
def test_the_headers_do_no_harm_elsewhere(probe_folder: object, name: str, arch: str) -> None:
    """A kernel that includes them and uses nothing of them compiles, without a word."""
    log = compiler.compile_kernel(f"probe_{name}.cu", {}, arch).log
    assert not re.search("warning|error|remark", log, re.IGNORECASE), log
