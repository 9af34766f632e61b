"""The architecture step: alpha and masks learn on validation images under the method's penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.distributed import average_gradients
from dssp.methods.base import Method, Noise
from dssp.steps.hypergradient import unrolled_gradients
from dssp.steps.optimization import logits_of
from dssp.steps.skipped_steps import reported, step_if_finite, unmoved_statistics
from dssp.supernet import Supernet


class Architect:
    """Minimises L_valid(alpha, m) + method.penalty() by Adam, the weights held fixed.

    First-order hypergradient of DARTS (Liu et al. 2019, section 2.3, xi = 0); betas (0.5, 0.999) as there. With the
    `weight_optimizer`, second-order: L_valid is that of the weights after their next step, differentiated exactly or by
    DARTS' finite difference (see dssp.steps.hypergradient).
    """

    def __init__(
        self,
        supernet: Supernet,
        method: Method,
        *,
        alpha_lr: float,
        alpha_weight_decay: float,
        mask_lr: float,
        precision: str,
        weight_optimizer: torch.optim.SGD | None = None,
        exact: bool = True,
    ) -> None:
        self.supernet, self.method, self.precision = supernet, method, precision
        self.weight_optimizer, self.exact = weight_optimizer, exact
        groups: list[dict[str, Any]] = [
            {
                "params": [*supernet.alpha.values(), *supernet.beta.values()],
                "lr": alpha_lr,
                "weight_decay": alpha_weight_decay,
            }
        ]
        if supernet.mask:
            groups.append({"params": list(supernet.mask.values()), "lr": mask_lr, "weight_decay": 0.0})
        capturable = supernet.classifier.weight.is_cuda  # its step count on the device, where a CUDA graph can count
        self.optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), foreach=True, capturable=capturable)

    def step(
        self, images: Tensor, labels: Tensor, noise: Noise, train: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One update of alpha and masks; detached scalars valid_loss, valid_accuracy, prune_loss (NaN: skipped).

        `train` is the batch of the weights' next step: what the second order looks through, the first ignores. There,
        the figures are those after that step, and BatchNorm's running statistics stay as they are.
        """
        self.optimizer.zero_grad()
        if self.weight_optimizer is None or train is None:
            objective, values = self._objective(images, labels, noise)
            objective.backward()
        else:
            objective, values = self._backward_unrolled((images, labels), train, noise, self.weight_optimizer)
        return reported(self.update(objective), values)

    def _objective(self, images: Tensor, labels: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """L_valid + penalty, and what is reported of it."""
        logits = self._logits(images, noise)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        values = {"valid_loss": loss, "valid_accuracy": accuracy, "prune_loss": self.supernet.gate_sum()}
        return loss + self.method.penalty(), values

    def _backward_unrolled(
        self, valid: tuple[Tensor, Tensor], train: tuple[Tensor, Tensor], noise: Noise, optimizer: torch.optim.SGD
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found: list[tuple[Tensor, dict[str, Tensor]]] = []

        def objective() -> Tensor:
            found.append(self._objective(*valid, noise))
            return found[0][0]

        def train_loss() -> Tensor:
            return F.cross_entropy(self._logits(train[0], noise), train[1])

        architecture = self.supernet.architecture_parameters()
        with unmoved_statistics(self.supernet):
            gradients = unrolled_gradients(train_loss, objective, optimizer, architecture, exact=self.exact)
        for parameter, gradient in zip(architecture, gradients, strict=True):
            parameter.grad = gradient
        return found[0]

    def _logits(self, images: Tensor, noise: Noise) -> Tensor:
        return logits_of(lambda images: self.method.logits(images, noise), images, self.precision)

    def update(self, objective: Tensor) -> Tensor:
        """A step along the gradients, of several ranks their mean, unless they or the objective are not finite.

        Returns whether it was taken (bool scalar).
        """
        parameters = self.supernet.architecture_parameters()
        objective = average_gradients(parameters, objective)
        gradients = [p.grad for p in parameters if p.grad is not None]
        return step_if_finite(self.optimizer, objective, nn.utils.get_total_norm(gradients, foreach=True))
