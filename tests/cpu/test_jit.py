"""The JIT without its compiler: sources and their digest, reports, variables."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from cases_jit import ENTRY, HEADER, compile_demo
from helpers import ROOT, use_kernels

from flashcore_cupy.jit import cache, compiler, nvrtc, sources


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small kernels folder and an empty cache, both used by everything in the test."""
    return use_kernels(tmp_path, {"flashcore/part.cuh": HEADER, "demo.cu": ENTRY}, monkeypatch)


# --- sources ------------------------------------------------------------------------------------


def test_digest_is_what_the_documents_define(kernels: Path) -> None:
    expected = hashlib.sha256()
    for path in ("demo.cu", "flashcore/part.cuh"):
        expected.update(path.encode() + b"\0" + (kernels / path).read_bytes() + b"\0")
    assert sources.kernels_digest() == expected.hexdigest()[:12]
    assert sources.kernels_digest(kernels) == expected.hexdigest()[:12]


def test_digest_sees_sources_alone(kernels: Path) -> None:
    before = sources.kernels_digest()
    (kernels / "README.md").write_text("not a source")
    (kernels / "demo.cubin").write_text("nor this")
    assert sources.kernels_digest() == before
    (kernels / "demo.cu").rename(kernels / "other.cu")
    assert sources.kernels_digest() != before


def test_kernels_of_the_checkout_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHCORE_KERNELS_DIR", raising=False)
    assert sources.kernels_digest() == sources.kernels_digest(ROOT / "kernels")


def test_wrong_kernels_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"FLASHCORE_KERNELS_DIR=.*nowhere"):
        sources.kernels_dir()


def test_compile_many_of_nothing_and_with_nobody() -> None:
    assert compiler.compile_many([]) == []
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        compiler.compile_many([], workers=0)


def test_missing_cupy_says_what_to_install(
    kernels: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    cached = (nvrtc.nvrtc_version, nvrtc.arch_numbers, nvrtc.known_archs)
    for function in cached:
        function.cache_clear()
        request.addfinalizer(function.cache_clear)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", None)
    with pytest.raises(RuntimeError, match="pip install cupy-cuda12x, or cupy-cuda13x"):
        compile_demo()


def test_report_with_spills_and_calls_is_read() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for helper
ptxas         .     0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 48 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers"""
    assert nvrtc.parse_resources(log) == {
        "first": nvrtc.EntryResources(40, 1024, 48, 28),
        "second": nvrtc.EntryResources(8, 0, 0, 0),
    }


def test_empty_variables_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore_cupy.settings import Settings, settings

    for name in ("CACHE_DIR", "KERNELS_DIR", "ARCH", "CXXFLAGS"):
        monkeypatch.setenv(f"FLASHCORE_{name}", "")
    assert settings() == Settings(cache_dir=None, kernels_dir=None, arch=None, cxxflags=None)
    assert cache.cache_dir().name == "flashcore-cupy"
