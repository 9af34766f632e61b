"""What one search method may do differently from another; the default is DARTS, first order."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dssp.config import SearchConfig
from dssp.derived.budget import Budget
from dssp.derived.derivation import derive
from dssp.genotype import AnyGenotype
from dssp.pruning.held_out import Losses
from dssp.relaxation import Mixture, softmax_over
from dssp.steps.optimization import cosine
from dssp.supernet import SearchEdges, Supernet

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
    weighs_edges the supernet has a beta per edge.
    edges        what the supernet's edges are.
    joint        alpha and weights learn together from the training batch, without a validation batch.
    on_host      a step decides on the host what runs, so it cannot be recorded in a CUDA graph.
    """

    gated: ClassVar[bool] = False
    offers_none: ClassVar[bool] = True
    weighs_edges: ClassVar[bool] = False
    edges: ClassVar[type[SearchEdges]] = SearchEdges
    joint: ClassVar[bool] = False
    on_host: ClassVar[bool] = False

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        """`losses` gives the held-out losses of the supernet as this method mixes it."""
        self.config, self.supernet, self.losses = config, supernet, losses
        self.epoch = 0
        self.budget: Budget | None = None  # of the derived network, where there is one

    # ---- a step ------------------------------------------------------------------------------------------------------

    def noise(self, generator: torch.Generator, epoch: int) -> Noise:
        """What the next step needs of chance."""
        return {}

    def logits(self, images: Tensor, noise: Noise) -> Tensor:
        """What the supernet says of the images in this step."""
        return self.supernet(self.downsampled(images), self.mixtures(noise))

    def downsampled(self, images: Tensor) -> Tensor:
        """The images as the search sees them: means over squares of `--downsample` pixels; odd sizes round up."""
        size = self.config.downsample
        return images if size == 1 else F.avg_pool2d(images, size, ceil_mode=True, count_include_pad=False)

    def mixtures(self, noise: Noise) -> dict[str, Mixture]:
        """How the cells of each type mix their candidates in this step."""
        return {type: self.mixture(type) for type in self.supernet.cell_types}

    def mixture(self, cell_type: str) -> Mixture:
        """The mixture without noise: what held-out images are judged by."""
        return self.supernet.mixture(cell_type)

    def candidate_weights(self, cell_type: str) -> Tensor:
        """What alpha gives to each candidate, without gates and noise; recorded every epoch: [edges, candidates]."""
        return softmax_over(self.supernet.alpha[cell_type], self.supernet.offered(cell_type))

    def derivation_weights(self, cell_type: str) -> Tensor:
        """What the derivation ranks candidates and edges by (times the gates): [edges, candidates], see derive()."""
        return self.candidate_weights(cell_type)

    def penalty(self) -> Tensor:
        """What is added to the loss of alpha and masks, a scalar; here the beta decay, if there is one."""
        if self.config.beta_decay == 0:
            return self.supernet.classifier.weight.new_zeros(())
        return self.config.beta_decay * self.epoch / self.config.epochs * beta_loss(self.supernet)

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def phase(self, epoch: int) -> Phase:
        """What the steps of an epoch train."""
        return "warm-up" if epoch < self.config.warmup_epochs else "search"

    def learning_rate(self, epoch: int) -> float:
        """Of the weights, in an epoch."""
        config = self.config
        return cosine(epoch, config.epochs, start=config.weight_lr, end=config.weight_lr_min)

    def start_epoch(self, epoch: int) -> None:
        """Before the first step of an epoch, and before the first one after a restart."""
        self.epoch = epoch

    def end_epoch(self, epoch: int, step: int) -> dict[str, Any]:
        """What leaves after an epoch, `step` steps into the search; entries for the epoch's row of metrics."""
        return {}

    # ---- the result --------------------------------------------------------------------------------------------------

    def derived(self) -> AnyGenotype:
        """What the search would end in if it ended now."""
        weights = {type: self.derivation_weights(type) for type in self.supernet.cell_types}
        config = self.config
        return derive(
            self.supernet,
            weights,
            max_edges_per_node=config.max_edges_per_node,
            max_skips=config.max_skips,
            budget=self.budget,
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """The edges that left: {"epoch", "step", "edge"} each."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the method must remember beside the supernet."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state_dict(); comes before the supernet's weights are loaded, and removes what had left."""


def beta_loss(supernet: Supernet) -> Tensor:
    """L_beta = mean over the live edges of logsumexp(alpha_e) (Beta-DARTS, Ye et al. 2022, arXiv:2203.01665).

    Its gradient by alpha is softmax(alpha) / edges: it keeps all weights near each other, and more so the large ones.
    """
    terms, live = [], []
    for cell_type in supernet.cell_types:
        alpha = supernet.alpha[cell_type].masked_fill(~supernet.offered(cell_type), -torch.inf)
        terms.append(torch.where(supernet.active(cell_type), alpha.logsumexp(-1), 0.0).sum())
        live.append(supernet.active(cell_type).sum())
    return torch.stack(terms).sum() / torch.stack(live).sum()
