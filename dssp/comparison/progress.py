"""How far a comparison is: one bar over all epochs of all runs, or a line per finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dssp.comparison.plan import PlannedRun
from dssp.comparison.processes import is_finished
from dssp.comparison.results import Result
from dssp.report.units import count, duration, percent


class ComparisonBar:
    """One bar over the epochs of searches and retrainings; where the output is no terminal, one line per ended run."""

    def __init__(self, console: Console, runs: Sequence[PlannedRun]) -> None:
        self.console, self.runs = console, runs
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        done = sum(map(epochs_done, runs))
        self.bar = self.progress.add_task("", total=sum(run.epochs for run in runs), completed=done, status="")

    def __enter__(self) -> ComparisonBar:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def look(self, running: Sequence[str]) -> None:
        """Read how far the runs are."""
        if self.progress.disable:
            return
        ended = sum(is_finished(run.folder) for run in self.runs)
        epochs = {run.name: f"{run.name} {epochs_done(run)}/{run.epochs}" for run in self.runs if run.name in running}
        self.progress.update(
            self.bar,
            completed=sum(map(epochs_done, self.runs)),
            description=f"{ended} of {len(self.runs)} runs",
            status=", ".join(epochs.values()),
        )

    def ended(self, result: Result) -> None:
        """A line about a run that has ended."""
        if result.status != "finished":
            line = f"{result.name} {result.status}" + (f": {result.error}" if result.error else "")
        else:
            numbers = result.numbers
            accuracy = f"test accuracy {percent(numbers['test_accuracy'])}, " if numbers["test_accuracy"] else ""
            line = (
                f"{result.name} finished: {accuracy}{count(numbers['parameters'])} parameters, "
                f"search {duration(numbers['search_seconds'])}"
            )
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def epochs_done(run: PlannedRun) -> int:
    """Epochs of the search and of the retraining that are in the run's folder."""
    if is_finished(run.folder):
        return run.epochs
    return _lines(run.folder / "metrics.jsonl") + _lines(run.folder / "retrain.jsonl")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
