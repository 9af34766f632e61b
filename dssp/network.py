"""The networks of a search space: what all of them share, and the derived one, built from discrete operations only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dssp.genotype import AnyGenotype, Cell
from dssp.spaces import CellSpace
from dssp.spaces import skeleton as skeletons
from dssp.spaces.operations import build_operation
from dssp.spaces.skeleton import BuildEdges, Edges


class CellNetwork(nn.Module):
    """The macro skeleton of a space around edges of any kind: stem, cells, global average pooling, a linear layer.

    Raises ValueError if a size is below 1.
    """

    def __init__(
        self,
        space: CellSpace,
        edges: BuildEdges,
        *,
        channels: int,
        cells: int,
        classes: int,
        image_channels: int,
        affine: bool,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "cells": cells, "classes": classes, "image_channels": image_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        skeleton = space.skeleton(edges, channels=channels, cells=cells, image_channels=image_channels, affine=affine)
        self._inputs = skeleton.inputs
        self.stem = skeleton.stem
        self.cells = nn.ModuleList(skeleton.cells)
        self.lastact = skeleton.last
        self.classifier = nn.Linear(skeleton.channels, classes)

    def logits(self, images: Tensor, architecture: Mapping[str, tuple[Any, ...]]) -> Tensor:
        """[B, image_channels, H, W] -> [B, classes]; `architecture` holds per cell type what its edges are given."""
        states = [self.stem(images)] * self._inputs
        for cell in self.cells:
            if isinstance(cell, skeletons.Cell):
                state = cell(*states, architecture=architecture.get(cell.cell_type, ()))
            else:
                state = cell(*states)
            states = [*states[1:], state]
        return self.classifier(self.lastact(states[-1]).mean((2, 3)))


class DerivedEdges(Edges):
    """One operation per edge; a node sums its edges.

    nodes: per node its edges (operation, source state); concat: the states that are the cell's output. A node without
    edges is zero, and has the size of the cell's inputs.
    """

    def __init__(self, nodes: Cell, concat: tuple[int, ...], *, inputs: int, channels: int, stride: int) -> None:
        super().__init__(
            build_operation(name, channels, stride if source < inputs else 1) for node in nodes for name, source in node
        )
        self.sources = [[source for _, source in node] for node in nodes]
        self.concat = concat

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        states, operations = list(inputs), iter(self)
        for sources in self.sources:
            terms = [next(operations)(states[source]) for source in sources]
            states.append(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(inputs[0]))
        return states


class DerivedNetwork(CellNetwork):
    """The network of a genotype, in the macro skeleton of its space; all norms affine.

    In the DARTS space this is its NetworkCIFAR, module names and state_dict keys included; in NAS-Bench-201, with 16
    channels and 5 cells, the network that was trained for the benchmark. `channels` is the width of the first cells,
    `cells` counts what the space counts (DARTS: all cells, NAS-Bench-201: those of one stage).

    forward(images [B, image_channels, H, W]) -> logits [B, classes].
    Raises ValueError if the genotype has other cells than the space, names an operation that does not exist, or a size
    is below 1.
    """

    def __init__(
        self,
        space: CellSpace,
        genotype: AnyGenotype,
        *,
        channels: int,
        cells: int,
        classes: int,
        image_channels: int = 3,
    ) -> None:
        if genotype.cells.keys() != set(space.cell_types):
            expected, got = " and ".join(space.cell_types), " and ".join(genotype.cells)
            raise ValueError(f"genotype: space {space.name} has cells {expected}, got {got}")

        def edges(cell_type: str, channels: int, stride: int = 1) -> DerivedEdges:
            nodes, concat = genotype.cells[cell_type]
            return DerivedEdges(nodes, concat, inputs=space.inputs, channels=channels, stride=stride)

        super().__init__(
            space,
            edges,
            channels=channels,
            cells=cells,
            classes=classes,
            image_channels=image_channels,
            affine=True,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images, {})
