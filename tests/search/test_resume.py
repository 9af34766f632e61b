"""A run cut after any step, or between any two actions at the end of an epoch, continues to the same bits.

By default every moment of a search by dssp, and one moment of every other method and of a retraining; the whole product
of tasks, moments and checkpoint intervals is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dssp.callbacks import Checkpointing, MetricsLog
from dssp.engine import Callback, Engine, Task
from dssp.methods import METHODS
from dssp.metrics import RunningMeans
from dssp.runs.run_folder import keep_rows
from tests.search.small import small_data, small_retraining, small_search
from tests.search.test_skipped_steps import Scripted

EPOCHS, STEPS = 3, 2
SEARCH = {"epochs": EPOCHS, "nodes": 1, "channels": 4, "scored_paths": 8}

# Settings of searches; dssp prunes after its second epoch, trains paths in the third and compares them at its end.
SEARCHES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "dssp-nasbench201": {"method": "dssp", "space": "nasbench201", "nodes": 3, "cells": 1},
    "dssp-bfloat16": {"method": "dssp", "precision": "bfloat16"},
    "dssp-without-paths": {"method": "dssp", "path_epochs": 0, "prune_strategy": "relative", "prune_threshold": 1.0},
    "dssp-raw-gates-and-none": {"method": "dssp", "raw_gates": True, "offer_none": True},
    "dssp-paper-budget": {"method": "dssp-paper", "nodes": 2, "prune_strategy": "budget"},
    "darts-unrolled": {"method": "darts", "unrolled": True, "warmup_epochs": 0},
    "darts-early-stop": {"method": "darts", "early_stop": True, "beta_decay": 1.0, "warmup_epochs": 0},
    "snas-beta-decay": {"method": "snas", "beta_decay": 1.0, "warmup_epochs": 0},
}


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


TASKS: dict[str, Callable[[], Task]] = {
    **{name: partial(small_search, **{**SEARCH, **settings}) for name, settings in SEARCHES.items()},
    "retraining": partial(small_retraining, epochs=EPOCHS, batch_size=24),
    "retraining-recipe": partial(
        small_retraining, epochs=EPOCHS, batch_size=24, lr=0.1, drop_path=0.2, ema_decay=0.9, cutout=4,
        label_smoothing=0.1,
    ),
    "drawing": Drawing,
}  # fmt: skip

# Moments: after a step of an epoch and its checkpoint, or at the end of an epoch: before its row is written, between
# row and checkpoint, after both.
CUTS: dict[str, tuple[int, int | str]] = {
    "first step": (0, 1),
    "epoch end": (0, "saved"),
    "mid-epoch": (1, 1),
    "before pruning": (1, STEPS),
    "pruned": (1, "ended"),
    "pruned and logged": (1, "logged"),
    "pruned and saved": (1, "saved"),
    "after pruning": (2, 1),
    "last step": (2, STEPS),
    "end not logged": (2, "ended"),
    "end not saved": (2, "logged"),
    "end": (2, "saved"),
}


class Cut(Exception):
    """What stops a run in these tests."""


class CutAt(Callback):
    """Stops the run at a moment."""

    def __init__(self, epoch: int, moment: int | str) -> None:
        self.epoch, self.moment = epoch, moment

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        if (epoch, step) == (self.epoch, self.moment):
            raise Cut

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        if row["epoch"] == self.epoch and isinstance(self.moment, str):
            raise Cut


def run(task: Task, folder: Path, *, resume: bool, every: int, cut: CutAt | None = None) -> Engine:
    """Callbacks as in the commands; what stands later in the list comes earlier at the end of an epoch."""
    callbacks: list[Callback] = [
        Checkpointing(folder, resume=resume, every=every),
        MetricsLog(folder / "rows.jsonl"),
    ]
    if cut is not None:
        callbacks.insert({"saved": 0, "logged": 1}.get(str(cut.moment), 2), cut)
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


def assert_identical(ours: Any, theirs: Any, where: str = "state") -> None:
    """The same containers, types, bits of tensors and values all the way down; only seconds may differ."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            if not str(key).endswith("seconds"):
                assert_identical(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_identical(*pair, f"{where}/{i}")
    else:
        assert ours == theirs, where


def assert_same(folder: Path, engine: Engine, expected: tuple[Path, Engine]) -> None:
    assert timeless(folder / "rows.jsonl") == timeless(expected[0] / "rows.jsonl")
    ours, theirs = engine.state_dict(), expected[1].state_dict()
    assert (ours["epoch"], ours["step"]) == (EPOCHS, 0)
    assert_identical(ours, theirs)


# The fast ones beside the chain below.
ONCE = {("mid-epoch", 1, name) for name in ("retraining-recipe", *METHODS) if name != "dssp"}
CASES = [
    pytest.param(task, cut, every, id=f"{task}-{cut}-every {every}", marks=marks)
    for task in TASKS
    for cut in CUTS
    for every in (1, 99)
    for marks in [[] if task == "drawing" or (cut, every, task) in ONCE else [pytest.mark.slow]]
]


@pytest.mark.parametrize(("task", "cut", "every"), CASES)
def test_cut_run_continues_to_the_same_bits(
    whole: Callable[[str], tuple[Path, Engine]], tmp_path: Path, task: str, cut: str, every: int
) -> None:
    with pytest.raises(Cut):
        run(TASKS[task](), tmp_path, resume=False, every=every, cut=CutAt(*CUTS[cut]))
    assert_same(tmp_path, run(TASKS[task](), tmp_path, resume=True, every=every), whole(task))


def slow_but(*fast: str) -> Any:
    return pytest.mark.parametrize(
        "task", [pytest.param(task, marks=[] if task in fast else [pytest.mark.slow]) for task in TASKS]
    )


@slow_but("dssp", "drawing")
def test_run_cut_at_every_moment_ends_the_same(
    whole: Callable[[str], tuple[Path, Engine]], tmp_path: Path, task: str
) -> None:
    """Each moment once, one after the other: all of CUTS are among them."""
    for epoch in range(EPOCHS):
        for moment in (*range(1, STEPS + 1), "ended", "logged", "saved"):
            with pytest.raises(Cut):
                run(TASKS[task](), tmp_path, resume=(epoch, moment) != (0, 1), every=1, cut=CutAt(epoch, moment))
    assert_same(tmp_path, run(TASKS[task](), tmp_path, resume=True, every=1), whole(task))


@slow_but("random", "drawing")
def test_resuming_twice_in_a_row_and_after_the_end_changes_nothing(
    whole: Callable[[str], tuple[Path, Engine]], tmp_path: Path, task: str
) -> None:
    for resume, moment in ((False, 1), (True, "ended"), (True, "ended")):
        with pytest.raises(Cut):
            run(TASKS[task](), tmp_path, resume=resume, every=1, cut=CutAt(0, moment))
    for _ in range(3):
        engine = run(TASKS[task](), tmp_path, resume=True, every=1)
        assert_same(tmp_path, engine, whole(task))


def test_search_of_these_tests_prunes_where_it_is_cut(whole: Callable[[str], tuple[Path, Engine]]) -> None:
    rows = timeless(whole("dssp")[0] / "rows.jsonl")
    assert [bool(row["pruned"]) for row in rows] == [False, True, False]
    assert rows[1]["dropped"] and rows[2]["dropped"] and rows[2]["scored_paths"] > 1


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
