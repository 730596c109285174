"""The directions of imports and includes, and the size limits, that docs and reviews rely on."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "flashcore_cupy"
KERNELS = ROOT / "kernels"
MODULES = sorted(PACKAGE.glob("*.py"))
DEVICE_FILES = sorted(KERNELS.rglob("*.cu*"))
ENTRIES = sorted(KERNELS.rglob("*.cu"))
FOLDERS = ("flashcore_cupy", "tests", "benchmarks", "examples")
COLUMNS, FUNCTION_LINES = 100, 60
MODULE_LINES, ENTRY_LINES, HEADER_LINES = 400, 350, 250

# A module imports from lower layers, or, without a cycle, from its own. A new one gets its place.
PYTHON_LAYERS = (
    {"_version", "settings", "driver"},
    {"sources", "cache", "nvrtc"},
    {"jit"},
    {
        "rules",
        "problem",
        "params",
        "config",
        "targets",
        "tile_checks",
        "rows",
        "rungs",
        "tensor_map",
        "tiles",
        "arrays",
        "values",
        "tracing",
        "interop",
        "rule_arrays",
        "captures",
        "packed",
        "workspace",
        "numpy_rules",
        "numpy_attention",
        "reference",
    },
    {"gates", "grids"},
    {"launch"},
    {"repeat", "request", "host"},
    {"attention"},
    {
        "bench",
        "builds",
        "verify",
        "job",
        "ladder",
        "selftest",
        "selftest_case",
        "selftest_cases",
        "selftest_rules",
        "selftest_arrays",
        "doctor",
    },
    {"_cli", "_errors", "_options", "_plot", "_render", "_steps", "_terminal"},
    {"__init__", "__main__"},
)
# These describe and compute on the host alone, so they are testable anywhere.
WITHOUT_CUPY = {
    "rules",
    "problem",
    "params",
    "config",
    "targets",
    "tile_checks",
    "rows",
    "rungs",
    "tensor_map",
    "tiles",
    "arrays",
    "numpy_rules",
    "numpy_attention",
    "reference",
}

# A header of flashcore/ includes headers of lower layers, or of its own, without a cycle: files and
# folders of flashcore/, lowest first. A new one gets its place.
DEVICE_LAYERS = (
    "types",
    "ptx",
    "params",
    "debug",
    "tile",
    "pipeline",
    "rules",
    "scheduler",
    "softmax",
    "output",
)
# The pages of one family, or of the teaching kernels: they alone, and entry files, include config.
FAMILIES = ("sm80", "sm90", "ladder")
#: What only flashcore/ptx may say: instructions, and CUDA's own names.
CUDA_BUILTIN = re.compile(
    r"\basm\b|\b__(?!global__|device__|host__|constant__|restrict__|forceinline__|"
    r"noinline__|launch_bounds__|align__|grid_constant__|cluster_dims__|builtin_bit_cast)\w*\s*\("
    r"|\b(?:threadIdx|blockIdx|blockDim|gridDim|warpSize)\b|\b__shared__\b|\b__CUDA_ARCH__\b"
    r"|\batomic[A-Z]\w*"
)
FUNCTION_START = re.compile(r"^[^\n#/]*\b__(?:device|global)__\b[^;{}]*\{", re.MULTILINE)


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, at whatever depth, save for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            module = node.module or ""
            found.add(module)
            if module == "flashcore_cupy":
                found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def _nodes(tree: ast.AST) -> list[ast.AST]:
    nodes = []
    for child in ast.iter_child_nodes(tree):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not is_typing:
            nodes += [child, *_nodes(child)]
    return nodes


def _siblings(path: Path) -> set[str]:
    names = {module.stem for module in MODULES}
    parts = (name.split(".") for name in _imports(path) if name.startswith("flashcore_cupy."))
    return {part[1] for part in parts} & names


def _layer_of(name: str, layers: tuple[set[str], ...]) -> int:
    for number, layer in enumerate(layers):
        if name in layer:
            return number
    raise AssertionError(f"{name} has no layer yet: give it one in {Path(__file__).name}")


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*(["<][^">]*[">])', path.read_text(), re.MULTILINE)


def _device_name(path: Path) -> str:
    """Such as "flashcore/tile/tile_copy.cuh"."""
    return path.relative_to(KERNELS).as_posix()


def _device_folder(name: str) -> str:
    """The first folder: flashcore, a family, or none for entry files and the configuration."""
    return name.rpartition("/")[0].partition("/")[0]


def _device_layer(name: str) -> int:
    layer = name.removeprefix("flashcore/").removesuffix(".cuh").partition("/")[0]
    assert layer in DEVICE_LAYERS, f"{name} has no layer yet: give it one in {Path(__file__).name}"
    return DEVICE_LAYERS.index(layer)


def _code(path: Path) -> str:
    """A device file's text with comments blanked, line by line as before."""
    blank = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
    return blank.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), path.read_text())


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) >= 10 and len(ENTRIES) >= 3 and len(DEVICE_FILES) >= 10


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_python_imports_run_one_way(path: Path) -> None:
    own = _layer_of(path.stem, PYTHON_LAYERS)
    for name in _siblings(path):
        assert _layer_of(name, PYTHON_LAYERS) <= own, f"{path.stem} imports {name}"


