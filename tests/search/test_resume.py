"""A run cut after any step, or between any two actions at the end of an epoch, continues to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dssp.callbacks import Checkpointing, MetricsLog
from dssp.engine import Callback, Engine, Task
from dssp.metrics import RunningMeans
from dssp.run_folder import keep_rows
from tests.search.small import small_data, small_retraining, small_search
from tests.search.test_skipped_steps import Scripted, tensors

EPOCHS, STEPS = 3, 2


class Cut(Exception):
    """What stops a run in these tests."""


class CutAfter(Callback):
    """Stops the run after a step of an epoch, counted from 1; step 0 is the end of the epoch."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = epoch, step

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        if (epoch, step) == self.at:
            raise Cut

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        if (row["epoch"], 0) == self.at:
            raise Cut


def search() -> Task:
    """Prunes after epochs 1 and 2, both in CUTS."""
    return small_search(epochs=EPOCHS, prune_strategy="budget")


def retraining() -> Task:
    """With everything that a step may depend on."""
    return small_retraining(epochs=EPOCHS, batch_size=24, lr=0.1, drop_path=0.2, ema_decay=0.9, cutout=4)


class Drawing(Scripted):
    """Every step draws from torch's default generator, as sampled relaxations do."""

    epochs = EPOCHS

    def __init__(self) -> None:
        super().__init__([0.0] * STEPS)
        self.x = torch.zeros(3)

    def step(self, batch: float, epoch: int) -> dict[str, Tensor]:
        self.x = self.x + torch.randn(3)
        return {"x": self.x.sum(), "draw": torch.rand(())}

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return {"pruned": [], "at_end": float(torch.rand(()))}

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x = state["x"]


TASKS: dict[str, Callable[[], Task]] = {"search": search, "retraining": retraining, "drawing": Drawing}


def run(task: Task, folder: Path, *, resume: bool, every: int, cut: CutAfter | None = None) -> Engine:
    """Callbacks as in the commands; the cut comes after the step's checkpoint, if there is one."""
    callbacks = [
        Checkpointing(folder, resume=resume, every=every),
        MetricsLog(folder / "rows.jsonl"),
        *([] if cut is None else [cut]),
    ]
    torch.manual_seed(1)  # as the commands do, whether they continue or not
    engine = Engine(task, callbacks)
    engine.fit()
    return engine


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Engine]]:
    """The undisturbed run of a task: its folder and its engine at the end."""

    @cache
    def run_whole(name: str) -> tuple[Path, Engine]:
        folder = tmp_path_factory.mktemp(name)
        return folder, run(TASKS[name](), folder, resume=False, every=1)

    return run_whole


def timeless(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.endswith("seconds")} for row in keep_rows(path, EPOCHS)
    ]


def assert_same(folder: Path, engine: Engine, expected: tuple[Path, Engine]) -> None:
    assert timeless(folder / "rows.jsonl") == timeless(expected[0] / "rows.jsonl")
    ours, theirs = engine.state_dict(), expected[1].state_dict()
    assert (ours["epoch"], ours["step"]) == (EPOCHS, 0)
    assert ours["task"].get("pruner") == theirs["task"].get("pruner")
    found, wanted = tensors(ours), tensors(theirs)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


# First step, middle, the last of an epoch (before its end prunes), the end (after), the step behind it, the last ones.
CUTS = [(0, 1), (1, 1), (1, STEPS), (1, 0), (2, 1), (2, STEPS), (2, 0)]
CASES = [
    pytest.param(
        task,
        cut,
        every,
        id=f"{task}-{cut[0]}.{cut[1] or 'end'}-every {every}",
        marks=[pytest.mark.slow] if task != "drawing" and (every > 1 or (task, cut) == ("search", (2, 0))) else [],
    )
    for task in TASKS
    for cut in CUTS
    for every in (1, 99)
]


@pytest.mark.parametrize(("task", "cut", "every"), CASES)
def test_cut_run_continues_to_the_same_bits(
    whole: Callable[[str], tuple[Path, Engine]], tmp_path: Path, task: str, cut: tuple[int, int], every: int
) -> None:
    with pytest.raises(Cut):
        run(TASKS[task](), tmp_path, resume=False, every=every, cut=CutAfter(*cut))
    assert_same(tmp_path, run(TASKS[task](), tmp_path, resume=True, every=every), whole(task))


@pytest.mark.parametrize("task", [pytest.param("search", marks=pytest.mark.slow), "retraining", "drawing"])
def test_run_cut_after_every_single_step_ends_the_same(
    whole: Callable[[str], tuple[Path, Engine]], tmp_path: Path, task: str
) -> None:
    for epoch in range(EPOCHS):
        for step in (*range(1, STEPS + 1), 0):
            with pytest.raises(Cut):
                run(TASKS[task](), tmp_path, resume=(epoch, step) != (0, 1), every=1, cut=CutAfter(epoch, step))
    assert_same(tmp_path, run(TASKS[task](), tmp_path, resume=True, every=1), whole(task))


def test_search_of_these_tests_prunes_where_it_is_cut(whole: Callable[[str], tuple[Path, Engine]]) -> None:
    rows = timeless(whole("search")[0] / "rows.jsonl")
    assert [bool(row["pruned"]) for row in rows] == [False, True, True]


def test_batches_that_were_used_are_not_fetched_again() -> None:
    split, fetched = small_data().train, []

    class Watching:
        def fetch(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
            for chosen in order.split(batch_size):
                fetched.append(chosen)
                yield from split.store.fetch(chosen, batch_size)

    plan = {"batch_size": 16, "epoch": 1, "seed": 0, "train": True}
    all_of_them = list(split.batches(**plan))  # type: ignore[arg-type]
    rest = list(replace(split, store=Watching()).batches(**plan, first=2))  # type: ignore[arg-type]
    assert len(all_of_them) == 3 and len(rest) == len(fetched) == 1
    assert torch.equal(rest[0][0], all_of_them[2][0]) and torch.equal(rest[0][1], all_of_them[2][1])
    assert list(split.batches(**plan, first=3)) == []  # type: ignore[arg-type]
