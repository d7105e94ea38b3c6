"""Imports point one way, and each library that may go away is imported in one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distrec"
BASE = {
    "errors",
    "config",
    "columns",
    "world",
    "batch",
    "dataset",
    "files",
    "people",
    "pulse",
    "store",
    "untrusted",
    "user_key",
}
# package -> packages of distrec that it may import, besides BASE and itself
ALLOWED = {
    "prepare": {"spark"},
    "reader": set(),
    "sharding": set(),
    "model": {"sharding"},
    "metrics": {"model", "sharding", "reader"},
    "baselines": {"metrics", "spark"},
    "checkpoint": {"sharding", "model"},
    "private": {"reader", "sharding", "model"},
    "trainer": {
        "reader",
        "sharding",
        "model",
        "checkpoint",
        "metrics",
        "job",
        "planner",
        "private",
    },
    "scoring": {"checkpoint", "metrics", "model", "prepare", "reader", "sharding", "spark"},
    "report": set(),
    "planner": {"reader", "sharding", "model"},
    "forget": {"checkpoint", "clean", "job", "metrics", "model", "pipeline", "reader", "sharding"},
}
ONE_FILE = {
    "horovod": {"sharding/collectives.py", "launch.py"},
    "opacus": {"private/accountant.py"},
    "petastorm": {"reader/petastorm_adapter.py"},
    "fbgemm_gpu": {"sharding/fbgemm.py"},
}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_what_lies_before_them(package: str) -> None:
    files = [path for path in FILES if path.relative_to(PACKAGE).parts[0] == package]
    assert files
    for path in files:
        inner = {
            name.split(".")[1] for name in imported_modules(path) if name.startswith("distrec.")
        }
        inner -= {"__version__"}
        wrong = inner - BASE - ALLOWED[package] - {package}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_base_imports_nothing_of_the_packages() -> None:
    for name in BASE - {"files"}:
        files = [
            path for path in FILES if path.relative_to(PACKAGE).parts[0] in (name, f"{name}.py")
        ]
        names = set().union(*map(imported_modules, files))
        inner = {module.split(".")[1] for module in names if module.startswith("distrec.")}
        assert inner <= BASE, name


@pytest.mark.parametrize("library", sorted(ONE_FILE))
def test_each_replaceable_library_is_imported_in_one_place(library: str) -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(name.split(".")[0] == library for name in imported_modules(path))
    }
    assert found
    assert found <= ONE_FILE[library]


@pytest.mark.parametrize(
    ("package", "library"), [("prepare", "torch"), ("trainer", "pyspark"), ("report", "torch")]
)
def test_packages_stay_free_of_libraries(package: str, library: str) -> None:
    for path in (PACKAGE / package).rglob("*.py"):
        names = imported_modules(path)
        assert not any(name.split(".")[0] == library for name in names), path
