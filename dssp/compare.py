"""`python -m dssp.compare`: search methods and seeds under one budget, and what they cost and give."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from dssp.command import run_command
from dssp.comparison.page import write_page
from dssp.comparison.plan import ComparePlan, PlannedRun, parse_compare
from dssp.comparison.processes import Processes
from dssp.comparison.progress import ComparisonBar
from dssp.comparison.results import Comparison, read_comparison, write_results
from dssp.comparison.table import print_table
from dssp.comparison.time_budget import fit_epochs
from dssp.runs.run_folder import open_run_folder


def run(plan: ComparePlan, console: Console) -> Comparison:
    """The whole command: fills a folder with the runs and what they say together; status 1 if a run failed."""
    folder = open_run_folder(plan, "compare", {})
    for line in refusals(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    plan = fit_epochs(plan, folder, console)
    comparison = search_all(plan, folder, console, write_comparison)
    print_table(console, comparison)
    names = ("comparison.csv", "comparison.json", "comparison.html")
    console.print("\n".join(str(folder / name) for name in names), highlight=False, soft_wrap=True)
    end_if_failed(comparison)
    return comparison


def search_all(plan: ComparePlan, folder: Path, console: Console, read: Callable[[Path], Comparison]) -> Comparison:
    """Run what is not finished and return what ``read`` makes of the folder; it is also called after every run."""
    runs = plan.runs(folder)
    with ComparisonBar(console, runs) as bar:

        def ended(one: PlannedRun) -> None:
            bar.ended(next(result for result in read(folder).results if result.name == one.name))

        Processes(folder, plan.jobs).run(runs, look=bar.look, ended=ended)
    return read(folder)


def end_if_failed(comparison: Comparison) -> None:
    """Status 1 and a line, if a run failed."""
    if failed := [result.name for result in comparison.results if result.status == "failed"]:
        count = len(comparison.results)
        sys.exit(f"{len(failed)} of {count} runs failed ({', '.join(failed)}); --resume tries them again")


def write_comparison(folder: Path) -> Comparison:
    """Everything that the runs in a folder say together so far, written to it."""
    comparison = read_comparison(folder)
    write_results(comparison)
    write_page(comparison)
    return comparison


def refusals(plan: ComparePlan) -> list[str]:
    """A line per method and flag that the method does not take."""
    return [
        f"--{name.replace('_', '-')} is not passed to {method}: {reason}"
        for method, fields in plan.refused.items()
        for name, reason in fields.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(run, parse_compare(argv))


if __name__ == "__main__":
    main()
