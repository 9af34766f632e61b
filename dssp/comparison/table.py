"""The table of a comparison: per method, mean and spread of what a search gives and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from dssp.comparison.results import BASELINE, Comparison, Spread
from dssp.report.units import DASH


@dataclass(frozen=True)
class Column:
    """One number of the table: its key in the results, its heading, and how a spread of it is written."""

    number: str
    heading: str
    text: Callable[[Spread], str]


def columns(comparison: Comparison, *, wide: bool) -> list[Column]:
    """The columns between the number of runs and the ratio of times; those that no run has are left out."""
    times_shared = any(result.shared for result in comparison.results)
    shown = [
        *[Column("epochs", "Epochs", lambda spread: f"{spread.mean:.0f}")] * (comparison.search_seconds is not None),
        Column("test_accuracy", "Test accuracy", _percents(100)),
        *(Column(key, key.replace("_", " "), _percents(1)) for key in comparison.tabulated),
        Column("parameters", "Parameters", _counts),
        Column("flops", "FLOPs per image", _counts),
        *[Column("peak_memory_bytes", "Peak memory", _bytes)] * wide,
        *[Column("search_flops", "Search FLOPs", _counts)] * wide,
        Column("search_seconds", "Search time (shared)" if times_shared else "Search time", _times),
    ]
    return [c for c in shown if any(comparison.spread(method, c.number) for method in comparison.methods)]


def headings(comparison: Comparison, *, wide: bool) -> list[str]:
    """The first line of the table. ``wide``: with what a terminal has no room for."""
    return ["Method", "Runs", *(column.heading for column in columns(comparison, wide=wide)), f"Time / {BASELINE}"]


def rows(comparison: Comparison, *, wide: bool) -> list[list[str]]:
    """The other lines: a method each, mean ± sample standard deviation over its finished runs."""
    return [_row(comparison, method, columns(comparison, wide=wide)) for method in comparison.methods]


def _row(comparison: Comparison, method: str, shown: list[Column]) -> list[str]:
    planned = sum(result.method == method for result in comparison.results)
    finished, ratio = len(comparison.of(method)), comparison.time_ratio(method)
    runs = f"{finished}" if finished == planned else f"{finished} of {planned}"
    spreads = [(column, comparison.spread(method, column.number)) for column in shown]
    cells = [column.text(spread) if spread else DASH for column, spread in spreads]
    return [method, runs, *cells, DASH if ratio is None else f"{ratio:.2f}"]


def _percents(scale: float) -> Callable[[Spread], str]:
    return lambda spread: plus_minus(spread, 1 / scale, "%", decimals=2)


def _bytes(spread: Spread) -> str:
    return _counts(spread, "B")


def _counts(spread: Spread, unit: str = "") -> str:
    sizes = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    prefix, size = next(((p, size) for p, size in sizes if spread.mean >= 0.9995 * size), ("", 1.0))
    return plus_minus(spread, size, prefix + unit)


def _times(spread: Spread) -> str:
    unit, size = ("h", 3600) if spread.mean >= 3 * 3600 else ("min", 60) if spread.mean >= 300 else ("s", 1)
    return plus_minus(spread, size, unit)


def plus_minus(spread: Spread, size: float, unit: str, decimals: int | None = None) -> str:
    """97.41 ± 0.32 %: three digits of the mean unless told otherwise; one run has no deviation."""
    mean = spread.mean / size
    if decimals is None:
        decimals = 2 if abs(mean) < 9.995 else 1 if abs(mean) < 99.95 else 0
    deviation = "" if spread.std is None else f" ± {spread.std / size:.{decimals}f}"
    return f"{mean:.{decimals}f}{deviation} {unit}".strip().replace(" ", "\N{NO-BREAK SPACE}")


def print_table(console: Console, comparison: Comparison) -> None:
    """The table, then a line for every run that failed."""
    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings(comparison, wide=False)):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in rows(comparison, wide=False):
        table.add_row(*row)
    wide = console if console.is_terminal else Console(file=console.file, width=200)  # a file has no margin
    wide.print(table, highlight=False)
    for result in comparison.results:
        if result.error is not None:
            console.print(f"{result.name} failed: {result.error}", highlight=False, markup=False, soft_wrap=True)
