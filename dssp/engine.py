"""The training loop, for searches and retrainings alike: a task says what a step is, callbacks watch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from dssp.metrics import RunningMeans


class Task(Protocol):
    """What the engine trains. Everything that must survive a restart is in state_dict()."""

    name: str
    epochs: int

    def steps(self) -> int:
        """Steps per epoch."""

    def batches(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch: a function of the epoch alone."""

    def step(self, batch: Any, epoch: int) -> dict[str, Tensor]:
        """One optimisation step; detached scalars to be averaged over the epoch."""

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """What happens between epochs; entries for the epoch's row of metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict()."""


class Callback:
    """Watches a run; the default does nothing. Callbacks start in order and take the end of an epoch in reverse."""

    def fit_start(self, engine: Engine) -> None:
        """Before the first epoch that will run."""

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        """After each step."""

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        """After each epoch, with its row of metrics."""

    def fit_end(self, engine: Engine) -> None:
        """After the last epoch, also when a step raised."""


class Engine:
    """Runs a task epoch by epoch. ``epoch`` is the next one to run, ``seconds`` the time spent so far."""

    def __init__(self, task: Task, callbacks: Sequence[Callback]) -> None:
        self.task, self.callbacks = task, callbacks
        self.epoch = 0
        self.seconds = 0.0

    def fit(self) -> None:
        """Train until the task's last epoch."""
        for callback in self.callbacks:
            callback.fit_start(self)
        try:
            while self.epoch < self.task.epochs:
                row = self._run_epoch(self.epoch)
                self.epoch += 1
                for callback in reversed(self.callbacks):  # what restores the run comes first: it also saves last
                    callback.epoch_end(self, row)
        finally:
            for callback in self.callbacks:
                callback.fit_end(self)

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        means = RunningMeans()
        began = time.perf_counter()
        steps = 0
        for steps, batch in enumerate(self.task.batches(epoch), start=1):
            means.update(self.task.step(batch, epoch))
            for callback in self.callbacks:
                callback.step_end(self, epoch, steps, means)
        values = means.compute()  # waits for the device, so the clock is read after the work is done
        step_seconds = (time.perf_counter() - began) / max(steps, 1)
        row = {"epoch": epoch, **values, "step_seconds": step_seconds, **self.task.end_epoch(epoch)}
        self.seconds += time.perf_counter() - began
        return {**row, "seconds": self.seconds}

    def state_dict(self) -> dict[str, Any]:
        """Position, time and the task's state."""
        return {"epoch": self.epoch, "seconds": self.seconds, "task": self.task.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict()."""
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.task.load_state_dict(state["task"])
