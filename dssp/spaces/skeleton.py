"""What a space is built of besides its operations: cells around interchangeable edges, and the macro skeleton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dssp.spaces.auxiliary import AuxiliaryHead
from dssp.spaces.cell_output import CellOutput

STEMS = ("cifar", "imagenet")
"""How images enter: as large as they are, or made smaller at once, as the papers do with images of 224x224."""


class Edges(nn.ModuleList):
    """The edges inside one cell: mixtures of candidates in a supernet, single operations in a derived network.

    forward(inputs, *architecture) -> the cell's states, its inputs first. `concat` numbers those that are its output.
    """

    concat: tuple[int, ...]


class BuildEdges(Protocol):
    """Edges for one cell of a type. Those that leave the cell's inputs have this stride, and take c_in channels."""

    def __call__(self, cell_type: str, channels: int, stride: int = 1, c_in: int | None = None) -> Edges: ...


class Cell(nn.Module):
    """A cell: its inputs, prepared, its edges (in ``_ops``, as in DARTS), and some of the states between as its output.

    forward(*inputs) -> [B, len(concat) * channels, H', W']: the concatenation of the states in `concat`.
    put_out(*inputs) is the same where nobody needs the tensors: what it takes and returns are CellOutputs.
    """

    _ops: Edges

    def __init__(self, cell_type: str) -> None:
        super().__init__()
        self.cell_type = cell_type

    def preparations(self) -> Sequence[nn.Module] | None:
        """What the inputs go through first, one module each; None: the cell takes them as they are."""
        return None

    def forward(self, *inputs: Tensor, architecture: tuple[Any, ...] = ()) -> Tensor:
        return self.put_out(*(CellOutput([x]) for x in inputs), architecture=architecture).tensor

    def put_out(
        self, *inputs: CellOutput, architecture: tuple[Any, ...] = (), readers: Sequence[nn.Module] = ()
    ) -> CellOutput:
        """forward() of the inputs; `readers` are the modules that its result will go through."""
        preparations = self.preparations()
        if preparations is None:
            first = [given.tensor for given in inputs]
        else:
            first = [given.read_by(module) for given, module in zip(inputs, preparations, strict=True)]
        states = self._ops(first, *architecture)
        return CellOutput([states[state] for state in self._ops.concat], readers)


@dataclass(frozen=True)
class Tap:
    """The cell whose output an auxiliary head reads: position, channels, how often H and W were halved; the head."""

    position: int
    channels: int
    halvings: int
    head: type[AuxiliaryHead]


@dataclass(frozen=True)
class Skeleton:
    """A macro skeleton, built: images -> stem -> cells -> last -> global average pooling -> a linear layer.

    stems     by their names in the network: the images through the first give a state, that through the next another.
    cells     Cells and blocks without edges; each takes the `inputs` states before it (at first the stems').
    last      what follows the last cell.
    channels  what the linear layer gets.
    tap       where an auxiliary head goes, if anywhere.
    """

    stems: Mapping[str, nn.Module]
    cells: Sequence[nn.Module]
    last: nn.Module
    channels: int
    inputs: int = 1
    tap: Tap | None = None


class BuildSkeleton(Protocol):
    """Builds a macro skeleton; `cells` counts what the space lets it count, `affine` is for the norms in cells.

    `stem` is one of STEMS. Raises ValueError for one that the space does not have.
    """

    def __call__(
        self, edges: BuildEdges, *, channels: int, cells: int, image_channels: int, affine: bool, stem: str
    ) -> Skeleton: ...
