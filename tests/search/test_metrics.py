"""Running means are means, whatever each step reports."""

from __future__ import annotations

import pytest
import torch

from dssp.metrics import RunningMeans


def test_means_over_steps() -> None:
    means = RunningMeans()
    for value in (1.0, 2.0, 6.0):
        means.update({"loss": torch.tensor(value), "accuracy": torch.tensor(value / 10)})
    assert means.compute() == pytest.approx({"loss": 3.0, "accuracy": 0.3})


def test_scalar_that_some_steps_lack_is_averaged_over_the_others() -> None:
    means = RunningMeans()
    means.update({"train": torch.tensor(1.0)})
    means.update({"train": torch.tensor(3.0), "valid": torch.tensor(5.0)})
    assert means.compute() == {"train": 2.0, "valid": 5.0}


def test_looking_does_not_change_the_means() -> None:
    means = RunningMeans()
    means.update({"loss": torch.tensor(1.0)})
    assert means.compute() == means.compute()
    means.update({"loss": torch.tensor(2.0)})
    assert means.compute() == {"loss": 1.5}


def test_the_tensors_given_are_left_alone() -> None:
    means, loss = RunningMeans(), torch.tensor(1.0)
    for _ in range(3):
        means.update({"loss": loss})
    assert loss == 1.0


def test_nothing_reported_is_nothing() -> None:
    assert RunningMeans().compute() == {}
