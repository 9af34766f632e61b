"""A captured step without a GPU: the step itself, every time."""

import warnings

import torch
from torch import Tensor

from dssp.capture import CapturedStep


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
