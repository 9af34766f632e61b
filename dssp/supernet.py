"""The supernet: every edge of every cell runs all its candidate operations, mixed by alpha and gated by masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from dssp.network import STEM_MULTIPLIER
from dssp.spaces import CellSpace
from dssp.spaces.operations import FactorizedReduce, ReLUConvBN, build_candidate
from dssp_kernels import FusedMixedEdge, FusedMixedNode, SharedOutputs

CELL_TYPES = ("normal", "reduce")


class SearchCell(nn.Module):
    """A cell with all its edges; module names and state_dict keys are those of DARTS' model_search.Cell."""

    def __init__(
        self, space: CellSpace, *, c_before: int, c_previous: int, channels: int, reduction: bool, reduced_before: bool
    ) -> None:
        super().__init__()
        self.cell_type = "reduce" if reduction else "normal"
        self.preprocess0 = (
            FactorizedReduce(c_before, channels, affine=False)
            if reduced_before
            else ReLUConvBN(c_before, channels, 1, 1, 0, affine=False)
        )
        self.preprocess1 = ReLUConvBN(c_previous, channels, 1, 1, 0, affine=False)
        self._ops = nn.ModuleList(
            FusedMixedEdge(
                (
                    build_candidate(name, channels, stride=2 if reduction and source < space.inputs else 1)
                    for name in space.operations
                ),
                alpha=False,
                mask=False,
            )
            for source, _ in space.edges
        )
        # The edges are registered once, under DARTS' names; the nodes only group them.
        self._nodes = tuple(FusedMixedNode(self.mixed_edge(i) for i in space.edges_into(node)) for node in space.concat)

    def mixed_edge(self, position: int) -> FusedMixedEdge:
        """The mixed edge at a position in the space's order of edges."""
        return cast(FusedMixedEdge, self._ops[position])

    def forward(self, s0: Tensor, s1: Tensor, alpha: tuple[Tensor, ...], mask: tuple[Tensor | None, ...]) -> Tensor:
        """alpha, mask: per node, [edges, candidates] and [edges]."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        inputs = len(states)
        shared = SharedOutputs()
        for node, node_alpha, node_mask in zip(self._nodes, alpha, mask, strict=True):
            states.append(node(states, node_alpha, node_mask, shared))
        return torch.cat(states[inputs:], dim=1)


class Supernet(nn.Module):
    """The network that is searched: DARTS' macro structure over a cell space.

    Architecture parameters are shared by all cells of a type: ``alpha[type]`` [edges, candidates] and, unless
    ``gated=False``, ``mask[type]`` [edges] (gate = sigmoid(mask), initialised to 1). Edges are named as
    ``normal:0->2``: cell type, source state, node.

    forward(images [B, image_channels, H, W]) -> logits [B, classes].
    """

    def __init__(
        self,
        space: CellSpace,
        *,
        channels: int,
        cells: int,
        classes: int,
        image_channels: int = 3,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.space = space
        c_previous = STEM_MULTIPLIER * channels
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, c_previous, 3, padding=1, bias=False), nn.BatchNorm2d(c_previous)
        )
        self.cells = nn.ModuleList()
        c_before, reduced_before = c_previous, False
        for position in range(cells):
            reduction = position in space.reduction_cells(cells)
            channels *= 2 if reduction else 1
            self.cells.append(
                SearchCell(
                    space,
                    c_before=c_before,
                    c_previous=c_previous,
                    channels=channels,
                    reduction=reduction,
                    reduced_before=reduced_before,
                )
            )
            c_before, c_previous, reduced_before = c_previous, space.nodes * channels, reduction
        self.classifier = nn.Linear(c_previous, classes)
        edges, candidates = len(space.edges), len(space.operations)
        self.alpha = nn.ParameterDict(
            {type: nn.Parameter(1e-3 * torch.randn(edges, candidates)) for type in CELL_TYPES}
        )
        self.mask = nn.ParameterDict({type: nn.Parameter(torch.ones(edges)) for type in CELL_TYPES if gated})
        for type in CELL_TYPES:  # on the device, so that the penalty needs no synchronisation
            self.register_buffer(f"active_{type}", torch.ones(edges, dtype=torch.bool), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        sizes = list(self.space.concat)  # node n has n incoming edges
        alpha = {type: self.alpha[type].split(sizes) for type in CELL_TYPES}
        mask = {type: self.mask[type].split(sizes) if self.mask else (None,) * len(sizes) for type in CELL_TYPES}
        s0 = s1 = self.stem(images)
        for cell in self._cells():
            s0, s1 = s1, cell(s0, s1, alpha[cell.cell_type], mask[cell.cell_type])
        return self.classifier(s1.mean((2, 3)))

    def _cells(self) -> Iterator[SearchCell]:
        return (cast(SearchCell, cell) for cell in self.cells)

    # ---- parameters ------------------------------------------------------------------------------------------

    def architecture_parameters(self) -> list[nn.Parameter]:
        """alpha and masks of all cell types."""
        return [*self.alpha.values(), *self.mask.values()]

    def weights(self) -> list[nn.Parameter]:
        """Everything that is trained but the architecture parameters; removed edges have none."""
        architecture = {id(parameter) for parameter in self.architecture_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in architecture]

    # ---- edges -----------------------------------------------------------------------------------------------

    def edges(self) -> Iterator[str]:
        """The names of all edges, normal cells first, in DARTS' order."""
        return (f"{type}:{source}->{node}" for type in CELL_TYPES for source, node in self.space.edges)

    def locate(self, edge: str) -> tuple[str, int]:
        """Cell type and position of a named edge. Raises ValueError if there is none of that name."""
        names = list(self.edges())
        if edge not in names:
            raise ValueError(f"edge: expected one of {names[0]} ... {names[-1]}, got {edge!r}")
        cell_type, position = divmod(names.index(edge), len(self.space.edges))
        return CELL_TYPES[cell_type], position

    def active(self, cell_type: str) -> Tensor:
        """Which edges of a cell type are left: bool [edges]."""
        return self.get_buffer(f"active_{cell_type}")

    def live_edges(self) -> list[str]:
        """The names of the edges that are left."""
        flags = torch.cat([self.active(type) for type in CELL_TYPES]).tolist()
        return [edge for edge, live in zip(self.edges(), flags, strict=True) if live]

    def mixed_edges(self, edge: str) -> list[FusedMixedEdge]:
        """The modules of a named edge, one per cell of its type."""
        cell_type, position = self.locate(edge)
        return [cell.mixed_edge(position) for cell in self._cells() if cell.cell_type == cell_type]

    def remove_edge(self, edge: str) -> None:
        """Remove an edge for good from all cells of its type: its candidates are gone and take no memory or time."""
        cell_type, position = self.locate(edge)
        for mixed_edge in self.mixed_edges(edge):
            mixed_edge.remove()
        self.active(cell_type)[position] = False

    def gates(self, cell_type: str) -> Tensor:
        """sigmoid(mask) [edges] of a cell type, detached; ones if the supernet has no masks."""
        if not self.mask:
            return torch.ones(len(self.space.edges))
        return self.mask[cell_type].detach().sigmoid()

    def gate_sum(self) -> Tensor:
        """L_prune: the sum of the gates sigmoid(m) of all edges that are left (a scalar that carries gradients)."""
        live = [torch.where(self.active(type), self.mask[type].sigmoid(), 0.0).sum() for type in self.mask]
        return torch.stack(live).sum() if live else self.classifier.weight.new_zeros(())
