"""Memory stays flat however many steps a run takes."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dssp.callbacks import Checkpointing
from dssp.engine import Callback, Engine
from dssp.metrics import RunningMeans
from dssp.steps.optimization import sgd, weight_step
from dssp.steps.skipped_steps import GuardedStep
from tests.search.small import small_search
from tests.search.test_skipped_steps import Scripted


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # isinstance() asks the thing


class Census(Callback):
    """Counts tensors every so many steps, and what the process holds."""

    def __init__(self, every: int) -> None:
        self.every, self.steps, self.tensors, self.peaks = every, 0, list[int](), list[int]()

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.tensors.append(live_tensors())
            self.peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class Training(Scripted):
    """A small network, one batch again and again."""

    epochs = 1

    def __init__(self, steps: int) -> None:
        super().__init__([0.0] * steps)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
        optimizer = sgd(network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0)
        images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
        guarded = GuardedStep(
            lambda: weight_step(network, optimizer, images, labels, grad_clip=5.0, precision="float32"), network
        )
        self.step_now: Callable[[], dict[str, torch.Tensor]] = guarded

    def step(self, batch: float, epoch: int) -> dict[str, Any]:
        return self.step_now()


@pytest.mark.parametrize("steps", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_steps_and_checkpoints_leave_nothing_behind(tmp_path: Path, steps: int) -> None:
    census = Census(steps // 10)
    Engine(Training(steps), [Checkpointing(tmp_path, resume=False, every=5), census]).fit()
    assert len(set(census.tensors[1:])) == 1  # the first steps make momentum
    assert census.peaks[-1] <= census.peaks[1] * 1.02 + 2048  # KiB


def test_epochs_of_a_search_leave_nothing_behind() -> None:
    search = small_search(epochs=6, prune_strategy="none")
    counts = []
    engine = Engine(search, [])

    class AtEnd(Callback):
        def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
            counts.append(live_tensors())

    engine.callbacks = [AtEnd()]
    engine.fit()
    assert len(set(counts[2:])) == 1  # after warm-up and the first bilevel epoch, which make momentum
