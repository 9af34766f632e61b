"""Training on hard paths: one drawn for every step, then compared on held-out images, and the best one is derived."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dssp.config import SearchConfig
from dssp.derived.budget import Budget
from dssp.genotype import AnyGenotype
from dssp.options import ConfigError
from dssp.paths.affordable import AffordablePaths
from dssp.paths.effects import path_effects
from dssp.paths.scores import Score, select
from dssp.paths.space import Path, PathSpace
from dssp.pruning.held_out import Losses
from dssp.relaxation import Mixture
from dssp.supernet import Supernet


class HardPaths:
    """The paths of a supernet from the moment they are opened, when nothing may leave any more.

    `losses` are the held-out losses of the supernet as it is mixed by mixtures({}).
    """

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        self.config, self.supernet, self.losses = config, supernet, losses
        self.space: PathSpace | None = None
        self.chosen: Path | None = None
        self._forced: Path | None = None  # while a path is judged

    @property
    def are_open(self) -> bool:
        """Whether paths are what trains."""
        return self.space is not None

    def open(self) -> PathSpace:
        """What is left of the supernet, as paths; the same at every call until close()."""
        self.space = self.space or PathSpace(self.supernet, self.config.max_edges_per_node)
        return self.space

    def close(self) -> None:
        """Forget the space: something has left the supernet."""
        self.space = None

    def noise(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The path of the next step, drawn uniformly."""
        return {"path": torch.tensor([-1 if k is None else k for k in self.open().draw(generator)])}

    def mixtures(self, noise: dict[str, Tensor]) -> dict[str, Mixture]:
        """What runs a drawn path or, without noise, the one under judgement: else the path of the largest alpha."""
        space = self.open()
        if "path" in noise:
            return space.mixtures(tuple(None if k < 0 else k for k in noise["path"].tolist()))
        return space.mixtures(self._forced or space.strongest())

    def worth(self, candidates: Sequence[tuple[str, str]]) -> list[float]:
        """How much each candidate (edge, operation) lowers the held-out loss of the ``scored_paths`` that are drawn.

        Least of all one that none of them has, as `none`.
        """
        config, edges = self.config, list(self.supernet.edges())
        effects = path_effects(self.open(), self.losses_of, count=config.scored_paths, seed=config.seed)
        operations = self.supernet.space.operations
        return [effects.get((edges.index(edge), operations.index(name)), -math.inf) for edge, name in candidates]

    def compare(self, score: Callable[..., Score], budget: Budget | None) -> dict[str, Any]:
        """Score paths, under a budget those that fit, and choose one; entries for the epoch's row of metrics."""
        space, config = self._within(budget), self.config
        losses = partial(self.losses_of, comparing=True)
        scores = score(space, losses, limit=config.scored_paths, seed=config.seed)
        sign = {"parsimony": -1, "loss": 0, "capacity": 1}[config.tie_break]
        self.chosen = select(scores, lambda path: sign * space.parameters(path))
        return {"scored_paths": len(scores), "path_loss": float(scores[self.chosen].mean())}

    def any_fits(self, budget: Budget) -> bool:
        """Whether a path of what the supernet offers now is within the budget."""
        try:
            self._within(budget)
        except ConfigError:
            return False
        return True

    def _within(self, budget: Budget | None) -> PathSpace:
        if budget is None:
            return self.open()
        return AffordablePaths(self.supernet, self.config.max_edges_per_node, budget)

    def losses_of(self, path: Path, *, comparing: bool = False) -> Tensor:
        """The losses of one path on the images on which removals are measured or, if asked, on those for comparing."""
        self._forced = path
        try:
            return self.losses(comparing=comparing)
        finally:
            self._forced = None

    def genotype(self) -> AnyGenotype | None:
        """The derived cell that was chosen, None before the comparison."""
        return None if self.chosen is None else self.open().genotype(self.chosen)

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": None if self.chosen is None else list(self.chosen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Comes after everything has left the supernet that had left."""
        if state["chosen"] is not None:
            self.open()
            self.chosen = tuple(state["chosen"])
