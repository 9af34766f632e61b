"""Training a derived network from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dssp.data import Split
from dssp.optimization import cosine, set_learning_rate, sgd, weight_step
from dssp.skipped_steps import GuardedStep


class Retraining:
    """SGD with momentum and a cosine down to 0 over all training images. A task of engine.Engine."""

    name = "retrain"

    def __init__(
        self,
        network: nn.Module,
        train: Split,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        grad_clip: float,
        precision: str,
        seed: int,
    ) -> None:
        self.network, self.train, self.precision = network, train, precision
        self.epochs, self.batch_size, self.lr, self.grad_clip, self.seed = epochs, batch_size, lr, grad_clip, seed
        self.optimizer = sgd(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._guarded = GuardedStep(self._weight_step, network)

    def steps(self) -> int:
        """Steps per epoch."""
        return max(1, len(self.train) // self.batch_size)

    def batches(self, epoch: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images in the epoch's order, from step ``first`` on."""
        set_learning_rate(self.optimizer, cosine(epoch, self.epochs, start=self.lr, end=0.0))
        return self.train.batches(self.batch_size, epoch=epoch, seed=self.seed, train=True, first=first)

    def step(self, batch: tuple[Tensor, Tensor], epoch: int) -> dict[str, Tensor]:
        """One weight step."""
        return self._guarded(*batch)

    def _weight_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return weight_step(
            self.network, self.optimizer, images, labels, grad_clip=self.grad_clip, precision=self.precision
        )

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """The learning rate the epoch had."""
        return {"learning_rate": self.optimizer.param_groups[0]["lr"]}

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
