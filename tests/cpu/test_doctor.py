"""The doctor finds what breaks a first call, says how to cure it, and never breaks itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import finding

from flashcore_cupy.check import doctor
from flashcore_cupy.check.doctor import examine
from flashcore_cupy.jit import cache, compiler, nvrtc

pytestmark = pytest.mark.usefixtures("own_settings")


def test_report_is_complete_and_json() -> None:
    report = examine()
    names = [item.name for item in report.findings]
    assert names == [
        *("Python", "flashcore-cupy", "FLASHCORE_CACHE_DIR", "CuPy packages", "CuPy", "driver"),
        *("GPU", "NVRTC", "target", "cuda-bindings", "CUDA headers", "cache", "kernels"),
        *("a tiny compile", "C++ compiler", "a CuPy call"),
    ]
    data = json.loads(json.dumps(report.to_json()))
    assert data["ok"] is report.ok
    assert [item["name"] for item in data["findings"]] == names
    assert all(set(item) == {"name", "value", "state", "cure"} for item in data["findings"])


def test_every_problem_and_note_has_one_sentence_of_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_ARCH", "sm_1")
    for item in examine().findings:
        assert item.value
        assert (item.cure == "") == (item.state == "ok"), item
        assert item.state == "ok" or item.cure.endswith("."), item


def test_two_cupy_packages_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cupy-cuda90x", "cupy", "cupy-xarray"):  # the last brings no `cupy`
        folder = tmp_path / "more" / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "more")
    found = finding("CuPy packages")
    assert found.state == "problem"
    assert "cupy-cuda90x" in found.value and "xarray" not in found.value
    assert f"pip uninstall -y {' '.join(doctor.cupy_packages())}" in found.cure


def test_broken_cupy_is_a_problem_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(doctor, "cupy_packages", lambda: ["cupy-cuda12x"])
    found = finding("CuPy")
    assert found.state == "problem" and "pip install cupy-cuda12x" in found.cure
    assert not examine().ok
    assert finding("GPU").value == "none: CuPy is not installed"


def test_platform_without_cupy_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_nvrtc() -> tuple[int, int]:
        raise RuntimeError("compiling a kernel needs CuPy")

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(doctor, "cupy_packages", lambda: [])
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(nvrtc, "nvrtc_version", no_nvrtc)
    monkeypatch.setattr(nvrtc, "known_archs", no_nvrtc)
    assert examine().problems == ()
    assert finding("NVRTC").state == finding("a tiny compile").state == "note"


@pytest.mark.parametrize(
    ("driver", "reason", "state", "nvrtc_state"),
    [
        (99000, None, "ok", "ok"),
        (10020, None, "ok", "problem"),  # older by a whole CUDA release than NVRTC's code
        (12020, "cudaErrorInsufficientDriver: too old", "problem", "ok"),
        (0, "there is no NVIDIA driver", "note", "ok"),
    ],
)
def test_driver(
    monkeypatch: pytest.MonkeyPatch, driver: int, reason: str | None, state: str, nvrtc_state: str
) -> None:
    runtime = SimpleNamespace(driverGetVersion=lambda: driver)
    monkeypatch.setattr(doctor, "_runtime", lambda: runtime)
    monkeypatch.setattr(compiler, "no_gpu_reason", lambda: reason)
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (12, 9))
    found = doctor._driver()
    assert found.state == state
    assert driver == 0 or f"CUDA {driver // 1000}.{driver % 1000 // 10}" in found.value
    assert doctor._nvrtc_library().state == nvrtc_state


def test_unwritable_cache_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found = finding("cache")
    assert found.state == "problem" and "FLASHCORE_CACHE_DIR" in found.cure


def test_cache_that_others_write_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o770)
    assert finding("cache").cure.endswith(f"chmod 700 {tmp_path / 'cache'}.")
    (tmp_path / "cache").chmod(0o750)
    assert finding("cache").state == "ok"


def test_damaged_entries_are_noted() -> None:
    cache.store("0" * 32, b"cubin", {})
    assert finding("cache").state == "ok"
    (entry,) = cache.cache_entries()
    (entry.path / "kernel.cubin").write_bytes(b"other")
    found = finding("cache")
    assert found.state == "note" and "1 damaged" in found.value


def test_kernels_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_KERNELS_DIR", str(tmp_path / "nowhere"))
    assert finding("kernels").state == "problem"
    (tmp_path / "nowhere").mkdir()
    found = finding("kernels")
    assert found.state == "problem" and ": 0 files" in found.value


def test_a_failing_check_is_reported_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[object]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(cache, "cache_entries", broken)
    report = examine()
    (found,) = report.problems
    assert (found.name, found.value) == ("cache folder", "the disk is gone")
    assert report.findings[-1].name == "a CuPy call"


@pytest.mark.parametrize(("arch", "state"), [("sm_90a", "problem"), ("sm_80", "note")])
def test_without_cuda_bindings_hopper_has_a_problem(
    monkeypatch: pytest.MonkeyPatch, arch: str, state: str
) -> None:
    def missing() -> None:
        raise RuntimeError("cuda-bindings cannot be imported")

    monkeypatch.setattr(doctor.driver, "binding", missing)
    monkeypatch.setattr(compiler, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(compiler, "device_arch", lambda: arch)
    found = doctor._tensor_maps()
    assert found.state == state and "cannot be imported" in found.value
    assert found.cure.endswith("kernel='mma_sm80'.")
