"""`python -m dssp.retrain`: train the network of a genotype from scratch and test it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dssp.benchmark import open_benchmark
from dssp.callbacks import Checkpointing, Interruption, MetricsLog, ProgressBar, TensorBoard
from dssp.chain_genotype import ChainGenotype
from dssp.command import GenotypeUnavailable, choose_device, run_command
from dssp.config import RetrainConfig, parse_retrain
from dssp.cost import count_flops, count_parameters
from dssp.data import DataSet, load_data
from dssp.derived.retraining import Retraining
from dssp.derived.trained import NAME, TrainedNetwork, save_trained
from dssp.distributed import check_same, in_turn, is_main, on_main, ranks, wait_for_all
from dssp.engine import Callback, Engine
from dssp.genotype import AnyGenotype, load_with_space
from dssp.network import DerivedNetwork
from dssp.options import ConfigError
from dssp.runs.files import write_json
from dssp.runs.fingerprint import fingerprint
from dssp.runs.memory import memory_named
from dssp.runs.run_folder import after_restart, check_same_command, finished_summary, open_run_folder
from dssp.runs.summary import tabulated_line
from dssp.spaces import CellSpace, get_space
from dssp.steps.optimization import evaluate
from dssp.steps.sync_batch_norm import synchronise_norms


@dataclass(frozen=True)
class Retrained:
    """What a retraining says about a genotype; ``test_accuracy`` in 0..1, measured once, after the last epoch."""

    test_accuracy: float | None
    seconds: float | None
    parameters: int
    flops: int


def retrain(
    space: CellSpace,
    genotype: AnyGenotype,
    data: DataSet,
    config: RetrainConfig,
    *,
    folder: Path,
    device: torch.device,
    console: Console,
) -> Retrained:
    """Train the derived network on all training images, test it once, and write it to the folder as network.pt.

    epochs=0: only its size and cost, both without the auxiliary head. Raises ConfigError if the recipe does not fit the
    images.
    """
    torch.manual_seed(config.seed)
    network = DerivedNetwork(
        space,
        genotype,
        channels=config.channels,
        cells=config.cells,
        classes=len(data.classes),
        image_channels=data.image_shape[0],
        stem=config.stem,
        auxiliary=config.auxiliary_weight > 0,
    )
    _check_fits(config, network, data)
    if config.sync_batch_norm and ranks() > 1:
        synchronise_norms(network)
    network = network.to(device).to(memory_format=torch.channels_last)
    extra = 0 if network.auxiliary_head is None else count_parameters(network.auxiliary_head)
    cost = {"parameters": count_parameters(network) - extra, "flops": count_flops(network, data.image_shape)}
    if config.epochs == 0:
        return Retrained(test_accuracy=None, seconds=None, **cost)
    task = Retraining(network, data.train_valid, config)
    callbacks: list[Callback] = [
        Interruption(),
        Checkpointing(folder / "checkpoints", resume=config.resume, every=config.checkpoint_every),
    ]
    if is_main():
        callbacks += [
            MetricsLog(folder / "retrain.jsonl"),
            TensorBoard(folder / "tensorboard"),
            ProgressBar(console),
        ]
    engine = Engine(task, callbacks, max_skipped_steps=config.max_skipped_steps)
    engine.fit()
    built = (space.name, genotype, config.channels, config.cells, config.stem, data.classes, data.image_shape)
    trained = TrainedNetwork(task.trained, *built, data.test.mean, data.test.std)
    accuracy = on_main(lambda: _tested_and_saved(trained, data, config, folder))  # with rank 0's running statistics
    return Retrained(test_accuracy=accuracy, seconds=engine.seconds, **cost)


def _tested_and_saved(trained: TrainedNetwork, data: DataSet, config: RetrainConfig, folder: Path) -> float:
    test = data.test.batches(config.batch_size, epoch=0, seed=config.seed, train=False)
    _, accuracy = evaluate(trained.network, test)
    save_trained(folder / NAME, trained)
    return accuracy


def _check_fits(config: RetrainConfig, network: DerivedNetwork, data: DataSet) -> None:
    """Raises ConfigError for what cannot be done to images of this size."""
    side = min(data.image_shape[1:])
    if config.cutout >= side:
        raise ConfigError(
            "cutout", f"expected less than the {side} pixels of an image of {data.name}, got {config.cutout}"
        )
    if network.auxiliary_head is not None and network.tap is not None:
        smallest, there = network.tap.head.smallest, -(-side // 2**network.tap.halvings)
        if there < smallest:
            raise ConfigError(
                "auxiliary_weight",
                f"the auxiliary head needs {smallest}x{smallest} pixels where it is, images of {data.name} have "
                f"{there}x{there} there; expected 0, got {config.auxiliary_weight}",
            )


def read_genotype(path: str) -> tuple[CellSpace, AnyGenotype]:
    """The genotype in a file, of operations of its space, after that. Raises GenotypeUnavailable."""
    try:
        name, genotype = load_with_space(path)
    except OSError as error:
        raise GenotypeUnavailable(f"--genotype: {path}: {error.strerror}") from None
    except ValueError as error:
        raise GenotypeUnavailable(f"--genotype: {error}") from None
    try:
        space = get_space(name)
    except ValueError as error:
        raise GenotypeUnavailable(f"--genotype: {path}: {error}") from None
    if not isinstance(genotype, space.genotype):
        raise GenotypeUnavailable(f"--genotype: {path} names space {name}, its genotype is one of {genotype.space}")
    names = {operation for nodes, _ in genotype.cells.values() for node in nodes for operation, _ in node}
    if unknown := names - set(space.operations):
        expected = ", ".join(space.operations)
        raise GenotypeUnavailable(
            f"--genotype: {path} names {', '.join(sorted(unknown))}, expected operations among {expected}"
        )
    return space, genotype


def _cells(config: RetrainConfig, genotype: AnyGenotype) -> int | None:
    """How many cells the network has: where each has its own architecture, as many as the genotype."""
    if not isinstance(genotype, ChainGenotype) or config.cells == len(genotype.stages):
        return config.cells
    if config.cells is not None:
        raise ConfigError("cells", f"the genotype has {len(genotype.stages)} stages, got {config.cells}")
    return len(genotype.stages)


def run(config: RetrainConfig, console: Console) -> dict[str, Any]:
    """The whole command: a run folder with retrain.jsonl, checkpoints and summary.json; returns the summary."""
    config = after_restart(config)
    check_same_command(config)
    space, genotype = read_genotype(config.genotype)
    if config.space not in (None, space.name):
        raise ConfigError("space", f"the genotype is of space {space.name}, got {config.space}")
    config = RetrainConfig.from_dict({**config.to_dict(), "space": space.name, "cells": _cells(config, genotype)})
    config = config.resolve()
    benchmark = open_benchmark(config.benchmark, space)
    tabulated = None if benchmark is None else benchmark.tabulated(genotype)
    device = choose_device(config.device, config.threads)
    with in_turn():
        data = load_data(
            config.dataset,
            data_path=config.data_path,
            image_size=config.image_size,
            seed=config.seed,
            device=device,
            workers=config.workers,
        )
    details = {"data": fingerprint(data)}
    check_same({**details, "genotype": genotype.to_dict()}, "start")
    folder = open_run_folder(config, "retrain", details)
    if (finished := on_main(lambda: finished_summary(folder))) is not None:
        console.print(f"{folder} is finished, nothing is left to do", highlight=False, soft_wrap=True)
        _print_summary(console, finished, folder)
        return finished
    with memory_named("retraining", config.batch_size):
        result = retrain(space, genotype, data, config, folder=folder, device=device, console=console)
    summary = {
        "genotype": genotype.to_dict(),
        "test_accuracy": result.test_accuracy,
        "retrain_seconds": result.seconds,
        "parameters": result.parameters,
        "flops": result.flops,
        "tabulated": tabulated,
    }
    if is_main():
        write_json(folder / "summary.json", summary)
        _print_summary(console, summary, folder)
    wait_for_all()
    return summary


def _print_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    accuracy = summary["test_accuracy"]
    trained = "Not trained" if accuracy is None else f"Test accuracy {accuracy:.2%}"
    cost = f"{summary['parameters']:,} parameters, {summary['flops'] / 1e6:.1f} MFLOPs per image"
    if summary["tabulated"] is not None:
        cost += f"\n{tabulated_line(summary['tabulated'])}"
    console.print(f"{trained}, {cost}\nRun folder {folder}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(run, parse_retrain(argv), many_ranks=True)


if __name__ == "__main__":
    main()
