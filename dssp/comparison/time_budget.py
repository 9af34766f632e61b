"""One wall-clock budget for all methods of a comparison: how many epochs of each fit, told by short searches."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dssp.comparison.plan import ComparePlan, PlannedRun
from dssp.comparison.processes import Processes
from dssp.comparison.progress import ComparisonBar
from dssp.options import ConfigError

FOLDER = "pilots"


def fit_epochs(plan: ComparePlan, folder: Path, console: Console) -> ComparePlan:
    """The plan with as many epochs for each method as its search makes in plan.search_seconds on this machine.

    Two pilots of each method tell (ComparePlan.pilots()), in the folder of the same name. They stay there, so that a
    comparison that continues comes to the same epochs without running them again. Without plan.search_seconds the plan
    is returned as it is.

    Raises ConfigError where not a single epoch fits. A pilot that fails ends the process with its reason.
    """
    seconds = plan.search_seconds
    if seconds is None:
        return plan
    pilots = folder / FOLDER
    pilots.mkdir(exist_ok=True)
    measured: dict[str, list[tuple[int, float]]] = {method: [] for method in plan.methods}
    planned = plan.pilots(pilots)
    _run([run for runs in planned.values() for run in runs], plan.jobs, pilots, console)
    for method, runs in planned.items():
        for run in runs:
            found = json.loads((run.folder / "summary.json").read_text())
            measured[method].append((run.config.epochs, found["search_seconds"]))
    epochs = {method: fitting_epochs(method, points, seconds) for method, points in measured.items()}
    for method, count in epochs.items():
        took = ", ".join(f"{n} took {time:.1f} s" for n, time in measured[method])
        console.print(f"{method}: {count} epochs for {seconds:g} s ({took})", highlight=False, soft_wrap=True)
    return replace(plan, epochs=epochs)


def fitting_epochs(method: str, measured: list[tuple[int, float]], seconds: float) -> int:
    """How many epochs take ``seconds``, on the line through two measured (epochs, seconds).

    A search has a part that does not grow with its epochs, such as the comparison of paths at its end. Where noise
    makes the longer pilot the faster one, there is none to be seen.
    """
    (fewer, short), (more, long) = measured
    each, fixed = (long - short) / (more - fewer), 0.0
    if each > 0:
        fixed = max(short - each * fewer, 0.0)
    if fixed == 0:
        each = long / more
    count = math.floor((seconds - fixed) / each)
    if count < 1:
        raise ConfigError(
            "search_seconds", f"method {method} needs about {fixed + each:.1f} s for one epoch, got {seconds:g} s"
        )
    return count


def _run(runs: list[PlannedRun], jobs: int, folder: Path, console: Console) -> None:
    processes = Processes(folder, jobs)
    with ComparisonBar(console, runs) as bar:
        processes.run(runs, look=bar.look, ended=lambda run: None)
    for run in runs:
        ended = processes.record.get(run.name)
        if ended is not None and ended.error is not None:
            sys.exit(f"pilot {run.name} failed: {ended.error}; --resume tries it again")
