"""Differentiable Search Space Pruning that works: removals by measured effect, then training on hard paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dssp.config import SearchConfig
from dssp.genotype import AnyGenotype
from dssp.methods.base import Noise, Phase
from dssp.methods.dssp_paper import DsspPaper
from dssp.paths.effects import score_smoothly
from dssp.paths.training import HardPaths
from dssp.pruning.candidates import CandidatePruner, CandidateSchedule
from dssp.pruning.held_out import Losses, candidate_effects
from dssp.relaxation import Mixture, normalised_gates, softmax_over
from dssp.steps.optimization import cosine
from dssp.supernet import Supernet


class Dssp(DsspPaper):
    """The paper's masks, made to carry information, and a search that ends in what it was trained for.

    1. Gates are relative: g_e = sigmoid(m_e) / mean over the live edges into the same node (see dssp.pruning.edges for
       why; where nodes have shortcuts, into the same cell: see CellSpace.gate_groups); with ``raw_gates`` the paper's.
    2. Edges leave by ``prune_strategy`` in the first ``epochs - path_epochs`` epochs, then the candidates whose masking
       costs least (dssp.pruning.candidates).
    3. Then alpha and masks are frozen, the learning rate starts again, and every step trains one hard path drawn
       uniformly from what is left: as a derived cell runs, and as cheap.
    4. At the end candidates leave once more, by what they are worth on such paths (dssp.paths.effects); the paths that
       are left are compared on held-out images, and one is derived (``tie_break``). To go on training these few before
       made their ranks worse on NAS-Bench-201, the longer the worse.
    """

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        super().__init__(config, supernet, losses)
        self.search_epochs = config.epochs - config.path_epochs
        schedule = CandidateSchedule(self.first_candidate_epoch(), config.epochs - 1, config.candidates_kept)
        self.candidates = CandidatePruner(supernet, schedule, self._worth, self._can_derive, any_kind=config.any_kind)
        self._groups = torch.tensor(supernet.space.gate_groups, device=supernet.classifier.weight.device)
        self.paths = HardPaths(config, supernet, losses)

    @property
    def on_host(self) -> bool:  # type: ignore[override]  # paths are chosen on the host, mixtures are not
        return self.paths.are_open

    # ---- a step ------------------------------------------------------------------------------------------------------

    def noise(self, generator: torch.Generator, epoch: int) -> Noise:
        """In the last phase: the path of the next step."""
        return self.paths.noise(generator) if self.phase(epoch) == "paths" else {}

    def downsampled(self, images: Tensor) -> Tensor:
        return images if self.paths.are_open else super().downsampled(images)

    def mixtures(self, noise: Noise) -> dict[str, Mixture]:
        return self.paths.mixtures(noise) if self.paths.are_open else super().mixtures(noise)

    def mixture(self, cell_type: str) -> Mixture:
        if self.config.raw_gates:
            return super().mixture(cell_type)
        supernet = self.supernet
        weights = softmax_over(supernet.alpha[cell_type], supernet.offered(cell_type))
        gates = normalised_gates(supernet.mask[cell_type], supernet.active(cell_type), self._groups)
        return Mixture(gates.unsqueeze(1) * weights)

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def phase(self, epoch: int) -> Phase:
        return "paths" if epoch >= self.search_epochs else super().phase(epoch)

    def last_pruning_epoch(self) -> int:
        if self.config.path_epochs == 0:
            return super().last_pruning_epoch()
        return self.config.epochs - self.config.path_epochs - 1

    def first_candidate_epoch(self) -> int:
        """With the last edges that leave by schedule, as fewer are left to be measured; else at 2/3 of the mixing."""
        last_edges = self.pruner.rules.last_scheduled()
        return round(2 * self.search_epochs / 3) - 1 if last_edges is None else last_edges

    def learning_rate(self, epoch: int) -> float:
        config = self.config
        first, epochs = (
            (0, self.search_epochs) if epoch < self.search_epochs else (self.search_epochs, config.path_epochs)
        )
        return cosine(epoch - first, epochs, start=config.weight_lr, end=config.weight_lr_min)

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        if self.phase(epoch) == "paths":
            self.paths.open()

    def end_epoch(self, epoch: int, step: int) -> dict[str, Any]:
        row = super().end_epoch(epoch, step)
        row["dropped"] = self.candidates.end_epoch(epoch, step)
        if row["dropped"]:
            self.paths.close()
        if epoch + 1 == self.config.epochs and self.phase(epoch) == "paths":
            row |= self.paths.compare(score_smoothly, self.budget)
        return row

    def _worth(self, candidates: Sequence[tuple[str, str]]) -> list[float]:
        """What masking each costs, the softmax renormalised over the others; on hard paths, what each does for them."""
        if self.paths.are_open:
            return self.paths.worth(candidates)
        return [float(effect.mean()) for effect in candidate_effects(self.supernet, candidates, self.losses)]

    def _can_derive(self) -> bool:
        return self.budget is None or self.paths.any_fits(self.budget)

    def derived(self) -> AnyGenotype:
        return self.paths.genotype() or super().derived()

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        parts = {"candidates": self.candidates.state_dict(), "paths": self.paths.state_dict()}
        return {**super().state_dict(), **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.candidates.load_state_dict(state["candidates"])  # first: an edge that is gone has no candidates to lose
        super().load_state_dict(state)
        self.paths.load_state_dict(state["paths"])
