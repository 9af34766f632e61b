"""The supernet: every edge of every cell runs all its candidate operations, mixed by alpha and gated by masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dssp.network import CellNetwork
from dssp.relaxation import Mixture, softmax_over
from dssp.spaces import CellSpace
from dssp.spaces.operations import build_candidate
from dssp.spaces.skeleton import Cell, Edges
from dssp_kernels import CellSums, FusedMixedEdge, FusedMixedNode, SharedOutputs


class SearchEdges(Edges):
    """All edges of a cell with all their candidates; one kernel per node mixes them."""

    def __init__(self, space: CellSpace, channels: int, stride: int, c_in: int | None = None) -> None:
        def candidate(name: str, source: int) -> nn.Module:
            taken = (stride, c_in) if source < space.inputs else (1, None)
            return build_candidate(name, channels, taken[0], c_in=taken[1], norms_after_pools=space.norms_after_pools)

        super().__init__(
            FusedMixedEdge(
                (candidate(name, source) for name in space.operations), alpha=False, mask=False, relaxation="given"
            )
            for source, _ in space.edges
        )
        self.space, self.concat = space, space.concat
        # The edges are registered once, under DARTS' names; the nodes only group them.
        self._nodes = tuple(
            FusedMixedNode(self.mixed_edge(i) for i in space.edges_into(node)) for node in space.node_states
        )

    def mixed_edge(self, position: int) -> FusedMixedEdge:
        """The mixed edge at a position in the space's order of edges."""
        return cast(FusedMixedEdge, self[position])

    def forward(self, inputs: Sequence[Tensor], mixture: Mixture) -> list[Tensor]:
        """mixture: of all edges, in the space's order."""
        shared = SharedOutputs()
        edges = [(*ends, self.mixed_edge(position)) for position, ends in enumerate(self.space.edges)]
        early = CellSums(edges, mixture.weights, mixture.runs)
        states: list[Tensor] = []
        for state in inputs:
            early.enter(len(states), state)
            states.append(state)
        weights = mixture.weights.split([len(node.edges) for node in self._nodes])
        for number, node, of_node in zip(self.space.node_states, self._nodes, weights, strict=True):
            sources = [states[source] for source in self.space.sources(number)]
            has_shortcut = self.space.has_shortcut(number)
            if has_shortcut and all(edge.is_pruned for edge in node.edges):
                state = states[-1]
            else:
                runs = [early.runs[position] for position in self.space.edges_into(number)]
                state = node(sources, of_node, None, shared, runs, early.sums.get(number))
                state = state + states[-1] if has_shortcut else state
            early.enter(number, state)
            states.append(state)
        return states


