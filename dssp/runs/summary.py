"""What a search prints when it is done."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from dssp.genotype import AnyGenotype, with_shortcuts
from dssp.report.units import count


def step_seconds(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Mean seconds per bilevel step in the first epoch after warm-up, nothing pruned yet, and in the last.

    And under "paths", per step of all epochs on hard paths, None without such. What has no bilevel step says of its
    first and last epochs what they took.
    """
    bilevel = [row for row in rows if row["phase"] == "search"] or rows
    paths = [row["step_seconds"] for row in rows if row["phase"] == "paths"]
    return {
        "first": bilevel[0]["step_seconds"],
        "last": bilevel[-1]["step_seconds"],
        "paths": fmean(paths) if paths else None,
    }


def print_summary(console: Console, summary: dict[str, Any], genotype: AnyGenotype, folder: Path, report: Path) -> None:
    """The genotype, what was pruned and when, time per step, the derived network, and where everything is."""
    for cell_type, (cell, _) in with_shortcuts(genotype).items():
        table = Table(title=f"{cell_type} cell", title_justify="left", box=None)
        for node, cell_edges in enumerate(cell, start=genotype.inputs):
            terms = [f"{operation}({source})" for operation, source in cell_edges]
            table.add_row(f"node {node} =", " + ".join(terms) or "0")
        console.print(table)
    console.print(_pruning(summary["pruned"]), highlight=False, soft_wrap=True)
    seconds = summary["step_seconds"]
    paths = "" if seconds["paths"] is None else f", {1e3 * seconds['paths']:.0f} ms on hard paths"
    console.print(
        f"Time per search step: {1e3 * seconds['first']:.0f} ms before pruning, {1e3 * seconds['last']:.0f} ms at the "
        f"end ({seconds['first'] / seconds['last']:.2f}x){paths}; search {summary['search_seconds']:.0f} s, "
        f"{count(summary['search_flops'], 'FLOPs')}",
        highlight=False,
        soft_wrap=True,
    )
    size = f"{summary['parameters']:,} parameters, {summary['flops'] / 1e6:.1f} MFLOPs per image"
    accuracy = summary["test_accuracy"]
    retrained = "not retrained" if accuracy is None else f"retrained: test accuracy {accuracy:.2%}"
    console.print(f"Derived network, {retrained}, {size}", highlight=False, soft_wrap=True)
    if summary["tabulated"] is not None:
        console.print(tabulated_line(summary["tabulated"]), highlight=False, soft_wrap=True)
    console.print(f"Run folder: {folder}\nReport:     {report}", highlight=False, soft_wrap=True)


def tabulated_line(accuracies: dict[str, float]) -> str:
    """What the benchmark says of a cell, in percent."""
    return "Tabulated accuracy: " + ", ".join(f"{column} {value:.2f} %" for column, value in accuracies.items())


def _pruning(events: list[dict[str, Any]]) -> str:
    if not events:
        return "Pruned: nothing"
    by_epoch: dict[int, list[str]] = {}
    for event in events:
        by_epoch.setdefault(event["epoch"], []).append(event["edge"])
    lines = [f"  after epoch {epoch + 1}: {', '.join(edges)}" for epoch, edges in by_epoch.items()]
    return "\n".join([f"Pruned: {len(events)} edges", *lines])
