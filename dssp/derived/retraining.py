"""Training a derived network from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dssp.config import RetrainConfig
from dssp.data import Split, keyed_generator
from dssp.derived.averaging import MovingAverage
from dssp.distributed import check_same, checksum, ranks, share
from dssp.network import DerivedNetwork
from dssp.steps.optimization import accuracy, autocast, cosine, descend, set_learning_rate, sgd
from dssp.steps.skipped_steps import GuardedStep, reported


class Retraining:
    """SGD with momentum and a cosine down to 0 over all training images. A task of engine.Engine.

    As far as the configuration asks for them, the parts of DARTS' recipe (arXiv:1806.09055, appendix A.1.2): cutout, an
    auxiliary head's loss with a weight, operations dropped with a probability that rises linearly over the epochs. And
    smoothed labels, and a moving average of the weights.
    """

    name = "retrain"

    def __init__(self, network: DerivedNetwork, train: Split, config: RetrainConfig) -> None:
        self.network, self.config, self.epochs = network, config, config.epochs
        self.train = replace(train, cutout=config.cutout)
        self.optimizer = sgd(
            network.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self._guarded = GuardedStep(self._weight_step, network)
        self.average = MovingAverage(network, config.ema_decay) if config.ema_decay > 0 else None

    @property
    def trained(self) -> DerivedNetwork:
        """The network to be used: that of the averaged weights, if there is one."""
        return self.network if self.average is None else self.average.network

    def steps(self, epoch: int) -> int:
        """In every epoch: all training images are passed through once, by all ranks together."""
        return max(1, len(self.train) // (self.config.batch_size * ranks()))

    def batches(self, epoch: int, *, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images in the epoch's order, from step ``first`` on."""
        config = self.config
        set_learning_rate(self.optimizer, cosine(epoch, self.epochs, start=config.lr, end=0.0))
        self.network.drop_path.share = share()
        self.network.drop_path.probability = config.drop_path * epoch / self.epochs
        return self._batches(epoch, first)

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed, device = self.config.seed, self.train.labels.device
        order: dict[str, Any] = {"epoch": epoch, "seed": seed, "train": True, "first": first, "share": share()}
        batches = self.train.batches(self.config.batch_size, **order)
        for step, batch in enumerate(batches, start=first):
            self.network.drop_path.generator = keyed_generator(seed, epoch, step, "drop path", device=device)
            yield batch

    def step(self, batch: tuple[Tensor, Tensor], epoch: int) -> dict[str, Tensor]:
        """One weight step; `train_loss` is all that is minimised, the auxiliary head's share included."""
        scalars = self._guarded(*batch)
        if self.average is not None:
            self.average.update()
        return scalars

    def _weight_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, self.config.precision):
            outputs = self.network(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._loss(logits, labels)
        for head in auxiliary:
            loss = loss + self.config.auxiliary_weight * self._loss(head, labels)
        taken = descend(self.optimizer, loss, grad_clip=self.config.grad_clip)
        return reported(taken, {"train_loss": loss, "train_accuracy": accuracy(logits.detach(), labels)})

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """The learning rate the epoch had. Raises RanksApart if a rank has other weights."""
        self.check_same(f"retraining, end of epoch {epoch + 1}")
        return {"learning_rate": self.optimizer.param_groups[0]["lr"]}

    def check_same(self, when: str) -> None:
        """Raises RanksApart if a rank has other weights. Running statistics are each rank's own; rank 0's are saved."""
        if ranks() > 1:
            check_same({"weights": checksum(self.network.parameters())}, when)

    def state_dict(self) -> dict[str, Any]:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state if self.average is None else {**state, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
