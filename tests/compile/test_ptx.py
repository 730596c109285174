"""The probes of every wrapper of an instruction compile for every target."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import PROBES

from flashcore_cupy.cuda import targets
from flashcore_cupy.jit import compiler


@pytest.mark.parametrize("arch", targets.TARGETS)
def test_probes_compile(probe_folder: Path, arch: str) -> None:
    for probe in PROBES:
        if probe.name in ("cp_async.cu", "mma.cu", "mma_tf32.cu") and targets.capability(arch) < 80:
            continue  # the instructions do not exist there
        compiled = compiler.compile_kernel(f"probe_{probe.name}", {}, arch)
        assert compiled.entries
