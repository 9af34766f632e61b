"""What the runs of a comparison say, one by one and per method: comparison.csv and comparison.json."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dssp.comparison.plan import run_name
from dssp.comparison.processes import Ended, is_finished, read_record
from dssp.genotype import text_or_none
from dssp.report.run_folder import Run, UnreadableRun, read_run_folder
from dssp.runs.files import write_atomically, write_json

BASELINE = "darts"  # whose search time is 1 where times are compared
NUMBERS = (
    "epochs",
    *("search_seconds", "search_flops", "retrain_seconds", "peak_memory_bytes"),
    *("step_first_seconds", "step_last_seconds", "step_paths_seconds"),
    *("test_accuracy", "parameters", "flops"),
)


@dataclass(frozen=True)
class Result:
    """One run of a comparison. ``status``: finished, failed (``error`` says why) or unfinished; ``run``: its folder."""

    method: str
    seed: int
    status: str
    error: str | None
    shared: bool
    numbers: dict[str, float | None]
    run: Run | None

    @property
    def name(self) -> str:
        return run_name(self.method, self.seed)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for fewer than two) and number of the runs that have a number."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """The results of a folder. ``config`` is the "config" of its config.json, ``command`` what filled it."""

    folder: Path
    config: dict[str, Any]
    command: str | None
    results: tuple[Result, ...]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(result.method for result in self.results))

    @property
    def search_seconds(self) -> float | None:
        """The time that every search was given, None where all had the same number of epochs."""
        return self.config.get("search_seconds")

    def of(self, method: str) -> list[Result]:
        """The finished runs of a method."""
        return [result for result in self.results if (result.method, result.status) == (method, "finished")]

    @property
    def tabulated(self) -> list[str]:
        """The benchmark's columns."""
        return list(dict.fromkeys(key for r in self.results for key in r.numbers if key.startswith("tabulated_")))

    def spread(self, method: str, number: str) -> Spread | None:
        """How a number spreads over the finished runs of a method, None where no run has it."""
        return spread(result.numbers.get(number) for result in self.of(method))

    def time_ratio(self, method: str) -> float | None:
        """Mean search seconds over those of darts; None where one of the two has none."""
        own, baseline = self.spread(method, "search_seconds"), self.spread(BASELINE, "search_seconds")
        return own.mean / baseline.mean if own and baseline and baseline.mean > 0 else None

    @property
    def judge(self) -> str:
        """The number that accuracy stands for: after retraining, else the benchmark's last column."""
        retrained = any(result.numbers.get("test_accuracy") is not None for result in self.results)
        return self.tabulated[-1] if self.tabulated and not retrained else "test_accuracy"

    def best(self, method: str) -> Result | None:
        """The finished run of the highest accuracy, the first one where none has any."""
        return max(self.of(method), key=lambda result: _or_lowest(result.numbers.get(self.judge)), default=None)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean, sample standard deviation and number of the values that are not None; None if there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def read_comparison(folder: Path) -> Comparison:
    """The comparison in a folder, as far as it has come. Raises UnreadableRun if there is none."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
        config = content["config"]
        names = [(method, seed) for seed in range(config["seeds"]) for method in config["methods"]]
        record = read_record(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UnreadableRun(f"{path}: no comparison ({error})") from None
    results = tuple(_result(folder, method, seed, record.get(run_name(method, seed))) for method, seed in names)
    return Comparison(folder, config, content.get("command"), results)


def _result(folder: Path, method: str, seed: int, ended: Ended | None) -> Result:
    path = folder / run_name(method, seed)
    status, error, run = "unfinished", ended.error if ended else None, None
    try:
        run = read_run_folder(path) if (path / "config.json").exists() else None
    except UnreadableRun as unreadable:
        error = str(unreadable)
    if error is not None:
        status = "failed"
    elif is_finished(path):
        status = "finished"
    numbers = _numbers(run)
    numbers["epochs"] = run.config.get("epochs") if run else None
    numbers["peak_memory_bytes"] = ended.peak_memory_bytes if ended else None
    return Result(method, seed, status, error, ended is not None and ended.shared, numbers, run)


def _numbers(run: Run | None) -> dict[str, float | None]:
    numbers: dict[str, float | None] = dict.fromkeys(NUMBERS)
    if run is None or run.summary is None:
        return numbers
    said = run.summary.numbers
    numbers |= {name: said[name] for name in NUMBERS if name in said}
    numbers |= {f"step_{which}_seconds": said[f"step_{which}"] for which in ("first", "last", "paths")}
    return numbers | {f"tabulated_{column}": accuracy for column, accuracy in run.summary.tabulated.items()}


def _or_lowest(value: float | None) -> float:
    return -math.inf if value is None else value


# Files


def write_results(comparison: Comparison) -> None:
    """comparison.csv, a row per run, and comparison.json, an entry per method, in the comparison's folder."""
    text = io.StringIO()
    columns = ["method", "seed", "status", "error", "shared", *NUMBERS, *comparison.tabulated, "genotype"]
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(_row(result) for result in comparison.results)
    content = text.getvalue().encode(errors="replace")
    write_atomically(comparison.folder / "comparison.csv", lambda file: file.write(content))
    write_json(comparison.folder / "comparison.json", _json(comparison))


def _row(result: Result) -> dict[str, Any]:
    numbers = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in result.numbers.items()}
    genotype = result.run.genotype if result.run else None
    return {
        "method": result.method,
        "seed": result.seed,
        "status": result.status,
        "error": result.error,
        "shared": "yes" if result.shared else "no",
        **numbers,
        "genotype": genotype and (text_or_none(genotype) or json.dumps(genotype.to_dict())),
    }


def _json(comparison: Comparison) -> dict[str, Any]:
    names = [*NUMBERS, *comparison.tabulated]
    methods: dict[str, Any] = {}
    for method in comparison.methods:
        spreads = {name: comparison.spread(method, name) for name in names}
        known = {name: vars(found) if found else None for name, found in spreads.items()}
        of_method = [result for result in comparison.results if result.method == method]
        methods[method] = {
            "runs": {s: sum(r.status == s for r in of_method) for s in ("finished", "failed", "unfinished")},
            "times_shared": any(result.shared for result in of_method),
            f"search_seconds_over_{BASELINE}": comparison.time_ratio(method),
            **known,
        }
    return {"config": comparison.config, "command": comparison.command, "methods": methods}
