"""Differentiable Search Space Pruning that works: removals by measured effect, then training on hard paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dssp.candidate_pruning import CandidatePruner, CandidateSchedule
from dssp.config import SearchConfig
from dssp.genotype import AnyGenotype
from dssp.held_out import Losses
from dssp.methods.base import Noise, Phase
from dssp.methods.dssp_paper import DsspPaper
from dssp.optimization import cosine
from dssp.paths import Path, PathSpace, score, select
from dssp.relaxation import Mixture, normalised_gates, softmax_over
from dssp.supernet import Supernet


class Dssp(DsspPaper):
    """The paper's masks, made to carry information, and a search that ends in what it was trained for.

    1. Gates are relative: g_e = sigmoid(m_e) / mean over the live edges into the same node (see dssp.pruning for why).
    2. Edges leave by ``prune_strategy``, candidates where masking them costs least (dssp.candidate_pruning), all in
       the first ``epochs - path_epochs`` epochs.
    3. Then alpha and masks are frozen, the learning rate starts again, and every step trains one hard path drawn
       uniformly from what is left: as a derived cell runs, and as cheap.
    4. At the end the paths are compared on held-out images, and one is derived (``tie_break``).
    """

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        super().__init__(config, supernet, losses)
        self.search_epochs = config.epochs - config.path_epochs
        self.candidates = CandidatePruner(
            supernet, CandidateSchedule(self.search_epochs, config.candidates_kept), losses
        )
        nodes = torch.tensor([node for _, node in supernet.space.edges])
        self._nodes = nodes.to(supernet.classifier.weight.device)
        self._paths: PathSpace | None = None
        self._chosen: Path | None = None
        self._forced: Path | None = None  # while a path is judged

    @property
    def on_host(self) -> bool:  # type: ignore[override]  # paths are chosen on the host, mixtures are not
        return self._paths is not None

    # ---- a step ------------------------------------------------------------------------------------------------------

    def noise(self, generator: torch.Generator, epoch: int) -> Noise:
        """In the last phase: the path of the next step."""
        if self.phase(epoch) != "paths":
            return {}
        assert self._paths is not None
        return {"path": torch.tensor([-1 if k is None else k for k in self._paths.draw(generator)])}

    def mixtures(self, noise: Noise) -> dict[str, Mixture]:
        if self._paths is None:
            return super().mixtures(noise)
        path = self._forced or self._paths.strongest()
        if "path" in noise:
            path = tuple(None if k < 0 else k for k in noise["path"].tolist())
        return self._paths.mixtures(path)

    def mixture(self, cell_type: str) -> Mixture:
        supernet = self.supernet
        weights = softmax_over(supernet.alpha[cell_type], supernet.offered(cell_type))
        gates = normalised_gates(supernet.mask[cell_type], supernet.active(cell_type), self._nodes)
        return Mixture(gates.unsqueeze(1) * weights)

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def phase(self, epoch: int) -> Phase:
        return "paths" if epoch >= self.search_epochs else super().phase(epoch)

    def last_pruning_epoch(self) -> int:
        if self.config.path_epochs == 0:
            return super().last_pruning_epoch()
        return self.config.epochs - self.config.path_epochs - 1

    def learning_rate(self, epoch: int) -> float:
        config = self.config
        first, epochs = (
            (0, self.search_epochs) if epoch < self.search_epochs else (self.search_epochs, config.path_epochs)
        )
        return cosine(epoch - first, epochs, start=config.weight_lr, end=config.weight_lr_min)

    def start_epoch(self, epoch: int) -> None:
        if self.phase(epoch) == "paths" and self._paths is None:
            self._paths = PathSpace(self.supernet, self.config.max_edges_per_node)

    def end_epoch(self, epoch: int, step: int) -> dict[str, Any]:
        row = super().end_epoch(epoch, step)
        row["dropped"] = self.candidates.end_epoch(epoch, step)
        if epoch + 1 == self.config.epochs and self._paths is not None:
            scores = score(self._paths, self._path_losses, limit=self.config.scored_paths, seed=self.config.seed)
            self._chosen = select(scores, self._paths.parameters if self.config.tie_break == "capacity" else None)
            row["scored_paths"] = len(scores)
            row["path_loss"] = float(scores[self._chosen].mean())
        return row

    def derived(self) -> AnyGenotype:
        if self._chosen is None or self._paths is None:
            return super().derived()
        return self._paths.genotype(self._chosen)

    def _path_losses(self, path: Path) -> Tensor:
        self._forced = path
        try:
            return self.losses()
        finally:
            self._forced = None

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        chosen = None if self._chosen is None else list(self._chosen)
        return {**super().state_dict(), "candidates": self.candidates.state_dict(), "chosen": chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.candidates.load_state_dict(state["candidates"])  # first: an edge that is gone has no candidates to lose
        super().load_state_dict(state)
        if state["chosen"] is not None:
            self._paths = PathSpace(self.supernet, self.config.max_edges_per_node)
            self._chosen = tuple(state["chosen"])
