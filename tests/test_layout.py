"""The tree keeps its shape: imports point one way, files stay small, tests share helpers, nothing hides `kernels`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import cpift_kernels
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "cpift").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES = [*FILES, *sorted((ROOT / "kernels" / "cpift_kernels").rglob("*.py"))]

# A package (or a file beside them) imports from the rows before its own, never from its own row.
ROWS = [
    {"lazy"},
    {"text"},
    {"errors"},
    {"untrusted"},
    {"disk", "console", "other_tools"},
    {"extensions"},
    {"config", "hub"},
    {"devices", "rows", "formats"},
    {"pretrained"},
    {"checkpoints", "data"},
    {"models", "method"},
    {"merging", "training", "evaluation"},
    {"report", "lineage"},
    {"pipeline", "scorecard"},
    {"cluster", "merge_folder", "hub_card"},
    {"compare", "sweep", "adapter_folder", "merge_request", "model_diff", "publish"},
    {"init", "api"},
    {"given_models", "descendants"},
    {"cli"},
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}

# Where Ray is the job; all other files run without it.
ON_RAY = {"cluster", "sweep.search", "sweep.trial"}


# Modules that their own package's tests do not reach, and the tests that do: what starts Ray is in integration/, and
# some can only be looked at through what uses them.
TESTED_ELSEWHERE = {
    "api": "test_python_api.py",
    "config.needs": "pipeline/test_preflight.py",
    "disk.object_store": "cluster/test_stored_merge.py",
    "evaluation.checks": "data/test_data.py",
    "hub": "rows/test_rows.py",
    "hub_card": "test_publish.py",
    "merge_folder": "test_python_api.py",
    "merge_request": "other_tools/test_mergekit.py",
    "pipeline.costs": "cli/test_main.py",
    "pipeline.shared": "sweep/test_sweep.py",
    "pipeline.watch": "console/test_progress.py",
    "pretrained.conversion": "checkpoints/test_model_layout.py",
    "rows.holdout": "data/test_data.py",
    "rows.problems": "data/test_data.py",
    "rows.shapes": "data/test_data.py",
    "text.units": "test_errors.py",
    "training.speed": "pipeline/test_plan.py",
    "untrusted.values": "config/test_run.py",
}


def module_of(path: Path) -> str:
    """For example `merging.engine` of cpift/merging/engine.py; a package's own name of its `__init__.py`."""
    parts = path.relative_to(ROOT / "cpift").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_of(path): path for path in FILES}


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that a file imports anywhere in it: at the top, in functions, for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level or "kernels" in path.parts, f"{path}: cpift imports by full names"
            module = node.module or ""
            own = module.startswith(("cpift", "tests"))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names if own}
    return frozenset(found)


def is_page(path: Path) -> bool:
    """Whether a file is a package's page, which imports what it names when somebody asks for it (`cpift.lazy`).

    Not cpift's own, whose names the tests of the Python API go through.
    """
    return path.name == "__init__.py" and path.parent != ROOT / "cpift"


def own_imports(path: Path) -> set[str]:
    """The files of cpift that a file imports, as `module_of` names them."""
    named = {name.removeprefix("cpift.") for name in imports_of(path) if name.startswith("cpift.")}
    return {name for name in named if name in NAMES} - {module_of(path)}


def test_every_package_has_a_row() -> None:
    found = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / "cpift").iterdir()}
    assert found - {"__init__", "__pycache__", "py.typed"} == set(ROW)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path) or "cpift")
def test_imports_point_one_way(path: Path) -> None:
    module = module_of(path)
    mine = module.split(".")[0]
    for name in own_imports(path):
        other = name.split(".")[0]
        allowed = other == mine or (not module) or ROW[other] < ROW[mine]
        assert allowed, f"{module} imports {name}, which is in its own row or in a later one"
    if module not in ON_RAY and mine not in ON_RAY:
        assert not {name for name in imports_of(path) if name.split(".")[0] == "ray"}, f"{module} imports Ray"


def test_no_circles_inside_packages() -> None:
    edges = {name: own_imports(path) for name, path in NAMES.items() if "." in name and not is_page(path)}
    edges = {name: {one for one in imports if one in edges} for name, imports in edges.items()}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(f"imports go round: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("package", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_packages_stay_small(package: Path) -> None:
    files = [path.name for path in package.glob("*.py") if not path.name.startswith("__")]
    assert len(files) <= 15, f"{package.name} holds {len(files)} files: find the two things that it is about"
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))), package


