"""The networks of a search space: what all of them share, and the derived one, built from discrete operations only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dssp import genotype as genotypes
from dssp.genotype import AnyGenotype
from dssp.spaces import CellSpace
from dssp.spaces.cell_output import CellOutput
from dssp.spaces.operations import Identity, build_operation
from dssp.spaces.skeleton import STEMS, BuildEdges, Cell, Edges, Tap
from dssp_kernels.folding import is_watched


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
        stem: str = "cifar",
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "cells": cells, "classes": classes, "image_channels": image_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        if stem not in STEMS:
            raise ValueError(f"stem: got {stem!r}, expected one of {', '.join(STEMS)}")
        skeleton = space.skeleton(
            edges, channels=channels, cells=cells, image_channels=image_channels, affine=affine, stem=stem
        )
        self.cell_types = space.types(cells)
        self._inputs, self.tap = skeleton.inputs, skeleton.tap
        self._stems = tuple(skeleton.stems)
        for name, module in skeleton.stems.items():
            self.add_module(name, module)
        self.cells = nn.ModuleList(skeleton.cells)
        self.lastact = skeleton.last
        self.classifier = nn.Linear(skeleton.channels, classes)

    def logits(self, images: Tensor, architecture: Mapping[str, tuple[Any, ...]]) -> Tensor:
        """[B, image_channels, H, W] -> [B, classes]; `architecture` holds per cell type what its edges are given."""
        return self.classify(self.features(images, architecture)[0])

    def features(
        self, images: Tensor, architecture: Mapping[str, tuple[Any, ...]], *, tap: Tap | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the last cell puts out, and beside it what the cell of `tap` does."""
        outputs, tapped = self._stem_outputs(images), None
        for position, cell in enumerate(self.cells):
            readers = self._readers(position)
            if _puts_out(cell):
                output = cell.put_out(*outputs, architecture=architecture.get(cell.cell_type, ()), readers=readers)
            else:
                of_type = {"architecture": architecture.get(cell.cell_type, ())} if isinstance(cell, Cell) else {}
                output = CellOutput([cell(*(given.tensor for given in outputs), **of_type)], readers)
            outputs = [*outputs[1:], output]
            if tap is not None and position == tap.position:
                tapped = output.tensor
        return outputs[-1].tensor, tapped

    def _stem_outputs(self, images: Tensor) -> list[CellOutput]:
        """What the first cell takes; of fewer stems than that, the first one's state several times."""
        states: list[Tensor] = []
        for name in self._stems:
            states.append(self.get_submodule(name)(states[-1] if states else images))
        states = [states[0]] * (self._inputs - len(states)) + states
        outputs: list[CellOutput] = []
        for position, state in enumerate(states, -self._inputs):
            is_the_last_one = bool(outputs) and outputs[-1].tensor is state
            outputs.append(outputs[-1] if is_the_last_one else CellOutput([state]))
            outputs[-1].readers += self._readers(position)
        return outputs

    def _readers(self, position: int) -> list[nn.Module]:
        """What the output of the cell at a position goes through in the next ones; stems are at negative positions."""
        readers = []
        for reading in range(max(position + 1, 0), min(position + self._inputs + 1, len(self.cells))):
            cell = self.cells[reading]
            preparations = cell.preparations() if _puts_out(cell) else None
            if preparations is not None:
                readers.append(preparations[position + self._inputs - reading])
        return readers

    def classify(self, features: Tensor) -> Tensor:
        """The logits of what the last cell puts out."""
        return self.classifier(self.lastact(features).mean((2, 3)))


def _puts_out(module: nn.Module) -> TypeGuard[Cell]:
    """Whether it is a cell with a Cell's forward(), and nobody is watching: who does expects it to be called."""
    is_usual = isinstance(module, Cell) and type(module).forward is Cell.forward
    return is_usual and not (is_watched(module) or _has_any_global_hook())


class DropPath:
    """Leaves operations out at random in training (FractalNet, arXiv:1605.07648), each image for itself:

        y[b] = x[b] * z[b] / (1 - p)          z[b] = 1 with probability 1 - p, else 0

    `probability` is p in [0, 1); `generator` what z is drawn from, on the device of the network (None: torch's own).
    `share` (r, n): the images are part r of n of a batch, and get what they would get in the whole of it.
    """

    def __init__(self) -> None:
        self.probability = 0.0
        self.share = (0, 1)
        self.generator: torch.Generator | None = None

    def scales(self, operations: int, like: Tensor) -> Tensor:
        """z / (1 - p) for so many operations on a batch as large as that of `like`: [operations, B, 1, 1, 1]."""
        keep, (part, parts), images = 1.0 - self.probability, self.share, like.shape[0]
        drawn = like.new_empty((operations, parts * images, 1, 1, 1)).bernoulli_(keep, generator=self.generator)
        return drawn[:, part * images : (part + 1) * images].div_(keep)


