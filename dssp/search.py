"""`python -m dssp.search`: search for a cell, prune while searching, derive, retrain, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dssp.benchmark import open_benchmark
from dssp.bilevel import BilevelSearch
from dssp.callbacks import Checkpointing, Interruption, MetricsLog, ProgressBar, TensorBoard
from dssp.command import choose_device, run_command
from dssp.config import RetrainConfig, SearchConfig, parse_search
from dssp.data import DataSet, load_data
from dssp.distributed import check_same, checksum, in_turn, is_main, on_main, ranks
from dssp.engine import Callback, Engine
from dssp.genotype import AnyGenotype, load_genotype, save_genotype
from dssp.methods import METHODS
from dssp.options import ConfigError
from dssp.report import write_report
from dssp.retrain import Retrained, retrain
from dssp.runs.files import write_json
from dssp.runs.fingerprint import fingerprint
from dssp.runs.memory import memory_named
from dssp.runs.run_folder import after_restart, check_same_command, finished_summary, open_run_folder
from dssp.runs.summary import print_summary, step_seconds
from dssp.spaces import CellSpace, get_space
from dssp.steps.sync_batch_norm import synchronise_norms
from dssp.supernet import Supernet


def search_space(config: SearchConfig) -> CellSpace:
    """The configured space. Masks say what `none` says: methods that have them offer it only if told to."""
    space = replace(get_space(config.space), nodes=config.nodes)
    if not (METHODS[config.method].offers_none or config.offer_none):
        space = replace(space, operations=tuple(name for name in space.operations if name != "none"))
    return space


def build_supernet(config: SearchConfig, data: DataSet, device: torch.device) -> Supernet:
    """A freshly initialised supernet (from the seed) on the device."""
    torch.manual_seed(config.seed)
    method = METHODS[config.method]
    supernet = Supernet(
        search_space(config),
        channels=config.channels,
        cells=config.cells,
        classes=len(data.classes),
        image_channels=data.image_shape[0],
        stem=config.stem,
        gated=method.gated,
        weighs_edges=method.weighs_edges,
        edges=method.edges,
    )
    if config.sync_batch_norm and ranks() > 1:
        synchronise_norms(supernet)
    return supernet.to(device).to(memory_format=torch.channels_last)


def uncaptured_steps(search: BilevelSearch, device: torch.device) -> str | None:
    """Which steps of a search no CUDA graph replays on a device where others would be replayed, None if none."""
    if device.type != "cuda" or search.config.no_cuda_graphs:
        return None
    if search.method.on_host:
        return f"the steps of method {search.config.method}"
    return "the steps on hard paths" if search.config.path_epochs else None


def retrain_config(config: SearchConfig, genotype: str) -> RetrainConfig:
    """The retraining that a search ends with."""
    shared = (
        *("dataset", "data_path", "image_size", "space", "stem", "seed", "device", "precision", "sync_batch_norm"),
        "deterministic",
        *("run_dir", "resume", "checkpoint_every", "max_skipped_steps", "threads", "workers"),
    )
    sizes = ("epochs", "batch_size", "channels", "cells")
    return RetrainConfig(
        genotype=genotype,
        **{name: getattr(config, name) for name in shared},
        **{name: getattr(config, f"retrain_{name}") for name in sizes},
    ).resolve()


def run(config: SearchConfig, console: Console) -> dict[str, Any]:
    """The whole command: fills a run folder and returns the summary that ends up in it."""
    config = after_restart(config)
    check_same_command(config)
    device = choose_device(config.device, config.threads)
    benchmark = open_benchmark(config.benchmark, get_space(config.space))
    with in_turn():
        data = load_data(
            config.dataset,
            data_path=config.data_path,
            image_size=config.image_size,
            seed=config.seed,
            device=device,
            workers=config.workers,
        )
    searched = data if config.train_images is None else data.limited(config.train_images, seed=config.seed)
    supernet = build_supernet(config, data, device)
    edges = {type: [f"{source}->{node}" for source, node in supernet.space.edges] for type in supernet.cell_types}
    details = {"edges": edges, "operations": list(supernet.space.operations)}
    details["data"] = fingerprint(data)
    check_same({"data set": details["data"], "initial weights": checksum(supernet.parameters())}, "start")
    search = BilevelSearch(config, supernet, searched, benchmark)
    if search.method.budget is not None:
        search.derived()  # raises before there is a run, if nothing fits at all
    folder = open_run_folder(config, config.method, details)
    if (finished := on_main(lambda: finished_summary(folder))) is not None:
        if is_main():
            console.print(f"{folder} is finished, nothing is left to do", highlight=False, soft_wrap=True)
            print_summary(console, finished, load_genotype(folder / "genotype.json"), folder, write_report(folder))
        return finished
    metrics = MetricsLog(folder / "metrics.jsonl")
    callbacks: list[Callback] = [
        Interruption(),
        Checkpointing(folder / "checkpoints", resume=config.resume, every=config.checkpoint_every),
    ]
    if is_main():
        callbacks += [
            metrics,
            TensorBoard(folder / "tensorboard", edges),
            ProgressBar(console, active_edges=len(supernet.live_edges())),
        ]
    if is_main() and (steps := uncaptured_steps(search, device)) is not None:
        console.print(f"CUDA graphs: {steps} choose on the host what runs, so they run uncaptured", highlight=False)
    engine = Engine(search, callbacks, max_skipped_steps=config.max_skipped_steps)
    with memory_named("search", config.batch_size):
        engine.fit()

    genotype = search.derived()
    _check_fits(search, genotype)
    if is_main():
        save_genotype(folder / "genotype.json", genotype, space=config.space, method=config.method, seed=config.seed)
    with memory_named("retraining", config.retrain_batch_size, "--retrain-"):
        result = retrain(
            supernet.space,
            genotype,
            data,
            retrain_config(config, str(folder / "genotype.json")),
            folder=folder,
            device=device,
            console=console,
        )
    return on_main(lambda: _finish(folder, console, search, engine, metrics, result))


def _check_fits(search: BilevelSearch, genotype: AnyGenotype) -> None:
    """Raises ConfigError for what was derived under another budget than that with which the run continues."""
    space, budget = search.supernet.space, search.method.budget
    if budget is not None and not budget.admits(space, genotype):
        (name, limit), cost = next(iter(budget.limits.items())), budget.cost(space, genotype)
        raise ConfigError(name, f"the paths were compared before under another limit, got {limit}; chosen costs {cost}")


def _finish(
    folder: Path, console: Console, search: BilevelSearch, engine: Engine, metrics: MetricsLog, result: Retrained
) -> dict[str, Any]:
    genotype = search.derived()
    summary = {
        "genotype": genotype.to_dict(),
        "search_seconds": engine.seconds,
        "search_flops": search.flops.total,
        "retrain_seconds": result.seconds,
        "test_accuracy": result.test_accuracy,
        "parameters": result.parameters,
        "flops": result.flops,
        "pruned": search.method.history,
        "step_seconds": step_seconds(metrics.rows),
        "tabulated": search.tabulated(),
    }
    write_json(folder / "summary.json", summary)
    print_summary(console, summary, genotype, folder, write_report(folder))
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(run, parse_search(argv).resolve(), many_ranks=True)


if __name__ == "__main__":
    main()
