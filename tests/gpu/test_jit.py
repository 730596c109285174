"""Compiled kernels on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases_jit import ENTRY, HEADER, compile_demo
from helpers import use_kernels

from flashcore_cupy.jit import cache, compiler


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small kernels folder and an empty cache, both used by everything in the test."""
    return use_kernels(tmp_path, {"flashcore/part.cuh": HEADER, "demo.cu": ENTRY}, monkeypatch)


# --- on a device --------------------------------------------------------------------------------


def test_loaded_kernel_runs_and_is_kept(kernels: Path) -> None:
    import cupy
    import numpy as np

    compiled = compile_demo(arch=compiler.device_arch())
    module = compiler.load(compiled)
    assert compiler.load(compile_demo(arch=compiler.device_arch())) is module
    x = cupy.arange(4, dtype=cupy.int32)
    module.get_function("demo")((1,), (4,), (x,))
    np.testing.assert_array_equal(x.get(), [1, 2, 3, 0])
    other = compile_demo(arch=compiler.device_arch(), defines={"FC_STEP": 2})
    cache.clear_cache()
    compiler.load(other).get_function("demo")((1,), (4,), (x,))
    np.testing.assert_array_equal(x.get(), [3, 0, 1, 2])
