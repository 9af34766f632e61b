"""A search on two ranks is that of one process with the whole batch; it stops, continues and fails as one."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dssp import search
from dssp.bilevel import BilevelSearch
from dssp.distributed import RanksApart, rank, ranks
from dssp.runs.interruption import RESUME_ME
from dssp.steps.sync_batch_norm import synchronise_norms
from tests.search.ranks import results_of_ranks, start_ranks
from tests.search.small import small_retraining, small_search

RANKS, BATCH = 2, 24
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


def search_of_share(synchronised: bool = True, **settings: Any) -> BilevelSearch:
    """This rank's share of a search whose global batch is BATCH."""
    task = small_search(batch_size=BATCH // ranks(), grad_clip=0.0, **settings)
    if ranks() > 1 and synchronised:
        synchronise_norms(task.supernet)
    return task


def gradients(task: BilevelSearch, epoch: int) -> dict[str, Tensor | None]:
    """Of alpha, masks and weights, as the first step of an epoch leaves them."""
    task.step(next(task.batches(epoch)), epoch)
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in task.supernet.named_parameters()}


def pruning_search(synchronised: bool = True) -> dict[str, Any]:
    """A whole search: warm-up, removal of edges and candidates, hard paths, the choice among them."""
    task = search_of_share(
        synchronised=synchronised,
        method="dssp",
        nodes=1,  # every norm is a round trip, forward and backward
        epochs=3,
        warmup_epochs=1,
        path_epochs=1,
        edge_budget=0.5,
        prune_strategy="measured",
        scored_paths=4,
    )
    rows = []
    for epoch in range(task.epochs):
        steps = [task.step(batch, epoch) for batch in task.batches(epoch)]
        rows.append({"steps": [{k: float(v) for k, v in step.items()} for step in steps], **task.end_epoch(epoch)})
    alpha = [parameter.detach().clone() for parameter in task.supernet.architecture_parameters()]
    return {"rows": rows, "alpha": alpha, "genotype": task.derived().to_dict(), "history": task.method.history}


def step_with_nan_on_rank_1() -> tuple[bool, dict[str, float]]:
    """Whether parameters and running statistics stayed, and what the step reported."""
    task = small_search(batch_size=12)
    (images, labels), _, noise = next(task.batches(1))
    if rank() == 1:
        images = images.fill_(torch.nan)
    before = {name: value.clone() for name, value in task.supernet.state_dict().items() if "mask" not in name}
    values = task.step(((images, labels), None, noise), epoch=1)
    after = task.supernet.state_dict()
    names = [name for name in before if not name.endswith("num_batches_tracked")]
    return all(torch.equal(before[n], after[n]) for n in names), {k: float(v) for k, v in values.items()}


def end_of_epoch_with_another_alpha() -> str:
    task = small_search(batch_size=12, prune_strategy="none")
    with torch.no_grad():
        task.supernet.alpha["normal"][0, 0] += 1e-6 * rank()
    try:
        task.end_epoch(1)
    except RanksApart as error:
        return str(error)
    return "nothing noticed"


