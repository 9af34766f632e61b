"""What the documents say is backed by what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, recorded

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (ROOT / "docs" / "faults.md").open()
    if line.startswith("| ") and not line.startswith("| fault ")
]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_fault_in_the_table_has_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4 and all(row)
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[3])
    assert named and row[3] == ", ".join(f"`{path}::{test}`" for path, test in named)
    for path, test in named:
        assert test in functions(ROOT / "tests" / path)


def test_table_of_faults_is_linked_and_every_fault_stands_there_once() -> None:
    assert "docs/faults.md" in (ROOT / "README.md").read_text()
    faults = [row[0] for row in ROWS]
    assert len(faults) >= 40 and len(set(faults)) == len(faults)


def test_every_mutation_can_be_made_and_is_recorded_with_a_test_that_exists() -> None:
    assert list(recorded()) == [mutation.name for mutation in MUTATIONS]
    for mutation in MUTATIONS:
        row = recorded()[mutation.name]
        assert (ROOT / mutation.file).read_text().count(mutation.text) == 1, mutation.name
        path, test = re.findall(r"`([\w/]+\.py)::(test_\w+)` \|$", row)[0]
        assert row == mutation.row(f"`{path}::{test}`") and test in functions(ROOT / "tests" / path)
