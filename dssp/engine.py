"""The training loop, for searches and retrainings alike: a task says what a step is, callbacks watch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor

from dssp.metrics import RunningMeans
from dssp.runs.random_state import random_state, set_random_state
from dssp.steps.skipped_steps import SkippedSteps

MAX_SKIPPED_STEPS = 20


class Interrupted(BaseException):
    """The run was asked to stop. All that it did is saved, or was not worth saving; it says what asked."""


class Diverged(Exception):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Task(Protocol):
    """What the engine trains. Everything that must survive a restart is in state_dict()."""

    name: str
    epochs: int

    def steps(self, epoch: int) -> int:
        """How many an epoch has."""

    def batches(self, epoch: int, *, first: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from step ``first`` on: a function of the two alone."""

    def step(self, batch: Any, epoch: int) -> dict[str, Tensor]:
        """One optimisation step; detached scalars to be averaged over the epoch, NaN where it had to be skipped."""

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """What happens between epochs; entries for the epoch's row of metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict()."""


class Callback:
    """Watches a run; the default does nothing. Callbacks start in order, and take ends of epochs and run in reverse."""

    def fit_start(self, engine: Engine) -> None:
        """Before the first epoch that will run."""

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        """After each step."""

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        """After each epoch, with its row of metrics."""

    def fit_end(self, engine: Engine) -> None:
        """After the last epoch, also when a step raised."""


class Engine:
    """Runs a task step by step, from wherever a state_dict() left off, with the same result to the bit.

    epoch, step         the next epoch to run, and how many of its steps are done
    seconds             time spent so far, in all processes that worked on the run
    means               running means of the metrics of the epoch under way
    stop_reason         set by a callback: the run ends after this step and its callbacks, by Interrupted

    ``max_skipped_steps`` steps in a row that change nothing because they are not finite end it by Diverged.
    """

    def __init__(
        self, task: Task, callbacks: Sequence[Callback], *, max_skipped_steps: int = MAX_SKIPPED_STEPS
    ) -> None:
        self.task, self.callbacks, self.max_skipped_steps = task, callbacks, max_skipped_steps
        self.epoch = self.step = 0
        self.seconds = self._epoch_seconds = 0.0
        self.means, self._skipped = RunningMeans(), SkippedSteps()
        self.stop_reason: str | None = None
        self._clock = 0.0

    def fit(self) -> None:
        """Train until the task's last epoch. Raises Interrupted, Diverged, and what steps and callbacks raise."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                callback.fit_start(self)
                stack.callback(callback.fit_end, self)
            while self.epoch < self.task.epochs:
                self._run_steps()
                row = self._end_epoch()
                for callback in reversed(self.callbacks):  # what restores the run comes first: it also saves last
                    callback.epoch_end(self, row)
                self._stop_if_asked()
        self._stop_if_asked()

    def _run_steps(self) -> None:
        """What is left of the epoch."""
        self._read_clock()
        for batch in self.task.batches(self.epoch, first=self.step):
            self._skipped.update(self.means.update(self.task.step(batch, self.epoch)))
            self.step += 1
            self._spend()
            for callback in self.callbacks:
                callback.step_end(self, self.epoch, self.step, self.means)
            self._stop_if_asked()
            if (skipped := self._skipped.run()) >= self.max_skipped_steps:
                raise Diverged(
                    f"{self.task.name}: loss or gradient not finite in {skipped} steps in a row, until step {self.step}"
                    f" of epoch {self.epoch + 1}; weights are those of the last finite step"
                )

    def _end_epoch(self) -> dict[str, Any]:
        values = self.means.compute()  # waits for the device, so the clock is read after the work is done
        skipped = self._skipped.total()
        self._spend()
        times = {"step_seconds": self._epoch_seconds / max(self.step, 1)}
        row = {"epoch": self.epoch, **values, "skipped_steps": skipped, **times, **self.task.end_epoch(self.epoch)}
        self._spend()
        self.epoch, self.step, self._epoch_seconds = self.epoch + 1, 0, 0.0
        self.means = RunningMeans()
        self._skipped.start_epoch()
        return {**row, "seconds": self.seconds}

    def _stop_if_asked(self) -> None:
        if self.stop_reason is not None:
            raise Interrupted(self.stop_reason)

    def _read_clock(self) -> float:
        """Seconds since the last call."""
        before, self._clock = self._clock, time.perf_counter()
        return self._clock - before

    def _spend(self) -> None:
        seconds = self._read_clock()
        self.seconds += seconds
        self._epoch_seconds += seconds

    def state_dict(self) -> dict[str, Any]:
        """All that later steps and the row of the epoch under way depend on."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "epoch_seconds": self._epoch_seconds,
            "means": self.means.state_dict(),
            "skipped": self._skipped.state_dict(),
            "random": random_state(),
            "task": self.task.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict()."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self._epoch_seconds = state["seconds"], state["epoch_seconds"]
        self.means.load_state_dict(state["means"])
        self._skipped.load_state_dict(state["skipped"])
        self.task.load_state_dict(state["task"])
        set_random_state(state["random"])
