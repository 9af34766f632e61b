"""The command line of a comparison, and the runs it stands for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dssp.config import SearchConfig, search_parser
from dssp.methods import METHODS
from dssp.options import ConfigError, flags
from dssp.runs.run_folder import NOT_COMPARED

DESCRIPTION = """\
Compare search methods under one budget: a search and a retraining per method and seed, each a process of its own. Every
flag of dssp.search but --method and --seed goes to all of them. A flag that a method refuses (--prune-strategy: darts
prunes nothing) is left out for that method, and one line says so; one that every method refuses is an error.
The budget is a number of epochs or, with --search-seconds, a time."""
PILOT_EPOCHS = (4, 8)


@dataclass(frozen=True)
class PlannedRun:
    """One search of the comparison; ``config`` says which. ``folder`` is its run folder."""

    config: SearchConfig
    folder: Path
    arguments: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def epochs(self) -> int:
        """Of the search and of the retraining after it."""
        return self.config.epochs + self.config.retrain_epochs


@dataclass(frozen=True)
class ComparePlan:
    """Everything that decides a comparison: seeds 0, 1, ... of every method, ``jobs`` runs at a time.

    given           the fields of SearchConfig that the command line sets
    refused         method -> fields among them that it does not take -> why
    search_seconds  the time of a search, where that is the budget
    epochs          method -> the epochs that time gives it, once they are known (dssp.comparison.time_budget)
    """

    methods: tuple[str, ...]
    seeds: int
    jobs: int
    given: Mapping[str, Any]
    refused: Mapping[str, Mapping[str, str]]
    run_dir: str | None
    resume: bool
    search_seconds: float | None = field(default=None, kw_only=True)
    epochs: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """What makes two comparisons the same, and how this one runs."""
        fields = {name: value for name, value in self.given.items() if name not in NOT_COMPARED}
        return {
            "methods": list(self.methods),
            "seeds": self.seeds,
            "search_seconds": self.search_seconds,
            "flags": fields,
            "jobs": self.jobs,
        }

    def runs(self, folder: Path) -> list[PlannedRun]:
        """Seed after seed, so that every method has its first result early."""
        return [
            self._run(self.fields(method) | {"seed": seed}, folder / run_name(method, seed))
            for seed in range(self.seeds)
            for method in self.methods
        ]

    def pilots(self, folder: Path) -> dict[str, list[PlannedRun]]:
        """Per method two short searches, of which the time of longer ones is told."""
        return {
            method: [
                self._run(
                    self.fields(method) | {"seed": 0, "epochs": epochs, "retrain_epochs": 0},
                    folder / run_name(method, epochs),
                )
                for epochs in PILOT_EPOCHS
            ]
            for method in self.methods
        }

    def fields(self, method: str) -> dict[str, Any]:
        """What the runs of a method have in common."""
        taken = {name: value for name, value in self.given.items() if name not in self.refused[method]}
        fitting = {"epochs": self.epochs[method]} if method in self.epochs else {}
        return {**taken, **fitting, "method": method}

    def _run(self, fields: dict[str, Any], folder: Path) -> PlannedRun:
        fields = fields | {"run_dir": str(folder)}
        return PlannedRun(SearchConfig(**fields).resolve(), folder, flags(fields))


def run_name(method: str, number: int) -> str:
    """The name of a run, and of its folder in that of the comparison; ``number``: its seed, or a pilot's epochs."""
    return f"{method}-{number}"


def parse_compare(argv: Sequence[str] | None = None) -> ComparePlan:
    """The comparison on the command line of `python -m dssp.compare`; a bad one ends the process with one line."""
    parser = search_parser("dssp.compare", DESCRIPTION, without=("method", "seed"))
    section = parser.add_argument_group("comparison", "what is compared; runs are named <method>-<seed>")
    section.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"search methods, among {', '.join(METHODS)}; default: all of them",
    )
    add_counts(section, "method")
    section.add_argument(
        "--search-seconds",
        type=_seconds,
        metavar="S",
        help="a time for every search instead of --epochs: each method gets the epochs that fit on this machine, as "
        f"two short searches of it tell first ({' and '.join(map(str, PILOT_EPOCHS))} epochs)",
    )
    given = vars(parser.parse_args(argv))
    methods = tuple(dict.fromkeys(given.pop("methods")))
    own = {name: given.pop(name) for name in ("seeds", "jobs", "search_seconds")}
    own |= {"run_dir": given.pop("run_dir", None), "resume": given.pop("resume", False)}
    try:
        refused = {method: refused_fields(method, given) for method in methods}
        for name in given:
            if all(name in fields for fields in refused.values()):
                raise ConfigError(name, refused[methods[0]][name])
        plan = ComparePlan(methods=methods, given=given, refused=refused, **own)
        if plan.search_seconds is not None:
            if "epochs" in given:
                raise ConfigError("search_seconds", "not together with --epochs: it decides how many there are")
            plan.pilots(Path())
    except ConfigError as error:
        parser.error(f"argument --{error.field.replace('_', '-')}: {error.reason}")
    return plan


def add_counts(section: argparse._ActionsContainer, subject: str) -> None:
    """The flags --seeds and --jobs."""
    section.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help=f"runs of every {subject}: seeds 0 to N-1 (default 3)"
    )
    section.add_argument(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="runs at a time; above 1, they share the machine and the table says so beside the times (default 1)",
    )


def refused_fields(method: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Which of the given fields a method refuses, and why.

    Raises ConfigError for a configuration that is wrong without any of them being to blame.
    """
    fields, refused = dict(given), {}
    while True:
        try:
            SearchConfig(**{**fields, "method": method}).resolve()
        except ConfigError as error:
            if error.field not in fields:
                raise
            refused[error.field] = error.reason
            del fields[error.field]
        else:
            return refused


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text}")
    return seconds


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)