class Supernet(CellNetwork):
    """The network that is searched: a space's macro skeleton, every edge with all its candidates.

    Architecture parameters are shared by all cells of a type: ``alpha[type]`` [edges, candidates]; unless
    ``gated=False``, ``mask[type]`` [edges] (gate = sigmoid(mask), initialised to 1); with ``weighs_edges``,
    ``beta[type]`` [edges], for methods that mix by it. Edges are named as ``normal:0->2``: cell type, source state,
    node; `edges` builds those of a cell. In the DARTS space the weights' names are those of model_search.py.

    forward(images [B, image_channels, H, W], mixtures=None) -> logits [B, classes]. `mixtures` says per cell type how
    the candidates are mixed; by default sigmoid(mask) * softmax(alpha), over the candidates that are left.
    Raises ValueError if a size is below 1.
    """

    def __init__(
        self,
        space: CellSpace,
        *,
        channels: int,
        cells: int,
        classes: int,
        image_channels: int = 3,
        stem: str = "cifar",
        gated: bool = True,
        weighs_edges: bool = False,
        edges: type[SearchEdges] = SearchEdges,
    ) -> None:
        super().__init__(
            space,
            lambda cell_type, channels, stride=1, c_in=None: edges(space, channels, stride, c_in),
            channels=channels,
            cells=cells,
            classes=classes,
            image_channels=image_channels,
            affine=False,
            stem=stem,
        )
        self.space = space
        count, candidates = len(space.edges), len(space.operations)
        self.alpha = nn.ParameterDict(
            {type: nn.Parameter(1e-3 * torch.randn(count, candidates)) for type in self.cell_types}
        )
        self.beta = nn.ParameterDict(
            {type: nn.Parameter(1e-3 * torch.randn(count)) for type in self.cell_types if weighs_edges}
        )
        self.mask = nn.ParameterDict({type: nn.Parameter(torch.ones(count)) for type in self.cell_types if gated})
        for type in self.cell_types:  # on the device, so that the penalty needs no synchronisation
            self.register_buffer(f"active_{type}", torch.ones(count, dtype=torch.bool), persistent=False)
            self.register_buffer(f"offered_{type}", self._first_offer(), persistent=False)

    def forward(self, images: Tensor, mixtures: Mapping[str, Mixture] | None = None) -> Tensor:
        if mixtures is None:
            mixtures = {type: self.mixture(type) for type in self.cell_types}
        return self.logits(images, {type: (mixture,) for type, mixture in mixtures.items()})

    def mixture(self, cell_type: str) -> Mixture:
        """DARTS' mixture under the paper's gates: sigmoid(mask) * softmax(alpha), over the candidates that are left."""
        weights = softmax_over(self.alpha[cell_type], self.offered(cell_type))
        return Mixture(self.mask[cell_type].sigmoid().unsqueeze(1) * weights if self.mask else weights)

    def _first_offer(self) -> Tensor:
        """All candidates, but `none` where a shortcut stands in for it elsewhere: there it would cut the only path."""
        space = self.space
        offer = torch.ones(len(space.edges), len(space.operations), dtype=torch.bool)
        if space.shortcuts and "none" in space.operations:
            k = space.operations.index("none")
            offer[:, k] = torch.tensor([space.has_shortcut(node) for _, node in space.edges])
        return offer

    # ---- parameters ------------------------------------------------------------------------------------------

    def architecture_parameters(self) -> list[nn.Parameter]:
        """alpha, beta and masks of all cell types."""
        return [*self.alpha.values(), *self.beta.values(), *self.mask.values()]

    def weights(self) -> list[nn.Parameter]:
        """Everything that is trained but the architecture parameters; removed edges have none."""
        architecture = {id(parameter) for parameter in self.architecture_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in architecture]

    # ---- edges -----------------------------------------------------------------------------------------------

    def edges(self) -> Iterator[str]:
        """The names of all edges, one cell type after the other (normal first), in DARTS' order."""
        return (f"{type}:{source}->{node}" for type in self.cell_types for source, node in self.space.edges)

    def locate(self, edge: str) -> tuple[str, int]:
        """Cell type and position of a named edge. Raises ValueError if there is none of that name."""
        names = list(self.edges())
        if edge not in names:
            raise ValueError(f"edge: expected one of {names[0]} ... {names[-1]}, got {edge!r}")
        cell_type, position = divmod(names.index(edge), len(self.space.edges))
        return self.cell_types[cell_type], position

    def active(self, cell_type: str) -> Tensor:
        """Which edges of a cell type are left: bool [edges]."""
        return self.get_buffer(f"active_{cell_type}")

    def offered(self, cell_type: str) -> Tensor:
        """Which candidates of each edge of a cell type are left: bool [edges, candidates]."""
        return self.get_buffer(f"offered_{cell_type}")

    def live_edges(self) -> list[str]:
        """The names of the edges that are left."""
        flags = torch.cat([self.active(type) for type in self.cell_types]).tolist()
        return [edge for edge, live in zip(self.edges(), flags, strict=True) if live]

    def mixed_edges(self, edge: str) -> list[FusedMixedEdge]:
        """The modules of a named edge, one per cell of its type."""
        cell_type, position = self.locate(edge)
        cells = [cell for cell in self.cells if isinstance(cell, Cell) and cell.cell_type == cell_type]
        return [cast(SearchEdges, cell._ops).mixed_edge(position) for cell in cells]

    def remove_edge(self, edge: str) -> None:
        """Remove an edge for good from all cells of its type: its candidates are gone and take no memory or time."""
        cell_type, position = self.locate(edge)
        for mixed_edge in self.mixed_edges(edge):
            mixed_edge.remove()
        self.active(cell_type)[position] = False

    def remove_candidate(self, edge: str, operation: str) -> None:
        """Remove a candidate for good from an edge, in all cells of its type; it takes no memory or time any more.

        Raises ValueError if the edge has no such candidate, or no other one.
        """
        cell_type, position = self.locate(edge)
        if operation not in self.space.operations:
            raise ValueError(f"operation: expected one of {', '.join(self.space.operations)}, got {operation!r}")
        k = self.space.operations.index(operation)
        for mixed_edge in self.mixed_edges(edge):
            mixed_edge.remove_candidate(k)
        self.offered(cell_type)[position, k] = False

    def gates(self, cell_type: str) -> Tensor:
        """sigmoid(mask) [edges] of a cell type, detached; ones if the supernet has no masks."""
        if not self.mask:
            return torch.ones(len(self.space.edges))
        return self.mask[cell_type].detach().sigmoid()

    def gate_sum(self) -> Tensor:
        """L_prune: the sum of the gates sigmoid(m) of all edges that are left (a scalar that carries gradients)."""
        live = [torch.where(self.active(type), self.mask[type].sigmoid(), 0.0).sum() for type in self.mask]
        return torch.stack(live).sum() if live else self.classifier.weight.new_zeros(())