class DerivedEdges(Edges):
    """One operation per edge; a node sums its edges, with `shortcuts` all but the first also the state before them.

    nodes: per node its edges (operation, source state); concat: the states that are the cell's output. A node without
    edges is zero, and has the size of the cell's inputs. `drop_path` acts on all operations but the skip connection of
    stride 1, as in DARTS.
    """

    def __init__(
        self,
        nodes: genotypes.Cell,
        concat: tuple[int, ...],
        *,
        inputs: int,
        channels: int,
        stride: int,
        c_in: int | None = None,
        shortcuts: bool = False,
        drop_path: DropPath | None = None,
    ) -> None:
        super().__init__(
            build_operation(name, channels, *((stride, True, c_in) if source < inputs else (1,)))
            for node in nodes
            for name, source in node
        )
        self.sources = [[source for _, source in node] for node in nodes]
        self.concat = concat
        self.shortcuts = shortcuts
        self.drop_path = drop_path or DropPath()

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        dropping = self.training and self.drop_path.probability > 0
        scales = [*self.drop_path.scales(len(self), inputs[0])] if dropping else [None] * len(self)
        if self.shortcuts:  # the first node has none, and nothing else to give
            scales[: len(self.sources[0])] = [None] * len(self.sources[0])
        states, operations = list(inputs), zip(self, scales, strict=True)
        for sources in self.sources:
            terms = [_scaled(*next(operations), states[source]) for source in sources]
            if self.shortcuts and len(states) > len(inputs):
                terms.append(states[-1])
            states.append(sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(inputs[0]))
        return states


def _scaled(operation: nn.Module, scale: Tensor | None, x: Tensor) -> Tensor:
    y = operation(x)
    return y if scale is None or isinstance(operation, Identity) else y * scale


class DerivedNetwork(CellNetwork):
    """The network of a genotype, in the macro skeleton of its space; all norms affine.

    In the DARTS space this is its NetworkCIFAR, module names and state_dict keys included; in NAS-Bench-201, with 16
    channels and 5 cells, the network that was trained for the benchmark. `channels` is the width of the first cells,
    `cells` counts what the space counts (DARTS: all cells, NAS-Bench-201: those of one stage).

    forward(images [B, image_channels, H, W]) -> logits [B, classes]; in training mode, and with `auxiliary`, the
    (logits, logits of the auxiliary head), as in DARTS. `drop_path` is what all cells drop operations by.
    Raises ValueError if the genotype has other cells than the space, names an operation that does not exist, a size is
    below 1, or the space has no place for an auxiliary head.
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
        stem: str = "cifar",
        auxiliary: bool = False,
    ) -> None:
        if genotype.cells.keys() != set(space.types(cells)):
            expected, got = " and ".join(space.types(cells)), " and ".join(genotype.cells)
            raise ValueError(f"genotype: space {space.name} has cells {expected}, got {got}")
        drop_path = DropPath()

        def edges(cell_type: str, channels: int, stride: int = 1, c_in: int | None = None) -> DerivedEdges:
            nodes, concat = genotype.cells[cell_type]
            return DerivedEdges(
                nodes,
                concat,
                inputs=space.inputs,
                channels=channels,
                stride=stride,
                c_in=c_in,
                shortcuts=space.shortcuts,
                drop_path=drop_path,
            )

        super().__init__(
            space,
            edges,
            channels=channels,
            cells=cells,
            classes=classes,
            image_channels=image_channels,
            affine=True,
            stem=stem,
        )

        self.drop_path = drop_path
        self.auxiliary_head = None
        if auxiliary:  # last, so that the other weights start as they do without it
            if self.tap is None:
                raise ValueError(f"auxiliary: space {space.name} has no place for an auxiliary head")
            self.auxiliary_head = self.tap.head(self.tap.channels, classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.auxiliary_head is None or not self.training:
            return self.logits(images, {})
        features, tapped = self.features(images, {}, tap=self.tap)
        return self.classify(features), self.auxiliary_head(tapped)
