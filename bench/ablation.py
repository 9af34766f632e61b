"""What does each ingredient of method dssp give? Searches with all of them, and with one left out or replaced.

    python bench/ablation.py --seeds 3                                                        # digits
    python bench/ablation.py --space nasbench201 --dataset cifar10 --benchmark table.csv.gz --retrain-epochs 0

Every other flag of dssp.search but --method and --seed goes to all runs. Each run is a process of its own with a folder
of its own in --run-dir; the same command with --resume --run-dir continues, and of finished runs repeats the table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench`, and the packages where they are not installed
from rich.console import Console
from rich.table import Table

from bench import results
from dssp.command import choose_device, run_command
from dssp.compare import end_if_failed, search_all
from dssp.comparison.plan import ComparePlan, add_counts
from dssp.comparison.results import NUMBERS, Comparison, Spread, read_comparison, spread
from dssp.comparison.table import columns
from dssp.config import SearchConfig, search_parser
from dssp.options import ConfigError
from dssp.report.units import DASH
from dssp.runs.files import write_json
from dssp.runs.run_folder import open_run_folder


@dataclass(frozen=True)
class Variant:
    """A line of the table: what it says, and the fields in which the searches differ from those of method dssp."""

    title: str
    changed: Mapping[str, Any]


WHOLE = "dssp"
VARIANTS = {
    WHOLE: Variant("dssp", {}),
    "raw-gates": Variant("gates not relative", {"raw_gates": True}),
    "offer-none": Variant("`none` is a candidate", {"offer_none": True}),
    "any-kind": Variant("candidates leave whatever kind is left", {"any_kind": True}),
    "all-candidates": Variant("no candidate leaves before the paths", {"candidates_kept": 100}),  # no space has so many
    "no-paths": Variant("no hard paths: alpha and gates decide", {"path_epochs": 0}),
    "ties-by-loss": Variant("of paths that tie, the lowest loss", {"tie_break": "loss"}),
    "ties-by-parsimony": Variant("of paths that tie, the fewest parameters", {"tie_break": "parsimony"}),
    "dssp-paper": Variant("the paper's formula, edges leave as in dssp", {"method": "dssp-paper"}),
    "dssp-paper-absolute": Variant(
        "the paper's formula and threshold", {"method": "dssp-paper", "prune_strategy": "absolute"}
    ),
}


@dataclass(frozen=True)
class AblationPlan(ComparePlan):
    """A comparison of variants instead of methods; `argv` is its command line.

    json      another file for ablation.json
    markdown  the table is printed as README.md has it
    """

    argv: tuple[str, ...]
    json: Path | None
    markdown: bool

    def fields(self, method: str) -> dict[str, Any]:
        """What the runs of a variant have in common. All warm up alike, though that preset depends on other fields."""
        whole = {**self.given, "method": "dssp"}
        warmup_epochs = SearchConfig(**whole).resolve().warmup_epochs
        return {**whole, "warmup_epochs": warmup_epochs, **VARIANTS[method].changed}


def parse(argv: Sequence[str]) -> AblationPlan:
    """The ablation on the command line; a bad one ends the process with one line."""
    description = (__doc__ or "").partition("\n")[0]
    parser = search_parser("bench.ablation", description, without=("method", "seed", "raw_gates", "offer_none"))
    section = parser.add_argument_group("ablation", "what is left out; runs are named <variant>-<seed>")
    add = section.add_argument
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT", help=_variants())
    add_counts(section, "variant")
    add("--json", type=Path, metavar="FILE", help="another file for ablation.json")
    add("--markdown", action="store_true", help="print the table as Markdown")
    given = vars(parser.parse_args(argv))
    own = {name: given.pop(name) for name in ("seeds", "jobs", "json", "markdown")}
    own |= {"run_dir": given.pop("run_dir", None), "resume": given.pop("resume", False)}
    variants = tuple(dict.fromkeys(given.pop("variants")))
    plan = AblationPlan(methods=variants, given=given, refused={}, argv=tuple(argv), **own)
    try:
        plan.runs(Path())
    except ConfigError as error:
        parser.error(f"argument --{error.field.replace('_', '-')}: {error.reason}")
    return plan


def _variants() -> str:
    return "default: all of " + "; ".join(f"{name} ({variant.title})" for name, variant in VARIANTS.items())


def run(plan: AblationPlan, console: Console) -> None:
    """The whole command: fills a folder with the runs and ablation.json; status 1 if a run failed."""
    folder = open_run_folder(plan, "ablation", {})
    comparison = search_all(plan, folder, console, read_comparison)
    found = content(plan, comparison)
    for path in filter(None, [folder / "ablation.json", plan.json]):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        console.print(str(path), highlight=False, soft_wrap=True)
    if plan.markdown:
        console.print(markdown(comparison), highlight=False, markup=False, soft_wrap=True)
    else:
        print_table(console, comparison)
    end_if_failed(comparison)


# What the runs say


def content(plan: AblationPlan, comparison: Comparison) -> dict[str, Any]:
    """ablation.json: where it was measured, every run, and how each number spreads over the runs of a variant."""
    config = plan.runs(comparison.folder)[0].config
    names = [*NUMBERS, *comparison.tabulated]
    variants = {
        variant: {
            **vars(VARIANTS[variant]),
            "difference": as_json(difference(comparison, variant)),
            **{name: as_json(comparison.spread(variant, name)) for name in names},
        }
        for variant in comparison.methods
    }
    runs = [
        {"variant": r.method, "seed": r.seed, "status": r.status, "error": r.error, "shared": r.shared, **r.numbers}
        for r in comparison.results
    ]
    return {
        "machine": results.machine(choose_device(config.device, config.threads)),
        "versions": results.versions(),
        "commit": results.commit(),
        "command": [without_folder(word) for word in plan.argv],
        "judge": comparison.judge,
        "variants": variants,
        "runs": runs,
    }


def as_json(found: Spread | None) -> dict[str, Any] | None:
    return None if found is None else vars(found)


def without_folder(word: str) -> str:
    """A word of a command line; of an absolute path the last name."""
    return re.sub(r"(^|=)/(.*/)?", r"\1", word)


def difference(comparison: Comparison, variant: str) -> Spread | None:
    """How much more accurate a variant is than dssp, seed by seed: what a seed does to both is taken out."""
    if variant == WHOLE:
        return None
    of_seed = {result.seed: result.numbers.get(comparison.judge) for result in comparison.of(WHOLE)}
    pairs = [(result.numbers.get(comparison.judge), of_seed.get(result.seed)) for result in comparison.of(variant)]
    return spread(own - whole for own, whole in pairs if own is not None and whole is not None)


def cells(comparison: Comparison) -> list[list[str]]:
    """The table: headings, then a line per variant with mean ± sample standard deviation of its finished runs."""
    shown = columns(comparison, wide=True)
    accuracy = [column for column in shown if column.number == comparison.judge]  # none, where no run has any
    table = [["Variant", "Runs", *(column.heading for column in shown), *["Over dssp"] * len(accuracy)]]
    for variant in comparison.methods:
        spreads = [(column.text, comparison.spread(variant, column.number)) for column in shown]
        spreads += [(column.text, difference(comparison, variant)) for column in accuracy]
        numbers = [text(found) if found else DASH for text, found in spreads]
        table.append([VARIANTS[variant].title, str(len(comparison.of(variant))), *numbers])
    return table


def print_table(console: Console, comparison: Comparison) -> None:
    """The table with its columns aligned, never cut."""
    headings, *lines = cells(comparison)
    table = Table(*headings, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    wide = console if console.is_terminal else Console(file=console.file, width=250)  # a file has no margin
    wide.print(table, highlight=False, markup=False)


def markdown(comparison: Comparison) -> str:
    """The table as README.md has it."""
    headings, *lines = cells(comparison)
    lines = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(run, parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
