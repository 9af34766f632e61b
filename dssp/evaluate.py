"""`python -m dssp.evaluate`: test the network that a retraining left in its run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dssp.command import choose_device, run_command
from dssp.config import RESIZED, EvaluateConfig, parse_evaluate
from dssp.data import DataSet, load_data
from dssp.derived.trained import NAME, TrainedNetwork, load_trained
from dssp.options import ConfigError
from dssp.runs.run_folder import stored_config
from dssp.steps.optimization import evaluate


def run(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """The whole command: returns and prints loss and accuracy on the test images."""
    folder = Path(config.run_dir)
    trained = load_trained(folder / NAME)
    of_run = stored_config(folder) if config.dataset is None else config
    dataset, data_path = of_run.dataset, config.data_path or of_run.data_path
    assert dataset is not None
    device = choose_device(config.device, config.threads)
    data = load_data(
        dataset,
        data_path=data_path,
        image_size=trained.image_shape[1] if dataset in RESIZED else None,
        device=device,
        workers=config.workers,
    )
    _check_fits(trained, data)
    test = replace(data.test, mean=trained.mean.to(device), std=trained.std.to(device))
    network = trained.network.to(device).to(memory_format=torch.channels_last)
    loss, accuracy = evaluate(network, test.batches(config.batch_size, epoch=0, seed=0, train=False))
    console.print(
        f"Test accuracy {accuracy:.2%}, loss {loss:.4f}, on {len(test):,} images of {data.name}",
        highlight=False,
        soft_wrap=True,
    )
    if data.classes != trained.classes:
        console.print("The classes have other names than those the network was trained on", highlight=False)
    return {"dataset": data.name, "images": len(test), "test_loss": loss, "test_accuracy": accuracy}


def _check_fits(trained: TrainedNetwork, data: DataSet) -> None:
    if (data.image_shape, len(data.classes)) != (trained.image_shape, len(trained.classes)):
        expected, got = (
            f"images of {'x'.join(map(str, shape))} (channels, height, width) in {classes} classes"
            for shape, classes in (
                (trained.image_shape, len(trained.classes)),
                (data.image_shape, len(data.classes)),
            )
        )
        raise ConfigError("dataset", f"the network takes {expected}, {data.name} has {got}")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command(run, parse_evaluate(argv))


if __name__ == "__main__":
    main()
