"""Differentiable Search Space Pruning as the paper has it: a mask per edge, pulled shut by a penalty, edges removed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from dssp.config import SearchConfig
from dssp.methods.base import Method
from dssp.options import ConfigError
from dssp.pruning.edges import Pruner, PruningRules
from dssp.pruning.held_out import Losses
from dssp.supernet import Supernet

SCHEDULED_SHARE = 0.75  # of the epochs after warm-up: the rest trains what is left


class DsspPaper(Method):
    """y = sigmoid(m) * sum_k softmax(alpha)_k o_k(x), loss L_valid + lambda * sum_e sigmoid(m_e).

    Edges leave by ``prune_strategy``. `none` is what a removed edge is, so it is no candidate.
    """

    gated = True
    offers_none = False

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        super().__init__(config, supernet, losses)
        rules = PruningRules(
            strategy=config.prune_strategy,
            threshold=config.prune_threshold,
            min_edges=config.min_edges,
            edge_budget=config.edge_budget,
            warmup_epochs=config.warmup_epochs,
            last_epoch=self.last_pruning_epoch(),
            every=config.prune_every,
        )
        if config.prune_strategy != "none" and config.epochs > config.warmup_epochs and not rules.points():
            raise ConfigError("prune_every", f"no pruning point in {config.epochs} epochs, got {config.prune_every}")
        self.pruner = Pruner(supernet, rules, losses)

    def last_pruning_epoch(self) -> int:
        """After it, no edge leaves any more."""
        learning = self.config.epochs - self.config.warmup_epochs
        return min(self.config.warmup_epochs + math.ceil(SCHEDULED_SHARE * learning), self.config.epochs) - 1

    def penalty(self) -> Tensor:
        return super().penalty() + self.config.lambda_prune * self.supernet.gate_sum()

    def end_epoch(self, epoch: int, step: int) -> dict[str, Any]:
        return {**super().end_epoch(epoch, step), "pruned": self.pruner.end_epoch(epoch, step)}

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.pruner.history

    def state_dict(self) -> dict[str, Any]:
        return {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state["pruner"])
