"""Hard paths: one candidate per edge, as in a derived cell, run inside the supernet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch

from dssp.genotype import AnyGenotype, Edge
from dssp.relaxation import Mixture
from dssp.supernet import Supernet

Path = tuple[int | None, ...]
"""Per edge, all cell types in their order: the position of the candidate that runs, or None for a closed edge."""


class PathSpace:
    """The hard paths that are left in a supernet: what a derived cell may still be.

    A node takes ``max_edges`` of its live incoming edges (all, where there are not more), and each of these one of its
    candidates that are left; `none` only where the space derives it.
    """

    def __init__(self, supernet: Supernet, max_edges: int) -> None:
        self.supernet = supernet
        self._device = supernet.classifier.weight.device
        # Per node of every cell type: its edges that are left, as (position over all types, candidates left).
        self._nodes: list[list[tuple[int, list[int]]]] = []
        self._taken: list[int] = []
        space = supernet.space
        derivable = [name != "none" or space.derives_none for name in space.operations]
        for i, cell_type in enumerate(supernet.cell_types):
            active, offered = supernet.active(cell_type).tolist(), supernet.offered(cell_type).tolist()
            for node in space.node_states:
                self._nodes.append(
                    [
                        (i * len(space.edges) + e, [k for k, flag in enumerate(offered[e]) if flag and derivable[k]])
                        for e in space.edges_into(node)
                        if active[e]
                    ]
                )
                self._taken.append(min(max_edges, len(self._nodes[-1])))

    def __len__(self) -> int:
        """How many paths there are."""
        count = 1
        for node, taken in zip(self._nodes, self._taken, strict=True):
            subsets = itertools.combinations([len(candidates) for _, candidates in node], taken)
            count *= sum(math.prod(sizes) for sizes in subsets)
        return count

    def draw(self, generator: torch.Generator) -> Path:
        """A path drawn uniformly: its edges per node, then a candidate for each."""
        chosen: dict[int, int] = {}
        for node, taken in zip(self._nodes, self._taken, strict=True):
            for i in torch.randperm(len(node), generator=generator)[:taken].tolist():
                edge, candidates = node[i]
                chosen[edge] = candidates[int(torch.randint(len(candidates), (), generator=generator))]
        return self._path(chosen)

    def __iter__(self) -> Iterator[Path]:
        """All paths."""
        per_node = [
            [
                dict(zip([edge for edge, _ in edges], candidates, strict=True))
                for edges in itertools.combinations(node, taken)
                for candidates in itertools.product(*(candidates for _, candidates in edges))
            ]
            for node, taken in zip(self._nodes, self._taken, strict=True)
        ]
        for nodes in itertools.product(*per_node):
            yield self._path({edge: k for node in nodes for edge, k in node.items()})

    def neighbours(self, path: Path) -> Iterator[Path]:
        """The paths that differ in one edge: another candidate on it, or another edge instead of it."""
        for node in self._nodes:
            here = [edge for edge, _ in node if path[edge] is not None]
            for edge, other in itertools.product(here, node):
                for k in other[1]:
                    is_free = other[0] == edge or path[other[0]] is None
                    if is_free and (other[0], k) != (edge, path[edge]):
                        chosen = {e: c for e, c in enumerate(path) if c is not None and e != edge}
                        yield self._path({**chosen, other[0]: k})

    def strongest(self) -> Path:
        """The path of the largest alpha: what DARTS would derive, where the gates left the edges."""
        supernet, chosen = self.supernet, {}
        weights = torch.cat([supernet.mixture(type).weights for type in supernet.cell_types]).tolist()
        for node, taken in zip(self._nodes, self._taken, strict=True):
            best = [(max(candidates, key=weights[edge].__getitem__), edge) for edge, candidates in node]
            for k, edge in sorted(best, key=lambda pair: -weights[pair[1]][pair[0]])[:taken]:
                chosen[edge] = k
        return self._path(chosen)

    def mixtures(self, path: Path) -> dict[str, Mixture]:
        """What makes the supernet run one path: weight 1 for its candidates, nothing else runs."""
        edges, candidates = len(self.supernet.space.edges), len(self.supernet.space.operations)
        runs = [[k == chosen for k in range(candidates)] for chosen in path]
        weights = torch.tensor(runs, dtype=torch.float32).to(self._device, non_blocking=True)
        return {
            type: Mixture(weights[i * edges : (i + 1) * edges], runs[i * edges : (i + 1) * edges])
            for i, type in enumerate(self.supernet.cell_types)
        }

    def genotype(self, path: Path) -> AnyGenotype:
        """The derived cell that a path is."""
        return genotype_of(self.supernet, path)

    def parameters(self, path: Path) -> int:
        """How many weights the path's candidates have in the supernet, over all cells: its capacity."""
        total = 0
        for edge, k in zip(self.supernet.edges(), path, strict=True):
            if k is not None:
                modules = [mixed_edge._ops[k] for mixed_edge in self.supernet.mixed_edges(edge)]
                total += sum(p.numel() for module in modules if module is not None for p in module.parameters())
        return total

    def _path(self, chosen: dict[int, int]) -> Path:
        return path_of(self.supernet, chosen)


def path_of(supernet: Supernet, chosen: Mapping[int, int]) -> Path:
    """The path of these candidates by edge, the other edges closed."""
    return tuple(chosen.get(e) for e in range(len(supernet.cell_types) * len(supernet.space.edges)))


def genotype_of(supernet: Supernet, path: Path) -> AnyGenotype:
    """The derived cell that a path is."""
    space, edges = supernet.space, len(supernet.space.edges)
    cells: dict[str, list[list[Edge]]] = {}
    for i, cell_type in enumerate(supernet.cell_types):
        cells[cell_type] = []
        for node in space.node_states:
            kept = [(path[i * edges + e], space.edges[e][0]) for e in space.edges_into(node)]
            operations = [(space.operations[k], source) for k, source in kept if k is not None]
            cells[cell_type].append([edge for edge in operations if edge[0] != "none"])
    return space.genotype.from_cells(cells, space.concat)
