"""How well does the comparison of hard paths rank them? Their held-out losses against a table of true accuracies.

For a finished search of a space that has a table, over the paths that were compared at its end (all that are left, or
--paths of them drawn at random), it prints what the table holds for them, and Spearman's rank correlation with it of
- the measured loss, that of the additive model, and their mean, which decides (dssp.paths.effects), and
- the number of parameters, the prior of --tie-break capacity;
and what would be derived by the lowest loss, and by each rule among those that tie with it. The table chooses nothing.

    python bench/path_ranks.py runs/X --benchmark table.csv.gz
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from scipy.stats import spearmanr

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the packages, where they are not installed
from dssp.benchmark import Benchmark
from dssp.bilevel import BilevelSearch
from dssp.checkpoint import load_newest
from dssp.config import SearchConfig
from dssp.data import load_data
from dssp.methods.dssp import Dssp
from dssp.paths.effects import additive_model, halfway
from dssp.paths.scores import Score, score_random, select
from dssp.runs.run_folder import stored_config
from dssp.search import build_supernet

COLUMN = "cifar10_test_200ep"


def finished_search(folder: Path) -> BilevelSearch:
    """The search of a run folder as its last checkpoint has it."""
    config = stored_config(folder)
    state = load_newest(folder / "checkpoints", "search")
    if not isinstance(config, SearchConfig) or config.method != "dssp" or state is None:
        raise SystemExit(f"{folder}: expected the run folder of a search by method dssp, with its checkpoints")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    data = load_data(config.dataset, data_path=config.data_path, image_size=config.image_size, seed=config.seed)
    if config.train_images is not None:
        data = data.limited(config.train_images, seed=config.seed)
    search = BilevelSearch(config, build_supernet(config, data, torch.device("cpu")), data)
    search.load_state_dict(state["task"])
    return search


def main() -> None:
    """Score the paths and print a line for each way to rank them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--benchmark", required=True, metavar="TABLE")
    parser.add_argument("--paths", type=int, default=256, help="at most (default %(default)s)")
    arguments = parser.parse_args()
    search = finished_search(arguments.run_dir)
    table, method = Benchmark(arguments.benchmark, search.supernet.space), search.method
    assert isinstance(method, Dssp)
    space = method.paths.open()
    losses = partial(method.paths.losses_of, comparing=True)
    measured = score_random(space, losses, limit=arguments.paths, seed=0)
    truth = {path: table.tabulated(space.genotype(path))[COLUMN] for path in measured}
    found = list(truth.values())
    best, mean = max(found), sum(found) / len(found)
    print(f"{len(found)} paths of {len(space)}: {COLUMN} {best:.2f} at best, {mean:.2f} on average")

    def line(name: str, ranked: Callable[[tuple[int | None, ...]], float], scores: Score | None) -> None:
        rank = spearmanr([ranked(path) for path in truth], found).statistic
        rules = {
            "loss": lambda path: 0,
            "parsimony": lambda path: -space.parameters(path),
            "capacity": space.parameters,
        }
        derived = {rule: truth[select(scores, prefer)] for rule, prefer in rules.items()} if scores else {}
        said = "  ".join(f"{rule} {accuracy:.2f}" for rule, accuracy in derived.items())
        print(f"{name:22} Spearman {rank:+.2f}  {said}")

    model = additive_model(measured)
    for name, scores in (("measured loss", measured), ("additive model", model), ("mean of both", halfway(measured))):
        line(name, lambda path, scores=scores: -float(scores[path].mean()), scores)  # type: ignore[misc]
    line("parameters", space.parameters, None)


if __name__ == "__main__":
    main()
