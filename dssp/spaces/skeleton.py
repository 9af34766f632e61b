"""What a space is built of besides its operations: cells around interchangeable edges, and the macro skeleton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Edges(nn.ModuleList):
    """The edges inside one cell: mixtures of candidates in a supernet, single operations in a derived network.

    forward(inputs, *architecture) -> the cell's states, its inputs first. `concat` numbers those that are its output.
    """

    concat: tuple[int, ...]


class BuildEdges(Protocol):
    """Edges for one cell of a type; those that leave the cell's inputs have this stride."""

    def __call__(self, cell_type: str, channels: int, stride: int = 1) -> Edges: ...


class Cell(nn.Module):
    """A cell: its inputs, prepared, its edges (in ``_ops``, as in DARTS), and some of the states between as its output.

    forward(*inputs) -> [B, len(concat) * channels, H', W']: the concatenation of the states in `concat`.
    """

    _ops: Edges

    def __init__(self, cell_type: str) -> None:
        super().__init__()
        self.cell_type = cell_type

    def prepare(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The first states of the cell: what came in, unless a subclass brings it to the cell's width first."""
        return inputs

    def forward(self, *inputs: Tensor, architecture: tuple[Any, ...] = ()) -> Tensor:
        states = self._ops(self.prepare(*inputs), *architecture)
        outputs = [states[state] for state in self._ops.concat]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class Tap:
    """The cell whose output an auxiliary head reads: its position, its channels, and how often H and W were halved."""

    position: int
    channels: int
    halvings: int


@dataclass(frozen=True)
class Skeleton:
    """A macro skeleton, built: images -> stem -> cells -> last -> global average pooling -> a linear layer.

    stem      [B, image_channels, H, W] -> the first state.
    cells     Cells and blocks without edges; each takes the `inputs` states before it (at first all the stem's).
    last      what follows the last cell.
    channels  what the linear layer gets.
    tap       where an auxiliary head goes, if anywhere.
    """

    stem: nn.Module
    cells: Sequence[nn.Module]
    last: nn.Module
    channels: int
    inputs: int = 1
    tap: Tap | None = None


class BuildSkeleton(Protocol):
    """Builds a macro skeleton; `cells` counts what the space lets it count, `affine` is for the norms in cells."""

    def __call__(
        self, edges: BuildEdges, *, channels: int, cells: int, image_channels: int, affine: bool
    ) -> Skeleton: ...
