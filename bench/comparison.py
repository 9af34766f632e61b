"""A run beside an earlier one: how much longer each row takes now, in units of the copy measured next to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import Row

TOLERANCE = 1.10  # what the copy itself varies by on a quiet machine


def read_results(path: Path) -> dict[str, Any]:
    """A JSON file of an earlier run. Raises ValueError if it is none, OSError if it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON of bench/edge_throughput.py, got no JSON: {error}") from error
    if not isinstance(found, dict) or any("fraction_of_copy" not in row for row in found.get("rows", [{}])):
        raise ValueError(f"{path}: expected JSON of bench/edge_throughput.py, got something else")
    return found


def compare(rows: Sequence[Row], earlier: Sequence[Row]) -> list[dict[str, Any]]:
    """Per row that both have: (time / copy time now) / (the same then), above 1 where it got slower."""
    then = {(row["case"], row["pass"]): row["fraction_of_copy"] for row in earlier}
    return [
        {"case": row["case"], "pass": row["pass"], "slowdown": then[key] / row["fraction_of_copy"]}
        for row in rows
        if (key := (row["case"], row["pass"])) in then
    ]


def print_comparison(found: dict[str, Any], earlier: dict[str, Any], path: Path) -> int:
    """Print what got slower than TOLERANCE allows and return how many rows did."""
    compared = compare(found["rows"], earlier["rows"])
    slower = [row for row in compared if row["slowdown"] > TOLERANCE]
    print(f"Against {path} (commit {earlier['commit']}): {len(compared)} rows, {len(slower)} over 10 % slower")
    for key, value in found["machine"].items():
        if earlier["machine"].get(key) != value:
            print(f"  other machine: {key} was {earlier['machine'].get(key)}, is {value}")
    for row in sorted(slower, key=lambda row: -row["slowdown"]):
        print(f"  {row['slowdown']:.2f} times as long: {row['case']} {row['pass']}")
    return len(slower)
