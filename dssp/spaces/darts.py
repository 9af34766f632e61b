"""The space of DARTS: normal and reduction cells of two inputs, every node fed by all states before it."""

from __future__ import annotations

from torch import nn

from dssp.genotype import Genotype
from dssp.spaces.auxiliary import AuxiliaryHead, AuxiliaryHeadImageNet
from dssp.spaces.cell_space import CellSpace
from dssp.spaces.operations import FactorizedReduce, ReLUConvBN
from dssp.spaces.skeleton import BuildEdges, Cell, Skeleton, Tap

STEM_MULTIPLIER = 3


class DartsCell(Cell):
    """A cell that brings the outputs of the two cells before to its own width first; module names are DARTS'.

    A reduction cell halves H and W: its edges from the inputs have stride 2. Where the cell before is one, the older
    input is still twice as large and is reduced on its way in.
    """

    def __init__(
        self,
        edges: BuildEdges,
        *,
        c_before: int,
        c_previous: int,
        channels: int,
        reduction: bool,
        reduced_before: bool,
        affine: bool,
    ) -> None:
        super().__init__("reduce" if reduction else "normal")
        self.preprocess0 = (
            FactorizedReduce(c_before, channels, affine)
            if reduced_before
            else ReLUConvBN(c_before, channels, 1, 1, 0, affine)
        )
        self.preprocess1 = ReLUConvBN(c_previous, channels, 1, 1, 0, affine)
        self._ops = edges(self.cell_type, channels, stride=2 if reduction else 1)
        self.channels = len(self._ops.concat) * channels

    def preparations(self) -> tuple[nn.Module, nn.Module]:
        return self.preprocess0, self.preprocess1


def reduction_cells(cells: int) -> frozenset[int]:
    """Positions of the reduction cells in a network of `cells` cells: at 1/3 and 2/3 of its depth."""
    return frozenset({cells // 3, 2 * cells // 3})


def _cifar_stem(image_channels: int, channels: int) -> dict[str, nn.Module]:
    """As large as the images, three times the channels of the first cell."""
    width = STEM_MULTIPLIER * channels
    return {"stem": nn.Sequential(nn.Conv2d(image_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))}


def _imagenet_stems(image_channels: int, channels: int) -> dict[str, nn.Module]:
    """A quarter and an eighth of the images' height and width, odd ones rounded up: the first cell's two inputs."""
    half = max(channels // 2, 1)
    return {
        "stem0": nn.Sequential(
            nn.Conv2d(image_channels, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        ),
        "stem1": nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        ),
    }


def darts_skeleton(
    edges: BuildEdges, *, channels: int, cells: int, image_channels: int, affine: bool, stem: str
) -> Skeleton:
    """DARTS' NetworkCIFAR or NetworkImageNet: stem, `cells` cells in all; each reduction cell doubles the channels.

    An auxiliary head goes where DARTS has it, on the second reduction cell.
    """
    reduced_before = stem == "imagenet"
    stems = (_imagenet_stems if reduced_before else _cifar_stem)(image_channels, channels)
    c_before = c_previous = channels if reduced_before else STEM_MULTIPLIER * channels
    halvings, head = (3, AuxiliaryHeadImageNet) if reduced_before else (0, AuxiliaryHead)
    built: list[DartsCell] = []
    for position in range(cells):
        reduction = position in reduction_cells(cells)
        channels *= 2 if reduction else 1
        cell = DartsCell(
            edges,
            c_before=c_before,
            c_previous=c_previous,
            channels=channels,
            reduction=reduction,
            reduced_before=reduced_before,
            affine=affine,
        )
        built.append(cell)
        c_before, c_previous, reduced_before = c_previous, cell.channels, reduction
    reductions = reduction_cells(cells)
    tap = Tap(max(reductions), built[max(reductions)].channels, halvings + len(reductions), head)
    return Skeleton(stems, built, nn.Identity(), c_previous, inputs=2, tap=tap)


DARTS = CellSpace(
    name="darts",
    operations=(
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ),
    cell_types=("normal", "reduce"),
    inputs=2,
    nodes=4,
    skeleton=darts_skeleton,
    genotype=Genotype,
)
