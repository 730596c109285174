"""What users install: the source distribution, the wheel, the editable install, the import."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

import flashcore_cupy
from flashcore_cupy.jit.sources import kernels_digest

NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "*.egg-info", "__pycache__", "venv", "shared"
)
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, {!r})(sys.argv[1]))"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the real ones."""
    folder = tmp_path_factory.mktemp("packaging") / "checkout"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCES)
    return folder


@pytest.fixture(scope="session")
def sdist(checkout: Path) -> Path:
    return _build("build_sdist", checkout, checkout.with_name("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist: Path) -> Path:
    """The wheel, built from the unpacked source distribution."""
    folder = sdist.parent / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # quiet on 3.12, 3.13
        archive.extractall(folder)
    (source,) = folder.iterdir()
    return _build("build_wheel", source, sdist.parent.with_name("wheel"))


@pytest.fixture(scope="session")
def site(wheel: Path) -> Path:
    """A folder that looks as site-packages does after the wheel's installation."""
    folder = wheel.parent.with_name("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _build(hook: str, source: Path, output: Path) -> Path:
    output.mkdir()
    command = [sys.executable, "-c", BUILD.format(hook), str(output)]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = output.iterdir()
    return built


def _python(code: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "FLASHCORE_KERNELS_DIR"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, cwd=cwd, env=clean | dict(environment or {}), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def _kernel_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.cu*")}


# --- source distribution and wheel --------------------------------------------------------------


def test_sdist_holds_what_it_takes_to_build_and_test(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"kernels/{name}" for name in _kernel_files(ROOT / "kernels")} <= names
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert {"cli.py", "pyproject.toml", "Makefile", "LICENSE", "README.md"} <= names


def test_wheel_holds_every_kernel_and_nothing_outside_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "flashcore_cupy",
        f"flashcore_cupy-{flashcore_cupy.__version__}.dist-info",
    }
    prefix = "flashcore_cupy/kernels/"
    kernels = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    assert kernels == _kernel_files(ROOT / "kernels") and len(kernels) >= 10
    modules = {f"flashcore_cupy/{path.name}" for path in (ROOT / "flashcore_cupy").glob("*.py")}
    assert modules | {"flashcore_cupy/py.typed"} <= set(names)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_metadata(site: Path) -> None:
    (info,) = importlib.metadata.distributions(path=[str(site)])
    assert info.metadata["Name"] == "flashcore-cupy"
    assert info.version == flashcore_cupy.__version__
    assert info.metadata["License-Expression"] == "Apache-2.0"
    assert info.metadata["Requires-Python"] == ">=3.10"
    (script,) = info.entry_points
    assert (script.name, script.value) == ("flashcore-cupy", "flashcore_cupy.cli.commands:main")


@pytest.mark.parametrize(
    ("system", "machine", "has_cupy"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", True),
        ("win32", "AMD64", True),
        ("darwin", "arm64", False),
        ("linux", "riscv64", False),
    ],
)
def test_platforms_without_cupy_still_install(
    site: Path, system: str, machine: str, has_cupy: bool
) -> None:
    (info,) = importlib.metadata.distributions(path=[str(site)])
    environment = {"sys_platform": system, "platform_machine": machine, "extra": ""}
    required = {
        requirement.name
        for requirement in map(Requirement, info.requires or [])
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    gpu = {"cupy-cuda12x", "cuda-bindings", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"}
    anywhere = {"numpy", "click", "rich", "platformdirs", "ml_dtypes"}
    assert required == anywhere | (gpu if has_cupy else set())


def test_version_stands_in_one_place() -> None:
    pattern = re.compile(rf"(?<![\w.]){re.escape(flashcore_cupy.__version__)}(?![\w.])")
    files = [ROOT / "pyproject.toml", *(ROOT / "flashcore_cupy").glob("*.py")]
    holders = [path.name for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert holders == ["_version.py"]


# --- where an installed package finds its kernels -----------------------------------------------

WHERE = (
    "from flashcore_cupy.jit import sources as s; import flashcore_cupy as f; "
    "print(s.kernels_dir(), s.kernels_digest(), f.__file__, sep='\\n')"
)


def test_wheel_finds_its_own_kernels(site: Path, tmp_path: Path) -> None:
    # Somebody else's top-level `kernels` in the same site-packages must not be taken for ours.
    (site / "kernels" / "flashcore").mkdir(parents=True, exist_ok=True)
    folder, digest, package = _python(WHERE, tmp_path, {"PYTHONPATH": str(site)}).splitlines()
    assert Path(folder) == site / "flashcore_cupy" / "kernels"
    assert Path(package) == site / "flashcore_cupy" / "__init__.py"
    assert digest == kernels_digest(ROOT / "kernels")


def test_editable_install_sees_edits_at_once(checkout: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkout, source, ignore=NOT_SOURCES)
    with zipfile.ZipFile(_build("build_editable", source, tmp_path / "editable")) as archive:
        archive.extractall(tmp_path / "site")
    # What the install adds goes in front of a copy that this environment may have already, and
    # which may be an editable install, too: its finder has the same name.
    look = (
        "import site, sys; path, meta = sys.path[:], sys.meta_path[:]; "
        "[sys.modules.pop(name) for name in [*sys.modules] if name.startswith('__editable__')]; "
        f"sys.path.insert(0, {str(tmp_path / 'site')!r}); site.addsitedir(sys.path[0]); "
        "sys.path = [p for p in sys.path if p not in path] + path; "
        "sys.meta_path = [m for m in sys.meta_path if m not in meta] + meta; " + WHERE
    )
    folder, before, package = _python(look, tmp_path).splitlines()
    assert Path(folder) == source / "kernels"
    assert Path(package) == source / "flashcore_cupy" / "__init__.py"
    with (source / "kernels" / "fwd_sm80.cu").open("a") as file:
        file.write("// edited\n")
    _, after, _ = _python(look, tmp_path).splitlines()
    assert after == kernels_digest(source / "kernels") != before


# --- what the README says ------------------------------------------------------------------------

SEEN = "import flashcore_cupy\n\ndef test_place():\n    print('seen:', flashcore_cupy.__file__)\n"


@pytest.mark.parametrize("way", ["pytest", "python -m pytest"])
@pytest.mark.parametrize("is_installed", [True, False])
def test_pytest_tests_the_installed_package(
    checkout: Path, site: Path, tmp_path: Path, way: str, is_installed: bool
) -> None:
    """From a checkout, too, unless PYTHONPATH names the checkout."""
    script = Path(sys.executable).with_name("pytest")
    if way == "pytest" and not script.is_file():
        pytest.skip("this environment has no script named pytest")
    command = [script] if way == "pytest" else ["-m", "pytest"]
    source = tmp_path / "source"
    shutil.copytree(checkout, source, ignore=NOT_SOURCES)
    (source / "tests" / "test_place.py").write_text(SEEN)
    tested = site if is_installed else source
    run = subprocess.run(
        [sys.executable, *command, "-s", "-p", "no:cacheprovider", "tests/test_place.py"],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(tested), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert f"seen: {tested / 'flashcore_cupy' / '__init__.py'}" in run.stdout, run.stdout


def test_the_readme_has_two_lines_to_type() -> None:
    """`.ci/run` types them, whatever they are; these are what people expect them to be."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("\n## Two commands\n")[2].split("```")[1]
    install, test = block.strip().splitlines()
    assert install.startswith("pip install . && flashcore-cupy run ")
    assert test == "pip install '.[test]' && pytest"


# --- the import ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import flashcore_cupy; f = flashcore_cupy.attention",
        "from flashcore_cupy import attention as f",
        "from flashcore_cupy.attention import attention as f",
        "import flashcore_cupy.attention; f = flashcore_cupy.attention",
        "from flashcore_cupy.attention import attention as f; import flashcore_cupy; "
        "assert flashcore_cupy.attention is f",
        "import flashcore_cupy; from flashcore_cupy.attention import attention as f; "
        "assert flashcore_cupy.attention is f",
        "import importlib; importlib.import_module('flashcore_cupy.attention'); "
        "from flashcore_cupy import attention as f",
        "import flashcore_cupy.jit; from flashcore_cupy.attention import attention; "
        "f = flashcore_cupy.attention",
    ],
)
def test_attention_is_the_function_in_any_order_of_imports(code: str, tmp_path: Path) -> None:
    check = "; import sys; print(callable(f), f.__name__, 'cupy' in sys.modules)"
    package = Path(flashcore_cupy.__file__).resolve().parent.parent
    output = _python(code + check, tmp_path, {"PYTHONPATH": str(package)})
    assert output == "True attention False"
