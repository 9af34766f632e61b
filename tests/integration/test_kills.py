"""A search that is killed again and again ends as one that nobody touched, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dssp import search
from dssp.checkpoint import load_newest
from dssp.runs.run_folder import keep_rows
from tests.search.test_skipped_steps import tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

SHAPE = ["--dataset=fake", "--image-size=8", "--channels=2", "--cells=3", "--nodes=1", "--threads=1"]
RETRAINING = ["--retrain-epochs=1", "--retrain-batch-size=400", "--retrain-channels=2", "--retrain-cells=3"]
FLAGS = [*SHAPE, *RETRAINING, "--batch-size=200", "--epochs=3", "--warmup-epochs=1", "--checkpoint-every=1"]


def work(folder: Path) -> None:
    """The command as a child runs it: forked, so that nobody waits for torch to load."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    resume = ["--resume"] if (folder / "config.json").exists() else []
    search.main([*FLAGS, "--run-dir", str(folder), *resume])


def start(folder: Path) -> ForkProcess:
    child = multiprocessing.get_context("fork").Process(target=work, args=(folder,))
    child.start()
    return child


def finish(folder: Path) -> float:
    """Let the command run to its end; the seconds it took."""
    began = time.perf_counter()
    child = start(folder)
    child.join()
    assert child.exitcode == 0
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, finish(folder)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if not key.endswith("seconds")}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def assert_same(run: Path, expected: Path) -> None:
    for log in ("metrics.jsonl", "retrain.jsonl"):
        assert timeless(keep_rows(run / log, 9)) == timeless(keep_rows(expected / log, 9)) != []
    assert (run / "genotype.json").read_bytes() == (expected / "genotype.json").read_bytes()
    summaries = [timeless(json.loads((folder / "summary.json").read_text())) for folder in (run, expected)]
    assert summaries[0] == summaries[1]
    for task in ("search", "retrain"):
        states = [load_newest(folder / "checkpoints", task) for folder in (run, expected)]
        found, wanted = (tensors(state) for state in states)
        assert len(found) == len(wanted) > 10 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_search_killed_at_random_moments_ends_the_same(whole: tuple[Path, float], tmp_path: Path, kills: int) -> None:
    expected, seconds = whole
    run, moments = tmp_path / "run", random.Random(kills)
    killed = 0
    while killed < kills and not (run / "summary.json").exists():
        child = start(run)
        time.sleep(moments.uniform(0, 3 * seconds / kills))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        killed += child.exitcode == -signal.SIGKILL
    assert killed >= kills / 2  # or it was done sooner than its undisturbed twin
    finish(run)
    assert_same(run, expected)


def work_until(folder: Path, event: str, count: int) -> None:
    """As work(), killed at the count-th action of a kind in the run folder; these are the stages of every write."""
    left = [count]

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event and arguments and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    work(folder)


@pytest.mark.parametrize(
    ("event", "every"),
    [("os.rename", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("open", 11), ("os.remove", 3)])],
)
def test_search_killed_between_the_stages_of_its_writes_ends_the_same(
    whole: tuple[Path, float], tmp_path: Path, event: str, every: int
) -> None:
    run, kills, count = tmp_path / "run", 0, every
    while True:
        child = multiprocessing.get_context("fork").Process(target=work_until, args=(run, event, count))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills, count = kills + 1, count + every  # a start alone takes some: the run must get further in the end
    assert kills >= 3
    assert_same(run, whole[0])
