"""Random search with weight sharing (Li and Talwalkar 2019, arXiv:1902.07638)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from dssp.config import SearchConfig
from dssp.genotype import AnyGenotype
from dssp.methods.base import Method, Noise, Phase
from dssp.paths.scores import score_random
from dssp.paths.training import HardPaths
from dssp.pruning.held_out import Losses
from dssp.relaxation import Mixture
from dssp.supernet import Supernet


class RandomSearch(Method):
    """Every step trains the shared weights of one path drawn uniformly; nothing learns which one (section 3.2).

    At the end ``scored_paths`` paths, drawn the same way, are compared on the held-out images, and the one of the
    lowest loss is derived. There is no architecture step: alpha stays as it was initialised, and until the end its
    largest entries only name the path that the validation figures are of.
    """

    on_host: ClassVar[bool] = True

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        super().__init__(config, supernet, losses)
        self.paths = HardPaths(config, supernet, losses)

    def noise(self, generator: torch.Generator, epoch: int) -> Noise:
        return self.paths.noise(generator)

    def mixtures(self, noise: Noise) -> dict[str, Mixture]:
        return self.paths.mixtures(noise)

    def phase(self, epoch: int) -> Phase:
        return "paths"

    def end_epoch(self, epoch: int, step: int) -> dict[str, Any]:
        return self.paths.compare(score_random, self.budget) if epoch + 1 == self.config.epochs else {}

    def derived(self) -> AnyGenotype:
        return self.paths.genotype() or super().derived()

    def state_dict(self) -> dict[str, Any]:
        return self.paths.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.paths.load_state_dict(state)
