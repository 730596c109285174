"""What the doctor says where there is a compiler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import finding, gpu_skip_reason

from flashcore_cupy.check.doctor import examine
from flashcore_cupy.jit import cache, nvrtc
from flashcore_cupy.jit.sources import kernels_digest

pytestmark = pytest.mark.usefixtures("own_settings")


def test_a_sound_machine_has_no_problem() -> None:
    report = examine()
    assert report.problems == () and report.ok
    version = ".".join(map(str, nvrtc.nvrtc_version()))
    assert finding("NVRTC").value.startswith(version)
    assert kernels_digest() in finding("kernels").value
    assert str(cache.cache_dir()) in finding("cache").value
    assert " ms" in finding("a tiny compile").value


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_paths_of_the_library_and_the_headers_exist() -> None:
    assert Path(finding("NVRTC").value.split(", ", 1)[1]).is_file()
    assert (Path(finding("CUDA headers").value) / "cuda_fp16.h").is_file()


@pytest.mark.skipif(gpu_skip_reason() is None, reason="this machine has a GPU")
def test_a_missing_gpu_is_a_note_and_kernels_still_compile() -> None:
    assert {finding(name).state for name in ("driver", "GPU", "a CuPy call")} == {"note"}
    assert finding("a tiny compile").value.startswith("for sm_90a in ")


def test_unknown_target_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_1")
    found = finding("target")
    assert found.state == "problem" and "'sm_1'" in found.value and "FLASHCORE_ARCH" in found.cure
    assert finding("a tiny compile").state == "problem"
