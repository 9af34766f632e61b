"""The rows as a table on the terminal, with rich where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from bench.results import TIMES, Row

BASELINES = {
    "eager": "eager",
    "eager channels_last": "channels_last",
    "stack+einsum": "einsum",
    "torch.compile": "compile",
}  # as rows name them -> as the table does
COLUMNS = (
    *("case", "pass", *BASELINES.values()),
    *("ours", "GB/s", "of copy", "saved", "peak", "error", ""),
)

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("kiB", 2**10))


def print_table(rows: Sequence[Row]) -> None:
    """A line per row; saved and peak memory and error as ours / eager."""
    lines = [cells(row) for row in rows]
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS, title=f"milliseconds per call, {TIMES}: times ours; saved, peak, error: ours / eager")
        for line in lines:
            table.add_row(*line, style="red" if line[-1] == "RED" else None)
        Console(width=None if sys.stdout.isatty() else 220).print(table)
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    for line in [list(COLUMNS), *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def cells(row: Row) -> list[str]:
    def baseline(name: str) -> str:
        if name not in row["milliseconds"]:
            return "-"
        ratio = row["speedup"][name]
        return f"{row['milliseconds'][name]:.3f}" + (f" {TIMES}{ratio:.2f}" if ratio is not None else "")

    error = row["error"]
    return [
        row["case"],
        row["pass"].replace("forward", "fwd").replace("backward", "bwd"),
        *(baseline(name) for name in BASELINES),
        f"{row['milliseconds']['ours']:.3f}",
        f"{row['gb_per_s']:.1f}",
        f"{row['fraction_of_copy']:.0%}",
        held(row["saved_bytes"]),
        held(row["peak_memory_bytes"]),
        f"{max(error['ours'].values()):.0e} / {max(error['eager'].values()):.0e}",
        "ok" if row["accuracy"] == "green" else "RED",
    ]


def held(memory: dict[str, int] | None) -> str:
    return f"{in_bytes(memory['ours'])} / {in_bytes(memory['eager'])}" if memory else "-"


def in_bytes(count: int) -> str:
    unit, size = next((pair for pair in UNITS if count >= pair[1]), ("B", 1))
    return f"{count / size:.3g} {unit}"
