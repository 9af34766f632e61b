"""A sweep's grid and what one of its trials is: a search of its own, whose epochs Ray Tune hears of."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dssp.config import SearchConfig, search_parser
from dssp.options import ConfigError, flags
from dssp.runs.run_folder import NOT_COMPARED

SWEPT = ("lambda_prune", "prune_threshold", "edge_budget")
POLL_SECONDS = 0.5
DESCRIPTION = """\
Search with every combination of pruning settings, as trials of Ray Tune (pip install "dssp[sweep]"). --lambda-prune,
--prune-threshold and --edge-budget take several values; every other flag of dssp.search goes to all trials. Trials are
compared by the validation accuracy of their supernets; without --retrain-epochs none is retrained."""


@dataclass(frozen=True)
class Trial:
    """One search: the values that make it, the folder it fills, the flags that start it."""

    values: Mapping[str, float]
    folder: Path
    arguments: list[str]


@dataclass(frozen=True)
class SweepPlan:
    """Everything that decides a sweep: the values of each swept field, and the fields that all trials share."""

    grid: Mapping[str, Sequence[float]]
    shared: Mapping[str, Any]
    jobs: int
    run_dir: str | None
    resume: bool

    def to_dict(self) -> dict[str, Any]:
        """What makes two sweeps the same, and how this one runs."""
        shared = {name: value for name, value in self.shared.items() if name not in NOT_COMPARED}
        return {"grid": {name: list(values) for name, values in self.grid.items()}, "flags": shared, "jobs": self.jobs}

    def combinations(self) -> list[dict[str, float]]:
        """Every choice of one value per swept field."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]

    def trials(self, folder: Path) -> list[Trial]:
        """A trial per combination."""
        trials = []
        for values in self.combinations():
            path = folder / ("_".join(f"{name.replace('_', '-')}={value}" for name, value in values.items()) or "trial")
            trials.append(Trial(values, path, flags({**self.shared, **values, "run_dir": str(path)})))
        return trials


def parse_sweep(argv: Sequence[str] | None = None) -> SweepPlan:
    """The sweep on the command line of `python -m dssp.sweep`; a bad one ends the process with one line."""
    parser = search_parser("dssp.sweep", DESCRIPTION, without=SWEPT)
    section = parser.add_argument_group("sweep", "what differs between trials")
    for name in SWEPT:
        flag = f"--{name.replace('_', '-')}"
        section.add_argument(flag, nargs="+", type=float, metavar="X", help="values; default: that of dssp.search")
    section.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time (default 1)")
    given = vars(parser.parse_args(argv))
    grid = {name: tuple(dict.fromkeys(values)) for name in SWEPT if (values := given.pop(name)) is not None}
    own = {"jobs": given.pop("jobs"), "run_dir": given.pop("run_dir", None), "resume": given.pop("resume", False)}
    plan = SweepPlan(grid=grid, shared={"retrain_epochs": 0, **given}, **own)
    try:
        if plan.jobs < 1:
            raise ConfigError("jobs", f"expected at least 1, got {plan.jobs}")
        for values in plan.combinations():
            SearchConfig(**{**plan.shared, **values}).resolve()
    except ConfigError as error:
        parser.error(f"argument --{error.field.replace('_', '-')}: {error.reason}")
    return plan


def run_trial(trial: Trial, working_folder: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Search, or continue searching, in a child process; ``report`` gets the metrics of every epoch.

    Raises RuntimeError with the last line that a search which failed has written.
    """
    command = [sys.executable, "-m", "dssp.search", *trial.arguments]
    if (trial.folder / "config.json").exists():
        command.append("--resume")
    out, err = trial.folder.with_name(f"{trial.folder.name}.out"), trial.folder.with_name(f"{trial.folder.name}.err")
    with out.open("ab") as out_file, err.open("wb") as err_file:
        child = subprocess.Popen(command, cwd=working_folder, stdout=out_file, stderr=err_file)
    reported = 0
    try:
        running = True
        while running:
            running = child.poll() is None  # first: what it wrote before it ended is read after that
            rows = epoch_rows(trial.folder)
            for row in rows[reported:]:
                report({"valid_accuracy": row.get("valid_accuracy", 0.0), "active_edges": row["active_edges"]})
            reported = len(rows)
            time.sleep(POLL_SECONDS * running)
    finally:
        if child.poll() is None:
            child.terminate()  # it saves and ends
        child.wait()
    if child.returncode != 0:
        said = err.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(said[-1] if said else f"exit status {child.returncode}")


def epoch_rows(folder: Path) -> list[dict[str, Any]]:
    """The epochs that a search has written in full."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
