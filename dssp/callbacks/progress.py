"""The progress bar: epoch, losses, accuracy, active edges, tabulated accuracies, time per step, time left."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dssp.engine import Callback, Engine
from dssp.metrics import RunningMeans

REFRESH_SECONDS = 0.5  # looking at the means waits for the device: not at every step


class ProgressBar(Callback):
    """One bar over all steps; where the output is no terminal, one line per epoch instead."""

    def __init__(self, console: Console, active_edges: int | None = None) -> None:
        self.console, self.active_edges = console, active_edges
        self.tabulated: dict[str, float] = {}  # as of the last epoch, like the edges

    def fit_start(self, engine: Engine) -> None:
        task = engine.task
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar: TaskID = self.progress.add_task(
            task.name,
            total=sum(map(task.steps, range(task.epochs))),
            completed=sum(map(task.steps, range(engine.epoch))) + engine.step,
            status="",
        )
        self.looked, self.steps_since = time.perf_counter(), 0
        self.progress.start()

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        self.steps_since += 1
        self.progress.advance(self.bar)
        waited = time.perf_counter() - self.looked
        if waited < REFRESH_SECONDS or self.progress.disable:
            return
        status = self._status({**means.compute(), "step_seconds": waited / self.steps_since})
        self.progress.update(
            self.bar, description=f"{engine.task.name} epoch {epoch + 1}/{engine.task.epochs}", status=status
        )
        self.looked, self.steps_since = time.perf_counter(), 0

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        if "active_edges" in row:
            self.active_edges = row["active_edges"] - len(row["pruned"])
        self.tabulated = row.get("tabulated", {})
        if self.progress.disable:
            head = f"{engine.task.name} epoch {engine.epoch}/{engine.task.epochs}"
            self.console.print(f"{head}  {self._status(row)}", highlight=False, soft_wrap=True)

    def fit_end(self, engine: Engine) -> None:
        self.progress.stop()

    def _status(self, values: dict[str, float]) -> str:
        parts = []
        if "train_loss" in values:
            parts.append(f"train loss {values['train_loss']:.3f} acc {values['train_accuracy']:.1%}")
        if "valid_loss" in values:
            parts.append(f"valid loss {values['valid_loss']:.3f} acc {values['valid_accuracy']:.1%}")
        if self.active_edges is not None:
            parts.append(f"edges {self.active_edges}")
        parts += [f"{column} {accuracy:.2f}" for column, accuracy in self.tabulated.items()]
        return "  ".join([*parts, f"{1e3 * values['step_seconds']:.0f} ms/step"])