def test_python_imports_have_no_cycle() -> None:
    TopologicalSorter({path.stem: _siblings(path) for path in MODULES}).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_cupy_is_imported_late_or_not_at_all(path: Path) -> None:
    top_level = ast.Module(
        [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ],
        [],
    )
    for node in top_level.body:
        names = [alias.name for alias in node.names]  # type: ignore[attr-defined]
        names.append(getattr(node, "module", None) or "")
        assert not any(re.match(r"(cupy|cupy_backends|cuda)\b", name) for name in names)
    if path.stem in WITHOUT_CUPY:
        assert not re.search(r"import_module\(|\bimport cupy\b", path.read_text())
        forbidden = {"jit", "nvrtc", "cache", "sources", "launch"}
        assert not _siblings(path) & forbidden


def test_environment_is_read_in_one_place() -> None:
    readers = {
        path.stem
        for path in MODULES
        if re.search(r"""(environ|getenv)\b[^\n]*FLASHCORE_""", path.read_text())
        or re.search(r"""_path\("FLASHCORE_""", path.read_text())
    }
    assert readers == {"settings"}


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
def test_device_includes_run_one_way(path: Path) -> None:
    own = _device_name(path)
    folder = _device_folder(own)
    for include in _includes(path):
        name = include.strip('<>"')
        assert include.startswith("<"), f"{include}: angle brackets, from kernels/"
        assert (KERNELS / name).is_file(), f"{include} does not exist"
        target = _device_folder(name)
        if folder == "flashcore":
            assert target == "flashcore", f"{own} → {name}: building blocks know no family"
            assert _device_layer(name) <= _device_layer(own), f"{own} → {name}"
        elif own == "config.cuh":
            assert target == "flashcore", f"{own} → {name}"
        elif folder in FAMILIES:
            assert target in ("", "flashcore", folder), f"{own} → {name}: another family's"
        else:
            families = {target} & set(FAMILIES)
            assert families <= {path.stem.removeprefix("fwd_")}, f"{own} → {name}: another family's"


def test_device_folders_are_known() -> None:
    folders = {_device_folder(_device_name(path)) for path in DEVICE_FILES}
    assert folders == {"", "flashcore", *FAMILIES}
    assert {_device_name(path) for path in DEVICE_FILES if path.parent == KERNELS} == {
        "config.cuh",
        *(path.name for path in KERNELS.glob("fwd_*.cu")),
    }


def test_device_includes_have_no_cycle() -> None:
    graph = {
        _device_name(path): {include.strip('<>"') for include in _includes(path)}
        for path in DEVICE_FILES
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
def test_cuda_is_spoken_in_the_ptx_headers_alone(path: Path) -> None:
    found = CUDA_BUILTIN.search(_code(path))
    if _device_name(path).startswith("flashcore/ptx/"):
        assert found, "a ptx header wraps instructions"
    else:
        assert found is None, f"{found[0]!r} belongs into flashcore/ptx/" if found else ""


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
def test_only_config_reads_the_defines(path: Path) -> None:
    if _device_name(path) != "config.cuh":
        assert not re.search(r"\bFC_\w+", _code(path))


@pytest.mark.parametrize("path", DEVICE_FILES, ids=_device_name)
def test_device_files_stay_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= (ENTRY_LINES if path.suffix == ".cu" else HEADER_LINES)
    assert _too_long(lines) == []
    code = _code(path)
    for start in FUNCTION_START.finditer(code):
        length = code.count("\n", start.start(), _closing_brace(code, start.end())) + 1
        head = code[start.start() : start.end()].strip().splitlines()[0]
        assert length <= FUNCTION_LINES, f"{head}: {length} lines"


def _too_long(lines: list[str]) -> list[int]:
    return [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]


def _closing_brace(code: str, position: int) -> int:
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(code[position], 0)
        position += 1
    return position


PYTHON_FILES = sorted(
    [
        *ROOT.glob("*.py"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    ]
)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_files_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert _too_long(lines) == []
    if path.parent == PACKAGE:
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
