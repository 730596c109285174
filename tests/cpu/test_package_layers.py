"""A folder of the package is a layer: imports run one way. Sizes that reviews rely on."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "flashcore_cupy"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("flashcore_cupy", "tests", "benchmarks", "examples")
COLUMNS, FUNCTION_LINES, MODULE_LINES = 100, 60, 400

# From the lowest: a folder imports from those of lower lines, and from itself. What lies in the
# package itself counts as "attention", but for what everything may use.
LAYERS = (
    {"cuda"},
    {"jit", "problem"},
    {"select"},
    {"launch", "cpu"},
    {"integrations"},
    {"attention"},
    {"check"},
    {"measure"},
    {"cli"},
)
EVERYBODYS = {"_version", "settings"}
#: Beside the lines above: what is compiled, and what for, know nothing of each other.
APART = {("select", "jit")}
_IMPORTS = re.compile(r"\b(import_module|__import__)$")
FRONT_DOORS = {"__init__", "__main__"}
#: They describe and compute on the host alone, so they are testable anywhere.
WITHOUT_CUPY = ("select", "cpu")


def layer_of(name: str) -> str:
    """The folder of a module, by its dotted name below the package."""
    parts = name.split(".")
    folders = {folder for line in LAYERS for folder in line}
    return parts[0] if parts[0] in folders else "attention"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, at whatever depth, for typing as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and _IMPORTS.search(ast.unparse(node.func)):
            assert isinstance(node.args[0], ast.Constant), f"{path.name}: imports go by name"
            found.add(str(node.args[0].value))
    return {module for name in found if (module := _module_of(name)) is not None}


def _module_of(name: str) -> str | None:
    """The module that an imported name is, or is in; None if that is not of the package."""
    package, _, name = name.partition(".")
    if package != PACKAGE.name:
        return None
    while name and name not in NAMES:
        name, _, _ = name.rpartition(".")
    return name or "__init__"


def line_of(layer: str) -> int:
    return next(number for number, line in enumerate(LAYERS) if layer in line)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    own = name_of(path)
    if own in FRONT_DOORS:
        return
    for name in imports_of(path) - {own} - EVERYBODYS:
        assert own not in EVERYBODYS, f"{own}: everything uses it, so it uses nothing"
        here, there = layer_of(own), layer_of(name)
        assert here == there or line_of(there) < line_of(here), f"{own} imports {name}"
        assert (here, there) not in APART, f"{own} imports {name}"


def test_imports_have_no_cycle() -> None:
    graph = {name_of(path): imports_of(path) - {name_of(path)} for path in MODULES}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_hands_on_the_names_of_another(path: Path) -> None:
    if path.name == "__init__.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            handed = [alias.name for alias in node.names if alias.name == alias.asname]
            assert not handed, f"{name_of(path)} hands on {handed}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_cupy_is_imported_late_or_not_at_all(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            assert not any(re.match(r"(cupy|cupy_backends|cuda)\b", name) for name in names)
    if layer_of(name_of(path)) in WITHOUT_CUPY:
        assert not re.search(r"import_module\(|^\s*import cupy\b", text, re.MULTILINE)


def test_environment_is_read_in_one_place() -> None:
    readers = {
        name_of(path)
        for path in MODULES
        if re.search(r"""(environ|getenv)\b[^\n]*FLASHCORE_""", path.read_text())
        or re.search(r"""_path\("FLASHCORE_""", path.read_text())
    }
    assert readers == {"settings"}


PYTHON_FILES = sorted(
    [
        *ROOT.glob("*.py"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    ]
)


def test_no_test_module_is_imported() -> None:
    """What several of them use lies beside their folders, and each folder sets its marker."""
    for path in (ROOT / "tests").rglob("*.py"):
        in_a_folder = path.parent != ROOT / "tests"
        assert path.name == "conftest.py" or path.name.startswith("test_") == in_a_folder, path
        text = path.read_text(encoding="utf-8")
        imported = re.findall(
            r"^\s*(?:from|import) (test_\w+|conftest|tests)\b", text, re.MULTILINE
        )
        assert not imported, f"{path.name} imports {imported}"
        assert not re.search(r"\bmark\.(gpu|compile|kernels)\b", text), f"{path.name} sets a marker"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_files_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS] == []
    if PACKAGE in path.parents:
        assert len(lines) <= MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
            assert length <= FUNCTION_LINES, f"{node.name}: {length} lines"


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A public function's manual is not what makes it long."""
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def test_what_computes_on_the_cpu_does_not_ask_the_oracle() -> None:
    reached, todo = set(), {"attention", "cpu.host"}
    while todo:
        name = todo.pop()
        reached.add(name)
        path = next(path for path in MODULES if name_of(path) == name)
        todo |= imports_of(path) - reached
    assert "cpu.tiled_attention" in reached and "cpu.reference" not in reached