def retrained_weights() -> list[Tensor]:
    task = small_retraining(batch_size=BATCH // ranks(), drop_path=0.5, cutout=4, lr=0.1)
    if ranks() > 1:
        synchronise_norms(task.network)
    for batch in task.batches(1):
        task.step(batch, 1)
    task.end_epoch(1)
    return [parameter.detach().clone() for parameter in task.network.parameters()]


def work() -> dict[str, Any]:
    found: dict[str, Any] = {
        "gradients": gradients(search_of_share(), 1),
        "warm-up gradients": gradients(search_of_share(), 0),
        "second-order gradients": gradients(search_of_share(method="darts", nodes=1, unrolled=True), 1),
        "search": pruning_search(),
        "retraining": retrained_weights(),
    }
    if ranks() > 1:
        found |= {
            "plain": pruning_search(synchronised=False),
            "again": pruning_search(synchronised=False),
            "nan": step_with_nan_on_rank_1(),
            "apart": end_of_epoch_with_another_alpha(),
        }
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return work()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of_ranks(RANKS, work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("step", ["gradients", "warm-up gradients", "second-order gradients"])
def test_gradients_are_those_of_the_whole_batch(
    alone: dict[str, Any], results: list[dict[str, Any]], step: str
) -> None:
    for result in results:
        assert result[step].keys() == alone[step].keys()
        for name, expected in alone[step].items():
            found = result[step][name]
            assert (found is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_same_edges_candidates_and_cell_as_with_the_whole_batch(
    alone: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    expected = alone["search"]
    assert expected["history"] and any(row["dropped"] for row in expected["rows"])
    for result in results:
        found = result["search"]
        assert found["history"] == expected["history"] and found["genotype"] == expected["genotype"]
        for mine, theirs in zip(found["rows"], expected["rows"], strict=True):
            assert (mine["pruned"], mine["dropped"]) == (theirs["pruned"], theirs["dropped"])
            for key in ("valid_loss", "valid_accuracy"):
                assert mine.get(key) == pytest.approx(theirs.get(key), abs=1e-4)
            for step, other in zip(mine["steps"], theirs["steps"], strict=True):
                assert step == pytest.approx(other, abs=1e-3)


def test_retraining_with_dropped_paths_is_that_of_the_whole_batch(
    alone: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    for result in results:
        for found, expected in zip(result["retraining"], alone["retraining"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_ranks_and_runs_of_one_seed_agree_bit_for_bit(results: list[dict[str, Any]]) -> None:
    (first, second), plain = (result["search"] for result in results), results[0]["plain"]
    pairs = [(first, second), *((plain, result[run]) for result in results for run in ("plain", "again"))]
    for one, other in pairs:
        assert all(map(torch.equal, one["alpha"], other["alpha"]))
        assert (one["rows"], one["genotype"]) == (other["rows"], other["genotype"])


def test_step_that_is_not_finite_on_one_rank_is_skipped_by_all(results: list[dict[str, Any]]) -> None:
    for result in results:
        unchanged, values = result["nan"]
        assert unchanged and all(value != value for value in values.values())


def test_architecture_that_differs_is_an_error_on_every_rank(results: list[dict[str, Any]]) -> None:
    expected = "search, end of epoch 2: alpha and masks of rank 1 differ from those of rank 0"
    assert [result["apart"] for result in results] == [expected] * RANKS


# ---- the command -----------------------------------------------------------------------------------------------------

SHAPE = ["--dataset=fake", "--image-size=8", "--channels=2", "--cells=3", "--nodes=1", "--threads=1", "--device=cpu"]
RETRAINING = ["--retrain-epochs=1", "--retrain-channels=2", "--retrain-cells=3", "--path-epochs=0", "--held-out=64"]
FLAGS = [*SHAPE, *RETRAINING, "--epochs=3", "--warmup-epochs=1", "--checkpoint-every=1"]


def batches(of_search: int, of_retraining: int) -> list[str]:
    return [f"--batch-size={of_search}", f"--retrain-batch-size={of_retraining}"]


def command(folder: Path, flags: list[str]) -> None:
    """The command; what it says goes beside its folder."""
    said = folder.with_name(f"{folder.name}.{os.environ.get('RANK', 0)}.txt")
    sys.stdout = sys.stderr = said.open("a")
    os.dup2(sys.stderr.fileno(), 2)
    search.main([*FLAGS, *flags, "--run-dir", str(folder)])


def start(folder: Path, *flags: str, count: int = RANKS) -> list[ForkProcess]:
    return start_ranks(count, command, folder, list(flags))


def exit_codes(processes: list[ForkProcess]) -> list[int | None]:
    for process in processes:
        process.join(90)
    return [process.exitcode for process in processes]


def wait_until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for name in ("metrics", "retrain") for line in (folder / f"{name}.jsonl").open()]
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in lines]


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Path]:
    """The folder of a search on two ranks, of which one was asked to stop in the first epoch."""
    folder = tmp_path / "run"
    processes = start(folder, *batches(100, 200))
    wait_until(lambda: list(folder.glob("checkpoints/search-*.pt")))
    os.kill(processes[1].pid or 0, signal.SIGTERM)
    assert exit_codes(processes) == [RESUME_ME] * RANKS
    yield folder


def test_stopped_search_continues_to_the_same_bits_and_only_rank_0_writes(stopped: Path, tmp_path: Path) -> None:
    assert not (stopped / "metrics.jsonl").exists() or len((stopped / "metrics.jsonl").read_text().splitlines()) < 3
    whole = tmp_path / "whole"
    assert exit_codes(start(whole, *batches(100, 200))) == [0] * RANKS
    assert exit_codes(start(stopped, *batches(100, 200), "--resume")) == [0] * RANKS
    assert rows(stopped) == rows(whole) and len(rows(whole)) == 4
    assert (stopped / "genotype.json").read_bytes() == (whole / "genotype.json").read_bytes()
    assert (tmp_path / "whole.1.txt").read_text() == ""
    assert "test accuracy" in (tmp_path / "whole.0.txt").read_text()
    assert len(list((whole / "tensorboard" / "search").iterdir())) == 1


def test_run_continues_on_other_ranks_with_the_same_global_batch_and_no_other(stopped: Path) -> None:
    assert exit_codes(start(stopped, *batches(100, 200), "--resume", count=1)) == [1]
    said = stopped.with_name("run.0.txt").read_text()
    assert "another global batch_size (then 2 * 100, now 1 * 100); global retrain_batch_size" in said
    assert exit_codes(start(stopped, *batches(200, 400), "--resume", count=1)) == [0]
    assert len(rows(stopped)) == 4


def test_ranks_with_other_flags_are_refused(tmp_path: Path) -> None:
    def seed_of_its_own(folder: Path, flags: list[str]) -> None:
        command(folder, [*flags, f"--seed={os.environ['RANK']}"])

    assert exit_codes(start_ranks(RANKS, seed_of_its_own, tmp_path / "run", batches(100, 200))) == [1] * RANKS
    for r in range(RANKS):
        said = (tmp_path / f"run.{r}.txt").read_text()
        assert f"rank {r}: start: seed of rank 1 differ from those of rank 0" in said
    assert not (tmp_path / "run").exists()


def test_rank_that_dies_ends_the_others_with_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    processes = start(folder, *batches(100, 200))
    wait_until(lambda: list(folder.glob("checkpoints/search-*.pt")))
    os.kill(processes[1].pid or 0, signal.SIGKILL)
    assert exit_codes(processes) == [1, -signal.SIGKILL]
    assert "rank 0: lost contact with the other ranks" in (tmp_path / "run.0.txt").read_text()
