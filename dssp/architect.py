"""The architecture step: alpha and masks learn on validation images (DARTS, first order) under the method's penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.distributed import average_gradients
from dssp.methods.base import Method, Noise
from dssp.optimization import logits_of
from dssp.skipped_steps import reported, step_if_finite
from dssp.supernet import Supernet


class Architect:
    """Minimises L_valid(alpha, m) + method.penalty() by Adam, the weights held fixed.

    First-order hypergradient of DARTS (Liu et al. 2019, section 2.3, xi = 0); betas (0.5, 0.999) as there.
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
    ) -> None:
        self.supernet, self.method, self.precision = supernet, method, precision
        groups: list[dict[str, Any]] = [
            {"params": list(supernet.alpha.values()), "lr": alpha_lr, "weight_decay": alpha_weight_decay}
        ]
        if supernet.mask:
            groups.append({"params": list(supernet.mask.values()), "lr": mask_lr, "weight_decay": 0.0})
        capturable = supernet.classifier.weight.is_cuda  # its step count on the device, where a CUDA graph can count
        self.optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), foreach=True, capturable=capturable)

    def step(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        """One update of alpha and masks; detached scalars valid_loss, valid_accuracy, prune_loss (NaN: skipped)."""
        logits = logits_of(lambda images: self.supernet(images, self.method.mixtures(noise)), images, self.precision)
        loss, prune_loss = F.cross_entropy(logits, labels), self.supernet.gate_sum()
        objective = loss + self.method.penalty()
        self.optimizer.zero_grad()
        objective.backward()
        taken = self.update(objective)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return reported(taken, {"valid_loss": loss, "valid_accuracy": accuracy, "prune_loss": prune_loss})

    def update(self, objective: Tensor) -> Tensor:
        """A step along the gradients, of several ranks their mean, unless they or the objective are not finite.

        Returns whether it was taken (bool scalar).
        """
        parameters = self.supernet.architecture_parameters()
        objective = average_gradients(parameters, objective)
        gradients = [p.grad for p in parameters if p.grad is not None]
        return step_if_finite(self.optimizer, objective, nn.utils.get_total_norm(gradients, foreach=True))
