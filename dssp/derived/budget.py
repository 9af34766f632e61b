"""Derivation under a budget: what every choice costs in the derived network, and the strongest choices that fit."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dssp.cost import count_flops, count_parameters
from dssp.genotype import AnyGenotype
from dssp.network import CellNetwork
from dssp.options import ConfigError
from dssp.spaces import CellSpace
from dssp.spaces.operations import build_operation
from dssp.spaces.skeleton import Cell, Edges

UNITS = {"max_params": "parameters", "max_flops": "FLOPs per image"}
EXACT = 10_000  # partial choices of different costs; with more, see strongest()

Costs = tuple[int, ...]
"""What something costs, in the order of the limits."""


class Option(NamedTuple):
    """One way to choose: its strength, its costs, and what it chooses as (edge over all cell types, candidate)."""

    strength: float
    costs: Costs
    chosen: tuple[tuple[int, int], ...] = ()

    def plus(self, other: Option) -> Option:
        return Option(self.strength + other.strength, add(self.costs, other.costs), self.chosen + other.chosen)


def add(first: Costs, second: Costs) -> Costs:
    return tuple(map(operator.add, first, second))


def node_options(edges: Sequence[Sequence[Option]], least: int, most: int, dimensions: int) -> list[Option]:
    """The ways to take `least` to `most` of a node's edges with an option each; of equal cost and count the strongest.

    A node with fewer edges than `least` takes all.
    """
    zero = (0,) * dimensions
    partial = {(0, zero): Option(0.0, zero)}
    for options in edges:
        grown = dict(partial)
        for (count, _), before in partial.items():
            for option in options if count < most else ():
                after = before.plus(option)
                key = (count + 1, after.costs)
                if key not in grown or grown[key].strength < after.strength:
                    grown[key] = after
        partial = grown
    return [option for (count, _), option in partial.items() if count >= min(least, len(edges))]


def smallest(nodes: Sequence[Sequence[Option]], dimensions: int) -> Costs:
    """The least that one option of each node can cost, for each limit by itself."""
    return tuple(sum(min(option.costs[d] for option in options) for options in nodes) for d in range(dimensions))


def strongest(nodes: Sequence[Sequence[Option]], limits: Costs) -> Option | None:
    """One option of each node, with the largest sum of strengths within the limits; None if nothing fits.

    Dynamic programming over the nodes. Exact as long as the choices for the first nodes have at most EXACT different
    costs. Where there are more, the limits are divided into a grid of that many cells, and of the partial choices in
    one cell only the strongest goes on: the result still fits, and may be a little weaker than the strongest.
    """
    dimensions = len(limits)
    partial = {(0,) * dimensions: Option(0.0, (0,) * dimensions)}
    for n, options in enumerate(nodes):
        room = tuple(map(operator.sub, limits, smallest(nodes[n + 1 :], dimensions)))
        found: dict[Costs, Option] = {}
        for before in partial.values():
            for option in options:
                after = before.plus(option)
                if not all(map(operator.le, after.costs, room)):
                    continue
                if after.costs not in found or found[after.costs].strength < after.strength:
                    found[after.costs] = after
        partial = found if len(found) <= EXACT else _thinned(found, limits)
    return max(partial.values(), key=lambda option: option.strength, default=None)


def _thinned(found: Mapping[Costs, Option], limits: Costs) -> dict[Costs, Option]:
    steps = math.floor(EXACT ** (1 / len(limits)))
    kept: dict[Costs, Option] = {}
    for costs, option in found.items():
        cell = tuple(cost * steps // (limit + 1) for cost, limit in zip(costs, limits, strict=True))
        if cell not in kept or kept[cell].strength < option.strength:
            kept[cell] = option
    return kept


@dataclass(frozen=True)
class Budget:
    """Limits of the derived network as it will be retrained, auxiliary head aside, and what its parts cost.

    limits  by option, max_params and max_flops or one of them; FLOPs as cost.count_flops counts them.
    fixed   what the network costs that no choice changes.
    costs   per cell type, edge and operation, summed over all cells of the type.

    Costs add up exactly: a node sums its edges, so no edge changes what another one costs.
    """

    limits: Mapping[str, int]
    fixed: Costs
    costs: Mapping[str, Sequence[Mapping[str, Costs]]]

    @classmethod
    def of(
        cls,
        space: CellSpace,
        limits: Mapping[str, int],
        *,
        channels: int,
        cells: int,
        classes: int,
        image_shape: tuple[int, int, int],
        stem: str,
    ) -> Budget:
        """The budget of networks of this size; nothing is computed to count them."""
        with torch.device("meta"), torch.no_grad():
            network = CellNetwork(
                space,
                lambda cell_type, channels, stride=1, c_in=None: _Entered(space, channels, stride),
                channels=channels,
                cells=cells,
                classes=classes,
                image_channels=image_shape[0],
                affine=True,
                stem=stem,
            ).eval()
            with FlopCounterMode(display=False) as counter:
                network.logits(torch.empty(1, *image_shape), {})
        both = {"max_params": count_parameters(network), "max_flops": counter.get_total_flops()}
        zero, counted = (0,) * len(limits), _Counted(tuple(limits))
        costs = {type: [dict.fromkeys(space.operations, zero) for _ in space.edges] for type in network.cell_types}
        for cell in network.cells:
            if isinstance(cell, Cell):
                assert isinstance(cell._ops, _Entered)
                for of_edge, entering in zip(costs[cell.cell_type], cell._ops.entering, strict=True):
                    for name in of_edge:
                        of_edge[name] = add(of_edge[name], counted(name, *entering))
        return cls(dict(limits), tuple(both[name] for name in limits), costs)

    @property
    def room(self) -> Costs:
        """What the choices may cost together; negative where the rest alone is too much."""
        return tuple(map(operator.sub, self.limits.values(), self.fixed))

    def cost(self, space: CellSpace, genotype: AnyGenotype) -> Costs:
        """What the network of a genotype costs, all of it."""
        total = self.fixed
        for cell_type, (nodes, _) in genotype.cells.items():
            for node, edges in zip(range(space.inputs, space.inputs + len(nodes)), nodes, strict=True):
                for operation, source in edges:
                    total = add(total, self.costs[cell_type][space.edges.index((source, node))][operation])
        return total

    def admits(self, space: CellSpace, genotype: AnyGenotype) -> bool:
        """Whether the network of a genotype fits."""
        return all(map(operator.le, self.cost(space, genotype), self.limits.values()))

    def nothing_fits(self, nodes: Sequence[Sequence[Option]]) -> ConfigError:
        """What to say when strongest() of these found nothing."""
        least = add(self.fixed, smallest(nodes, len(self.fixed)))
        said = [f"{cost:,} {UNITS[name]}" for name, cost in zip(self.limits, least, strict=True)]
        for name, cost, text in zip(self.limits, least, said, strict=True):
            if cost > self.limits[name]:
                reason = f"no network that is left fits: the smallest has {text}, got {self.limits[name]:,}"
                return ConfigError(name, reason)
        name, limit = list(self.limits.items())[-1]
        reason = f"no network that is left fits all limits together: each by itself, the least is {' and '.join(said)}"
        return ConfigError(name, f"{reason}, got {limit:,}")


class _Entered(Edges):
    """Edges that run nothing and note what enters each of them: (c_in, channels, stride, shape)."""

    def __init__(self, space: CellSpace, channels: int, stride: int) -> None:
        super().__init__()
        self.space, self.channels, self.stride, self.concat = space, channels, stride, space.concat
        self.entering: list[tuple[int, int, int, tuple[int, int, int]]] = []

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        height, width = (-(-size // self.stride) for size in inputs[0].shape[2:])
        node = inputs[0].new_empty(1, self.channels, height, width)
        states = [*inputs, *[node] * self.space.nodes]
        self.entering = []
        for source, _ in self.space.edges:
            c_in, height, width = states[source].shape[1:]
            stride = self.stride if source < self.space.inputs else 1
            self.entering.append((c_in, self.channels, stride, (c_in, height, width)))
        return states


class _Counted:
    """What an operation costs that takes such an input; counted once."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._known: dict[object, Costs] = {}

    def __call__(self, name: str, c_in: int, channels: int, stride: int, shape: tuple[int, int, int]) -> Costs:
        key = (name, channels, stride, shape)
        if key not in self._known:
            with torch.device("meta"):
                module: nn.Module = build_operation(name, channels, stride, c_in=c_in)
            self._known[key] = tuple(
                count_parameters(module) if limit == "max_params" else count_flops(module, shape)
                for limit in self.names
            )
        return self._known[key]
