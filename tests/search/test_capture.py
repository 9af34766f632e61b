"""A captured step without a GPU: the step itself, every time; and what is said of steps that no graph replays."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dssp.search import uncaptured_steps
from dssp.steps.capture import CapturedStep
from tests.search.small import small_search


def test_on_a_cpu_every_call_is_a_step_and_nobody_is_warned() -> None:
    weight = torch.zeros(())

    def step(batch: Tensor) -> dict[str, Tensor]:
        weight.add_(batch.sum())
        return {"loss": weight.clone()}

    captured = CapturedStep(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [captured(torch.full((2,), float(i)))["loss"].item() for i in range(5)]
    assert losses == [0.0, 2.0, 6.0, 12.0, 20.0] and not captured.is_recorded


@pytest.mark.parametrize(
    ("settings", "device", "said"),
    [
        ({"method": "gdas"}, "cuda", "the steps of method gdas"),
        ({"method": "random"}, "cuda:1", "the steps of method random"),
        ({"method": "dssp", "path_epochs": 1}, "cuda", "the steps on hard paths"),
        ({"method": "dssp", "path_epochs": 0}, "cuda", None),
        ({"method": "darts"}, "cuda", None),
        ({"method": "gdas"}, "cpu", None),
        ({"method": "gdas", "no_cuda_graphs": True}, "cuda", None),
    ],
)
def test_steps_that_choose_on_the_host_are_named(settings: dict[str, Any], device: str, said: str | None) -> None:
    assert uncaptured_steps(small_search(nodes=1, **settings), torch.device(device)) == said
