"""What one search method may do differently from another; the default is DARTS, first order."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dssp.config import SearchConfig
from dssp.derivation import derive
from dssp.genotype import AnyGenotype
from dssp.held_out import Losses
from dssp.optimization import cosine
from dssp.relaxation import Mixture
from dssp.supernet import Supernet

Phase = Literal["warm-up", "search", "paths"]
"""warm-up: weights only. search: architecture and weights. paths: weights only, one hard path per step."""

Noise = dict[str, Tensor]
"""What a step draws at random, on the CPU: a pure function of seed, epoch and step."""


class Method:
    """A search method: how candidates are mixed, what is added to the loss, what leaves when, what is derived.

    The default is first-order DARTS (Liu et al. 2019, arXiv:1806.09055): softmax(alpha), nothing leaves, the largest
    alpha is derived. Methods override what they do differently.

    gated        the supernet has a mask per edge.
    offers_none  `none` is one of the candidates.
    joint        alpha and weights learn together from the training batch, without a validation batch.
    on_host      a step decides on the host what runs, so it cannot be recorded in a CUDA graph.
    """

    gated: ClassVar[bool] = False
    offers_none: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    on_host: ClassVar[bool] = False

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        """`losses` gives the held-out losses of the supernet as this method mixes it."""
        self.config, self.supernet, self.losses = config, supernet, losses

    # ---- a step ------------------------------------------------------------------------------------------------------

    def noise(self, generator: torch.Generator, epoch: int) -> Noise:
        """What the next step needs of chance."""
        return {}

    def mixtures(self, noise: Noise) -> dict[str, Mixture]:
        """How the cells of each type mix their candidates in this step."""
        return {type: self.mixture(type) for type in self.supernet.cell_types}

    def mixture(self, cell_type: str) -> Mixture:
        """The mixture without noise: what held-out images are judged by."""
        return self.supernet.mixture(cell_type)

    def penalty(self) -> Tensor:
        """What is added to the loss of alpha and masks: a scalar."""
        return self.supernet.classifier.weight.new_zeros(())

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def phase(self, epoch: int) -> Phase:
        """What the steps of an epoch train."""
        return "warm-up" if epoch < self.config.warmup_epochs else "search"

    def learning_rate(self, epoch: int) -> float:
        """Of the weights, in an epoch."""
        config = self.config
        return cosine(epoch, config.epochs, start=config.weight_lr, end=config.weight_lr_min)

    def start_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch."""

    def end_epoch(self, epoch: int, step: int) -> dict[str, Any]:
        """What leaves after an epoch, `step` steps into the search; entries for the epoch's row of metrics."""
        return {}

    # ---- the result --------------------------------------------------------------------------------------------------

    def derived(self) -> AnyGenotype:
        """What the search would end in if it ended now."""
        return derive(self.supernet, max_edges_per_node=self.config.max_edges_per_node)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The edges that left: {"epoch", "step", "edge"} each."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the method must remember beside the supernet."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(); comes before the supernet's weights are loaded, and removes what had left."""
