"""`python -m dssp.sweep`: searches over lambda and pruning thresholds, scheduled by Ray Tune."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dssp.command import run_command
from dssp.engine import Interrupted
from dssp.report.run_folder import read_run_folder
from dssp.report.units import DASH
from dssp.runs.files import write_atomically
from dssp.runs.run_folder import open_run_folder
from dssp.sweeping import SweepPlan, Trial, parse_sweep, run_trial

NUMBERS = ("valid_accuracy", "active_edges", "search_seconds", "test_accuracy", "parameters", "flops")
MISSING = 'dssp.sweep needs Ray Tune: pip install "dssp[sweep]"'
# Trials start where the command does; a signal is ours; nothing is sent anywhere.
ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def run(plan: SweepPlan, console: Console) -> list[dict[str, Any]]:
    """The whole command: fills a folder with the trials and sweep.csv; status 1 if a trial failed."""
    os.environ.update(ENVIRONMENT)
    try:
        import ray
        from ray import tune
    except ImportError:
        sys.exit(MISSING)
    folder = open_run_folder(plan, "sweep", {}).resolve()
    trials, here = plan.trials(folder), os.getcwd()

    def trainable(parameters: dict[str, Any]) -> None:
        run_trial(trials[parameters["trial"]], here, tune.report)

    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    jobs = min(plan.jobs, cores)
    resources = {"cpu": cores // jobs, "gpu": gpus / jobs if gpus < jobs else int(gpus > 0)}
    ray.init(num_cpus=cores, num_gpus=gpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(metric="valid_accuracy", mode="max", max_concurrent_trials=jobs),
            run_config=tune.RunConfig(name="ray", storage_path=str(folder), verbose=0),
        )
        outcome = tuner.fit()
    except SystemError as error:  # what Ray's core makes of an exception that a signal raised in it
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        raise
    finally:
        ray.shutdown()
    rows = [row(trial) for trial in trials]
    write_csv(folder / "sweep.csv", rows)
    print_rows(console, rows)
    console.print(str(folder / "sweep.csv"), highlight=False, soft_wrap=True)
    if outcome.errors:
        sys.exit(f"{len(outcome.errors)} of {len(trials)} trials failed; *.err in {folder} say why, --resume goes on")
    return rows


def row(trial: Trial) -> dict[str, Any]:
    """What a trial says: its values, the last epoch of its search, its summary; None where it has not come so far."""
    numbers: dict[str, Any] = dict.fromkeys(NUMBERS)
    if (trial.folder / "config.json").exists():
        found = read_run_folder(trial.folder)
        said = {
            **(found.epochs[-1].numbers if found.epochs else {}),
            **(found.summary.numbers if found.summary else {}),
        }
        numbers |= {name: said.get(name) for name in NUMBERS}
        if found.summary:
            numbers["active_edges"] = len(found.edges) - len(found.summary.pruned)
            numbers |= {f"tabulated_{column}": value for column, value in found.summary.tabulated.items()}
    return {**trial.values, **numbers, "folder": trial.folder.name}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line per trial, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """The trials, best validation accuracy first."""
    names = [name for name in rows[0] if name != "folder" and any(row.get(name) is not None for row in rows)]
    table = Table(*(name.replace("_", " ") for name in names), box=None, pad_edge=False)
    for row in sorted(rows, key=lambda row: -(row["valid_accuracy"] or 0.0)):
        table.add_row(*(DASH if row.get(name) is None else f"{row[name]:.6g}" for name in names))
    console.print(table, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(run, parse_sweep(argv))


if __name__ == "__main__":
    main()