def test_kernels_import_nothing_of_the_method() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {name for name in imports_of(path) if name.split(".")[0] in {"cpift", "ray", "transformers"}}, path


def test_only_public_names_of_the_kernels_are_imported() -> None:
    public = {f"cpift_kernels.{name}" for name in cpift_kernels.__all__}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cpift_kernels":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert names <= public, f"{module_of(path)} imports {', '.join(sorted(names - public))}"
            elif isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "cpift_kernels" for alias in node.names), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 330


def reached(tests: Iterable[Path], inside: Callable[[str], bool]) -> set[str]:
    """The modules of cpift that these tests import, and those that these import in turn."""
    todo = {name.removeprefix("cpift").removeprefix(".") for path in tests for name in imports_of(path)} & set(NAMES)
    found: set[str] = set()
    while todo := {name for name in todo if inside(name)} - found:
        found |= todo
        todo = set().union(*(own_imports(NAMES[name]) for name in todo if not is_page(NAMES[name])))
    return found


@pytest.mark.parametrize("package", sorted({name.split(".")[0] for name in NAMES if "." in name}))
def test_a_packages_tests_reach_each_of_its_modules(package: str) -> None:
    """By themselves or through the package, or a test has the module's name; tests/ has the same folders as cpift/."""
    folder = ROOT / "tests" / package
    own = reached(folder.rglob("test_*.py"), lambda name: name.split(".")[0] == package)
    own |= {name for name in NAMES if (folder / f"test_{name.split('.')[-1]}.py").is_file()}
    modules = {name for name, path in NAMES.items() if name.split(".")[0] == package and path.name[:2] != "__"}
    elsewhere = {name for name in TESTED_ELSEWHERE if name.split(".")[0] == package}
    assert modules - own == elsewhere, "TESTED_ELSEWHERE names these, and no others"
    for name in elsewhere:
        assert name in reached([ROOT / "tests" / TESTED_ELSEWHERE[name]], lambda name: True), name


def test_tests_have_the_folders_of_the_package() -> None:
    """And some of their own; a file beside the packages has the test of its name."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    packages = {name.split(".")[0] for name in NAMES if "." in name}
    assert folders - packages == {"benchmarks", "helpers", "integration", "kernels", "kernels_triton", "ptx"}
    assert packages <= folders
    beside = {name for name, path in NAMES.items() if name and path.parent.name == "cpift" and path.name[:2] != "__"}
    without = {name for name in beside if not (ROOT / "tests" / f"test_{name}.py").is_file()}
    assert without == {name for name in TESTED_ELSEWHERE if "." not in name}
    assert all(name in reached([ROOT / "tests" / TESTED_ELSEWHERE[name]], lambda name: True) for name in without)


def test_what_tests_share_is_a_helper() -> None:
    """A test module imports neither another one nor a conftest: a helper in tests/helpers/, or a fixture."""
    for path in TESTS:
        taken = {name for name in imports_of(path) if name.startswith("tests.")}
        assert not {name for name in taken if re.search(r"\.(test_\w+|conftest)\b", name)}, path


@pytest.mark.parametrize("folder", ["cpift", "kernels", "benchmarks", "configs", "examples", "ray_jobs"])
def test_what_type_checks_leave_out_has_a_reason(folder: str) -> None:
    """mypy asks for the code. What numba compiles is typed by numba: `kernels/cpift_kernels/cpu` need not repeat it."""
    for path in (ROOT / folder).rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "# type: ignore" in line and not (path.parent.name == "cpu" and "[no-untyped-def]" in line):
                assert re.search(r"# type: ignore\[[a-z, -]+\]  # \w", line), f"{path}: {line.strip()}"


def test_nothing_changes_where_python_looks() -> None:
    """`python -m benchmarks.…` and the tests start at the clone's root, ray_jobs beside themselves."""
    folders = ("benchmarks", "configs", "ray_jobs", "sweeps", "tests")
    for path in (path for name in folders for path in (ROOT / name).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert "sys.path" not in {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}, path


def test_no_package_named_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_the_wheel_holds_both_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(list(map(str, build)), check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("cpift-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in FILES}
    sources |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels" / "cpift_kernels").rglob("*.py")}
    sources |= {f"cpift/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    sources |= {f"cpift/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert sources <= names
    assert not any(name.startswith(("kernels/", "tests/")) for name in names)
