"""A step whose loss or gradient is not finite changes nothing, is left out of the means, and too many end the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dssp.engine import Callback, Diverged, Engine
from dssp.metrics import RunningMeans
from dssp.steps.optimization import sgd, weight_step
from dssp.steps.skipped_steps import GuardedStep, SkippedSteps, step_and_take_back_unless, step_if_finite
from tests.search.small import small_retraining, small_search

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def assert_unchanged(now: Any, before: Any) -> None:
    assert len(tensors(now)) == len(tensors(before)) > 0
    for found, expected in zip(tensors(now), tensors(before), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: sgd(weights, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.1, betas=(0.5, 0.999), foreach=True, weight_decay=1e-3),
}


def some_weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    convolution = nn.Parameter(torch.randn(4, 1, 3, 3).to(memory_format=torch.channels_last))
    return [convolution, nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, dtype=torch.float64))]


def set_gradients(weights: list[nn.Parameter], value: float | None) -> None:
    for weight in weights:
        weight.grad = torch.randn_like(weight) if value is None else torch.full_like(weight, value)


# ---- one optimizer step ----------------------------------------------------------------------------------------------


@BAD
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_step_taken_back_on_the_device_leaves_no_trace(optimizer_name: str, bad: float, steps_before: int) -> None:
    disturbed, undisturbed = some_weights(), some_weights()
    optimizers = [OPTIMIZERS[optimizer_name](weights) for weights in (disturbed, undisturbed)]
    for step in range(steps_before + 2):
        if step == steps_before:
            before = copy.deepcopy(disturbed)
            set_gradients(disturbed, bad)
            step_and_take_back_unless(torch.tensor(False), optimizers[0])
            assert_unchanged(disturbed, before)
        set_gradients(disturbed, None)
        for theirs, ours in zip(undisturbed, disturbed, strict=True):
            theirs.grad = ours.grad
        step_and_take_back_unless(torch.tensor(True), optimizers[0])
        optimizers[1].step()
        assert_unchanged(disturbed, undisturbed)
    assert_unchanged(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


@pytest.mark.parametrize(
    ("loss", "norm", "taken"),
    [(1.0, 2.0, True), (math.nan, 2.0, False), (1.0, math.inf, False), (-math.inf, math.nan, False)],
)
def test_step_is_taken_if_loss_and_gradient_are_finite(loss: float, norm: float, taken: bool) -> None:
    weights = some_weights()
    before = copy.deepcopy(weights)
    set_gradients(weights, 1.0)
    good = step_if_finite(OPTIMIZERS["sgd"](weights), torch.tensor(loss), torch.tensor(norm))
    assert bool(good) is taken and torch.equal(weights[0], before[0]) is not taken


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_gradient_that_overflows_under_a_finite_loss_is_skipped(clip: float) -> None:
    class Steep(nn.Linear):
        """Its logits are finite, their derivative is not: d sqrt(x) / dx at 0."""

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + (super().forward(images) * 0).sqrt()

    model = Steep(4, 3)
    optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.weight.abs_(), model.bias.abs_()
        before = copy.deepcopy(model.state_dict())
    values = weight_step(model, optimizer, torch.ones(2, 4), torch.tensor([0, 1]), grad_clip=clip, precision="float32")
    assert all(value.isnan() for value in values.values())
    assert_unchanged(model.state_dict(), before)
    assert not optimizer.state


# ---- whole steps -----------------------------------------------------------------------------------------------------


def without_counters(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@BAD
@pytest.mark.parametrize("epoch", [0, 1], ids=["warm-up", "bilevel"])
def test_search_step_on_a_poisoned_image_changes_nothing(bad: float, epoch: int) -> None:
    search = small_search()
    first, second = list(search.batches(epoch))[:2]
    search.step(first, epoch)
    before = copy.deepcopy(search.state_dict())
    poisoned = tuple(None if half is None else (half[0].clone(), half[1]) for half in second[:2])
    for half in poisoned:
        if half is not None:
            half[0][0, 0, 0, 0] = bad
    values = search.step((*poisoned, second[2]), epoch)  # type: ignore[arg-type]
    assert all(value.isnan() for value in values.values())
    for part, state in search.state_dict().items():
        if part in ("method", "early_stopping", "flops"):
            continue
        kept = without_counters(state) if part == "supernet" else state["state"]
        expected = without_counters(before[part]) if part == "supernet" else before[part]["state"]
        if epoch or part != "architecture_optimizer":
            assert_unchanged(kept, expected)


def test_half_that_is_finite_still_learns() -> None:
    search = small_search()
    train, valid, noise = next(search.batches(1))
    assert valid is not None
    alpha = search.supernet.alpha["normal"].detach().clone()
    weight = search.supernet.classifier.weight.detach().clone()
    values = search.step((train, (valid[0] * math.nan, valid[1]), noise), 1)
    assert values["valid_loss"].isnan() and values["train_loss"].isfinite()
    assert torch.equal(search.supernet.alpha["normal"], alpha)
    assert not torch.equal(search.supernet.classifier.weight, weight)


def test_running_statistics_survive_a_poisoned_batch_of_a_retraining() -> None:
    task = small_retraining(ema_decay=0.9)
    network = task.network
    batches = list(task.batches(0))
    task.step(batches[0], 0)
    before = copy.deepcopy(without_counters(network.state_dict()))
    assert task.step((batches[1][0] * math.inf, batches[1][1]), 0)["train_loss"].isnan()
    assert_unchanged(without_counters(network.state_dict()), before)
    assert all(value.isfinite().all() for value in task.trained.state_dict().values())
    task.step(batches[1], 0)
    assert not torch.equal(network.state_dict()["stem.1.running_mean"], before["stem.1.running_mean"])


def test_running_statistics_of_a_finite_step_stay() -> None:
    norm = nn.BatchNorm2d(2)
    images = torch.randn(4, 2, 3, 3)
    expected = copy.deepcopy(norm)
    expected(images)
    GuardedStep(lambda x: {"loss": norm(x).sum().detach()}, norm)(images)
    assert_unchanged(norm.state_dict(), expected.state_dict())


# ---- the engine's bookkeeping ----------------------------------------------------------------------------------------


class Scripted:
    """A task whose losses are given."""

    name, epochs = "scripted", 2

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def steps(self, epoch: int) -> int:
        return len(self.losses)

    def batches(self, epoch: int, *, first: int = 0) -> Iterator[float]:
        return iter(self.losses[first:])

    def step(self, batch: float, epoch: int) -> dict[str, Tensor]:
        return {"loss": torch.tensor(batch)}

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Rows(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        self.rows.append(row)


def test_skipped_steps_are_counted_per_epoch_and_left_out_of_the_means() -> None:
    kept = Rows()
    Engine(Scripted([1.0, math.nan, 3.0, math.inf]), [kept]).fit()
    assert [(row["skipped_steps"], row["loss"]) for row in kept.rows] == [(2, 2.0), (2, 2.0)]


def test_run_that_skips_nothing_says_so() -> None:
    kept = Rows()
    Engine(Scripted([1.0, 2.0]), [kept]).fit()
    assert [row["skipped_steps"] for row in kept.rows] == [0, 0]


def test_too_many_skipped_steps_in_a_row_end_the_run_with_one_line() -> None:
    losses = [math.nan, 1.0, math.nan, math.nan]  # over the end of the epoch, three in a row
    with pytest.raises(Diverged) as error:
        Engine(Scripted(losses), [], max_skipped_steps=3).fit()
    assert str(error.value).startswith("scripted: loss or gradient not finite in 3 steps in a row, until step 1 of ")
    assert "\n" not in str(error.value)
    Engine(Scripted(losses), [], max_skipped_steps=4).fit()


def test_row_of_skipped_steps_goes_on_after_a_restart() -> None:
    first, second = (Engine(Scripted([math.nan] * 4), [], max_skipped_steps=6) for _ in range(2))
    first.task.epochs = 1
    first.fit()
    second.load_state_dict(first.state_dict())
    with pytest.raises(Diverged, match="6 steps in a row, until step 2 of epoch 2"):
        second.fit()


@pytest.mark.parametrize("flags", ["gggg", "bbgb", "gbbb", "bgbbgg"])
def test_longest_row_is_remembered(flags: str) -> None:
    skipped = SkippedSteps()
    for flag in flags:
        skipped.update(torch.tensor(flag == "g"))
    assert skipped.run() == max(map(len, flags.split("g"))) and skipped.total() == flags.count("b")


def test_mean_of_nothing_finite_is_nan() -> None:
    means = RunningMeans()
    assert not means.update({"loss": torch.tensor(math.nan), "accuracy": torch.tensor(0.5)})
    assert math.isnan(means.compute()["loss"]) and means.compute()["accuracy"] == 0.5


def test_means_restored_halfway_go_on_to_the_bit() -> None:
    torch.manual_seed(0)
    steps = [{"a": value, **({"b": value * 3} if i % 3 else {})} for i, value in zip(count(), torch.rand(20))]
    whole, half = RunningMeans(), RunningMeans()
    for step in steps:
        whole.update(step)
    for step in steps[:7]:
        half.update(step)
    rest = RunningMeans()
    rest.load_state_dict(half.state_dict())
    for step in steps[7:]:
        rest.update(step)
    assert rest.compute() == whole.compute()
