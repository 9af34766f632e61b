"""The arrows between the rooms: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module or package -> what it must not import. Prefixes count.
FORBIDDEN = {
    "dssp_kernels": ["dssp"],
    "dssp.options": ["dssp", "torch"],
    "dssp.config": ["dssp.spaces", "dssp.methods", "dssp.genotype", "dssp.engine", "dssp.search", "torch"],
    "dssp.genotype": ["dssp.engine", "dssp.supernet", "dssp.search", "dssp_kernels", "torch"],
    "dssp.distributed": ["dssp"],
    "dssp.runs": ["dssp.engine", "dssp.supernet", "dssp.bilevel", "dssp.search", "dssp.callbacks", "dssp_kernels"],
    "dssp.runs.files": ["dssp", "torch"],
    "dssp.report": [
        "dssp.engine",
        "dssp.supernet",
        "dssp.bilevel",
        "dssp.search",
        "dssp.comparison",
        "torch",
        "dssp_kernels",
    ],
    "dssp.sweeping": ["dssp.search", "dssp.retrain", "dssp.supernet", "dssp.bilevel", "dssp.engine", "dssp.methods"],
    "dssp.comparison": ["dssp.search", "dssp.retrain", "dssp.supernet", "dssp.bilevel", "dssp.data", "dssp.callbacks"],
    "dssp.spaces": ["dssp.supernet", "dssp.network", "dssp.engine", "dssp.bilevel", "dssp.search", "dssp.callbacks"],
    "dssp.supernet": ["dssp.engine", "dssp.bilevel", "dssp.pruning", "dssp.architect", "dssp.search", "dssp.callbacks"],
    "dssp.data": ["dssp.engine", "dssp.bilevel", "dssp.supernet", "dssp.search", "dssp.callbacks"],
    "dssp.architect": ["dssp.engine", "dssp.bilevel", "dssp.search", "dssp.callbacks"],
    "dssp.pruning": ["dssp.engine", "dssp.bilevel", "dssp.search", "dssp.callbacks", "dssp.methods"],
    "dssp.steps": ["dssp.engine", "dssp.bilevel", "dssp.search", "dssp.callbacks", "dssp.supernet", "dssp.methods"],
    "dssp.checkpoint": ["dssp.engine", "dssp.bilevel", "dssp.supernet", "dssp.search", "dssp.callbacks"],
    "dssp.bilevel": ["dssp.engine", "dssp.search", "dssp.retrain", "dssp.callbacks"],
    "dssp.derived": ["dssp.engine", "dssp.bilevel", "dssp.search", "dssp.retrain", "dssp.callbacks"],
    "dssp.derived.averaging": ["dssp"],
    "dssp.derived.trained": ["dssp.command", "dssp.supernet", "dssp.data"],
    "dssp.derived.exporting": ["dssp.command", "dssp.supernet", "dssp.data"],
    "dssp.engine": ["dssp.search", "dssp.retrain", "dssp.callbacks", "dssp.bilevel"],
    "dssp.callbacks": ["dssp.search", "dssp.retrain", "dssp.bilevel", "dssp.supernet"],
}


def _imports(path: Path) -> set[str]:
    """Every absolute module name a file imports; names taken from a package count as its members."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _files(module: str) -> list[Path]:
    path = ROOT.joinpath(*module.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize("module", list(FORBIDDEN))
def test_imports_run_one_way(module: str) -> None:
    files = _files(module)
    assert files
    for file in files:
        for imported in _imports(file):
            for forbidden in FORBIDDEN[module]:
                assert not (imported == forbidden or imported.startswith(f"{forbidden}.")), f"{file}: {imported}"


def test_every_module_of_the_search_says_its_subject_in_its_first_line() -> None:
    for package in ("dssp", "dssp_kernels", "bench"):
        for file in (ROOT / package).rglob("*.py"):
            assert ast.get_docstring(ast.parse(file.read_text())), file
