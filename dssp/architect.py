"""The architecture step: alpha and masks learn on validation images (DARTS, first order) under the pruning penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.optimization import logits_of
from dssp.skipped_steps import reported, step_if_finite
from dssp.supernet import Supernet


class Architect:
    """Minimises L_valid(alpha, m) + lambda * sum_e sigmoid(m_e) by Adam, the weights held fixed.

    First-order hypergradient of DARTS (Liu et al. 2019, section 2.3, xi = 0); betas (0.5, 0.999) as there. The sum runs
    over the edges that are left, of all cell types; it is over gates in (0, 1), never over raw logits.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        alpha_lr: float,
        alpha_weight_decay: float,
        mask_lr: float,
        lambda_prune: float,
        precision: str,
    ) -> None:
        self.supernet, self.lambda_prune, self.precision = supernet, lambda_prune, precision
        groups: list[dict[str, Any]] = [
            {"params": list(supernet.alpha.values()), "lr": alpha_lr, "weight_decay": alpha_weight_decay}
        ]
        if supernet.mask:
            groups.append({"params": list(supernet.mask.values()), "lr": mask_lr, "weight_decay": 0.0})
        capturable = supernet.classifier.weight.is_cuda  # its step count on the device, where a CUDA graph can count
        self.optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), foreach=True, capturable=capturable)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One update of alpha and masks; detached scalars valid_loss, valid_accuracy, prune_loss (NaN: skipped)."""
        logits = logits_of(self.supernet, images, self.precision)
        loss = F.cross_entropy(logits, labels)
        prune_loss = self.supernet.gate_sum()
        self.optimizer.zero_grad()
        objective = loss + self.lambda_prune * prune_loss
        objective.backward()
        gradients = [p.grad for p in self.supernet.architecture_parameters() if p.grad is not None]
        taken = step_if_finite(self.optimizer, objective, nn.utils.get_total_norm(gradients, foreach=True))
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return reported(taken, {"valid_loss": loss, "valid_accuracy": accuracy, "prune_loss": prune_loss})
