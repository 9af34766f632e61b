"""The moving average of a network's weights over its training."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class MovingAverage(Generic[Network]):
    """A copy of a network that follows it: after step t = 1, 2, ..., for each parameter and each buffer

        a <- d a + (1 - d) w          d = min(decay, (1 + t) / (10 + t))

    and a <- w where w counts something. The slow start is that of TensorFlow's ExponentialMovingAverage: with the fixed
    decay of torch.optim.swa_utils.AveragedModel, the first step's weights would last for 1 / (1 - decay) steps.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.network, self.decay, self.steps = copy.deepcopy(network).requires_grad_(False), decay, 0
        tensors = ([*module.parameters(), *module.buffers()] for module in (self.network, network))
        pairs = list(zip(*tensors, strict=True))
        self._real = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the network after a step of its optimizer."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages, weights = zip(*self._real, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, count in self._counts:
            average.copy_(count)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.steps = state["steps"]
