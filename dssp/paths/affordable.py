"""The hard paths whose derived network fits a budget."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

import torch

from dssp.derived.budget import Budget, Costs, Option, add, node_options, smallest, strongest
from dssp.paths.space import Path, PathSpace
from dssp.supernet import Supernet


class AffordablePaths(PathSpace):
    """The paths of a PathSpace that fit: what is drawn, searched and compared under --max-params and --max-flops.

    Raises ConfigError if none does, naming the smallest network.
    """

    def __init__(self, supernet: Supernet, max_edges: int, budget: Budget) -> None:
        super().__init__(supernet, max_edges)
        names = supernet.space.operations
        self._costs = [
            [of_edge[name] for name in names] for type in supernet.cell_types for of_edge in budget.costs[type]
        ]
        self._room = budget.room
        weights = torch.cat([supernet.mixture(type).weights.detach() for type in supernet.cell_types]).tolist()
        nodes = []
        for node, taken in zip(self._nodes, self._taken, strict=True):
            options = [self._options(edge, weights[edge], left) for edge, left in node]
            nodes.append(node_options(options, taken, taken, len(self._room)))
        found = strongest(nodes, self._room)
        if found is None:
            raise budget.nothing_fits(nodes)
        self._strongest = self._path(dict(found.chosen))
        self._choices = [self._ways(node) for node in range(len(self._nodes))]

    def _options(self, edge: int, weights: list[float], left: list[int]) -> list[Option]:
        return [Option(weights[k], self._costs[edge][k], ((edge, k),)) for k in left]

    def fits(self, path: Path) -> bool:
        """Whether the derived network of a path does."""
        total: Costs = (0,) * len(self._room)
        for costs, k in zip(self._costs, path, strict=True):
            if k is not None:
                total = add(total, costs[k])
        return all(map(operator.le, total, self._room))

    def __iter__(self) -> Iterator[Path]:
        return filter(self.fits, super().__iter__())

    def neighbours(self, path: Path) -> Iterator[Path]:
        return filter(self.fits, super().neighbours(path))

    def strongest(self) -> Path:
        """The path of the largest sum of weights, as far as budget.strongest() finds it."""
        return self._strongest

    def draw(self, generator: torch.Generator) -> Path:
        """A path that fits: node by node, in random order, uniformly among what leaves room for the other nodes.

        Every path that fits can be drawn, not all with the same probability. If two limits together leave a node
        nothing, it is the strongest one.
        """
        chosen: dict[int, int] = {}
        order = torch.randperm(len(self._nodes), generator=generator).tolist()
        left = dict(enumerate(self._choices))
        spent: Costs = (0,) * len(self._room)
        for n in order:
            choices = left.pop(n)
            rest = add(spent, smallest(list(left.values()), len(spent)))
            room = tuple(map(operator.sub, self._room, rest))
            fitting = [option for option in choices if all(map(operator.le, option.costs, room))]
            if not fitting:
                return self._strongest
            option = fitting[int(torch.randint(len(fitting), (), generator=generator))]
            spent, chosen = add(spent, option.costs), chosen | dict(option.chosen)
        return self._path(chosen)

    def _ways(self, node: int) -> list[Option]:
        """All ways to take a node's edges, each with a candidate."""
        found = []
        for edges in itertools.combinations(self._nodes[node], self._taken[node]):
            for chosen in itertools.product(*([(edge, k) for k in left] for edge, left in edges)):
                costs: Costs = (0,) * len(self._room)
                for edge, k in chosen:
                    costs = add(costs, self._costs[edge][k])
                found.append(Option(0.0, costs, chosen))
        return found
