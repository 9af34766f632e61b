"""The derived network: what a genotype stands for, built from discrete operations only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dssp.genotype import Genotype
from dssp.spaces.darts import CellSpace
from dssp.spaces.operations import FactorizedReduce, ReLUConvBN, build_operation

STEM_MULTIPLIER = 3


class DerivedCell(nn.Module):
    """One cell of a derived network: each node sums its edges, the output concatenates the nodes.

    forward(s0, s1): the outputs of the two cells before -> [B, len(concat) * channels, H', W'], where H' and W' are
    halved in a reduction cell.
    """

    def __init__(
        self,
        nodes: tuple[tuple[tuple[str, int], ...], ...],
        concat: tuple[int, ...],
        *,
        c_before_previous: int,
        c_previous: int,
        channels: int,
        reduction: bool,
        previous_reduction: bool,
    ) -> None:
        super().__init__()
        self.preprocess0 = (
            FactorizedReduce(c_before_previous, channels)
            if previous_reduction
            else ReLUConvBN(c_before_previous, channels, 1, 1, 0)
        )
        self.preprocess1 = ReLUConvBN(c_previous, channels, 1, 1, 0)
        self.sources = [[source for _, source in node] for node in nodes]
        self.concat = concat
        self._ops = nn.ModuleList(
            build_operation(name, channels, stride=2 if reduction and source < 2 else 1)
            for node in nodes
            for name, source in node
        )

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        operations = iter(self._ops)
        for sources in self.sources:
            first, *others = [next(operations)(states[source]) for source in sources]
            states.append(sum(others, start=first))
        return torch.cat([states[state] for state in self.concat], dim=1)


class DerivedNetwork(nn.Module):
    """DARTS' evaluation network (NetworkCIFAR) for a genotype; module names and state_dict keys are theirs.

    A 3x3 stem, `cells` cells with reduction cells at 1/3 and 2/3 of the depth, global average pooling, one linear
    layer. `channels` is the width of the first cells; each reduction doubles it.

    forward(images [B, image_channels, H, W]) -> logits [B, classes].
    Raises ValueError if the genotype names an operation that does not exist, or a size is below 1.
    """

    def __init__(self, genotype: Genotype, *, channels: int, cells: int, classes: int, image_channels: int = 3) -> None:
        super().__init__()
        sizes = {"channels": channels, "cells": cells, "classes": classes, "image_channels": image_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        c_previous = STEM_MULTIPLIER * channels
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, c_previous, 3, padding=1, bias=False), nn.BatchNorm2d(c_previous)
        )
        self.cells = nn.ModuleList()
        c_before_previous, previous_reduction = c_previous, False
        for position in range(cells):
            reduction = position in CellSpace.reduction_cells(cells)
            channels *= 2 if reduction else 1
            concat = genotype.reduce_concat if reduction else genotype.normal_concat
            self.cells.append(
                DerivedCell(
                    genotype.reduce if reduction else genotype.normal,
                    concat,
                    c_before_previous=c_before_previous,
                    c_previous=c_previous,
                    channels=channels,
                    reduction=reduction,
                    previous_reduction=previous_reduction,
                )
            )
            c_before_previous, c_previous = c_previous, len(concat) * channels
            previous_reduction = reduction
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_previous, classes)

    def forward(self, images: Tensor) -> Tensor:
        s0 = s1 = self.stem(images)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1)
        return self.classifier(self.global_pooling(s1).flatten(1))
