"""The engine runs a task epoch by epoch, and a run that was cut anywhere continues without a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dssp.callbacks import Checkpointing, MetricsLog, TensorBoard
from dssp.engine import Callback, Engine
from dssp.metrics import RunningMeans


class Decay:
    """A task: x <- x * rate(epoch), three steps per epoch."""

    name = "decay"
    epochs = 4

    def __init__(self) -> None:
        self.x = torch.tensor(1.0)

    def steps(self, epoch: int) -> int:
        return 3

    def batches(self, epoch: int, *, first: int = 0) -> Iterator[float]:
        return iter([0.9 - 0.1 * epoch] * (3 - first))

    def step(self, batch: float, epoch: int) -> dict[str, Tensor]:
        self.x = self.x * batch
        return {"x": self.x}

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return {"last": self.x.item()}

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x = state["x"]


class Recorder(Callback):
    """Writes down what it is told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def fit_start(self, engine: Engine) -> None:
        self.log.append(f"{self.name} starts at {engine.epoch}")

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        self.log.append(f"{self.name} step {epoch}.{step}")

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        self.log.append(f"{self.name} epoch {row['epoch']}")

    def fit_end(self, engine: Engine) -> None:
        self.log.append(f"{self.name} ends")


class PowerCut(Exception):
    """What stops a run in these tests."""


class CutAt(Callback):
    """Stops the run at a step, or at the end of an epoch where ``step`` is None."""

    def __init__(self, epoch: int, step: int | None) -> None:
        self.epoch, self.step = epoch, step

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        if (epoch, step) == (self.epoch, self.step):
            raise PowerCut

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        if self.step is None and row["epoch"] == self.epoch:
            raise PowerCut


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_row_of_an_epoch_holds_means_times_and_what_the_task_adds() -> None:
    rows: list[dict[str, Any]] = []

    class Keep(Callback):
        def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
            rows.append(row)

    Engine(Decay(), [Keep()]).fit()
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["x"] == pytest.approx((0.9 + 0.81 + 0.729) / 3) and rows[0]["last"] == pytest.approx(0.729)
    assert all(row["step_seconds"] > 0 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_callbacks_start_in_order_and_take_ends_in_reverse() -> None:
    log: list[str] = []
    task = Decay()
    task.epochs = 1
    Engine(task, [Recorder("a", log), Recorder("b", log)]).fit()
    steps = [f"{name} step 0.{step}" for step in (1, 2, 3) for name in "ab"]
    assert log == ["a starts at 0", "b starts at 0", *steps, "b epoch 0", "a epoch 0", "b ends", "a ends"]


def test_callbacks_are_closed_when_a_step_raises() -> None:
    log: list[str] = []
    with pytest.raises(PowerCut):
        Engine(Decay(), [Recorder("a", log), CutAt(1, 2)]).fit()
    assert log[-2:] == ["a step 1.2", "a ends"]


@pytest.mark.parametrize("position", [0, 1, 2, 3], ids=["first", "second", "third", "last"])
@pytest.mark.parametrize("cut", [(0, 1), (1, 3), (0, None), (2, None), (3, None)], ids=str)
def test_cut_run_continues_without_a_trace(tmp_path: Path, cut: tuple[int, int | None], position: int) -> None:
    def callbacks(folder: Path, *, resume: bool) -> list[Callback]:
        return [
            Checkpointing(folder / "checkpoints", resume=resume),
            MetricsLog(folder / "metrics.jsonl"),
            TensorBoard(folder / "tensorboard"),
        ]

    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    undisturbed = Decay()
    Engine(undisturbed, callbacks(whole, resume=False)).fit()

    watching = callbacks(part, resume=False)
    watching.insert(position, CutAt(*cut))
    with pytest.raises(PowerCut):
        Engine(Decay(), watching).fit()
    continued = Decay()
    Engine(continued, callbacks(part, resume=True)).fit()
    assert torch.equal(continued.x, undisturbed.x)
    rows = read_rows(part / "metrics.jsonl")
    assert without_times(rows) == without_times(read_rows(whole / "metrics.jsonl"))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_finished_run_continues_with_nothing_to_do(tmp_path: Path) -> None:
    log: list[str] = []
    Engine(Decay(), [Checkpointing(tmp_path, resume=False)]).fit()
    task = Decay()
    engine = Engine(task, [Checkpointing(tmp_path, resume=True), Recorder("a", log)])
    engine.fit()
    assert log == ["a starts at 4", "a ends"] and engine.seconds > 0
    assert task.x == pytest.approx(0.9**3 * 0.8**3 * 0.7**3 * 0.6**3)


def test_line_that_was_being_written_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(PowerCut):
        Engine(Decay(), [CutAt(1, 2), Checkpointing(checkpoints, resume=False), MetricsLog(log)]).fit()
    log.write_text(log.read_text() + '{"epoch": 1, "x": 0.4')
    metrics = MetricsLog(log)
    Engine(Decay(), [Checkpointing(checkpoints, resume=True), metrics]).fit()
    assert [row["epoch"] for row in read_rows(log)] == [0, 1, 2, 3] and metrics.rows == read_rows(log)


def test_events_of_one_task_do_not_hide_those_of_another(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = Decay(), Decay()
    second.name = "other"  # as retraining follows a search in the same run folder
    for task in (first, second):
        Engine(task, [TensorBoard(tmp_path)]).fit()
    for name in ("decay", "other"):
        events = EventAccumulator(str(tmp_path / name)).Reload()
        assert [event.step for event in events.Scalars("x")] == [0, 1, 2, 3]
