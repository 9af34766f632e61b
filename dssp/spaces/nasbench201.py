"""The space of NAS-Bench-201 (Dong and Yang 2020, arXiv:2001.00326): one cell of six edges, three stages of it."""

from __future__ import annotations

from torch import Tensor, nn

from dssp.arch_genotype import NODES, OPERATIONS, ArchGenotype
from dssp.spaces.cell_space import CellSpace
from dssp.spaces.operations import ReLUConvBN
from dssp.spaces.skeleton import BuildEdges, Cell, Skeleton


class Nasbench201Cell(Cell):
    """A cell that takes the output of the block before as it is; its output is its last node."""

    def __init__(self, edges: BuildEdges, channels: int) -> None:
        super().__init__("normal")
        self._ops = edges(self.cell_type, channels)


class ResidualBlock(nn.Module):
    """Between two stages: [B, c, H, W] -> [B, 2c, H/2, W/2], module names as in the benchmark's ResNetBasicblock.

    Two ReLU-conv3x3-BN, the first of stride 2, beside an average pool and a 1x1 convolution. Odd H and W round up.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(channels, 2 * channels, 3, 2, 1)
        self.conv_b = ReLUConvBN(2 * channels, 2 * channels, 3, 1, 1)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(channels, 2 * channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


def nasbench201_skeleton(
    edges: BuildEdges, *, channels: int, cells: int, image_channels: int, affine: bool, stem: str
) -> Skeleton:
    """Three stages of `cells` cells (the paper's N), residual blocks between; `affine` is for the cells' norms.

    Raises ValueError for another stem than cifar.
    """
    if stem != "cifar":
        raise ValueError(f"stem: space nasbench201 has cifar only, got {stem}")
    entry = nn.Sequential(nn.Conv2d(image_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    built: list[nn.Module] = []
    for stage in range(3):
        if stage > 0:
            built.append(ResidualBlock(channels))
            channels *= 2
        built += [Nasbench201Cell(edges, channels) for _ in range(cells)]
    return Skeleton({"stem": entry}, built, nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()), channels)


NASBENCH201 = CellSpace(
    name="nasbench201",
    operations=OPERATIONS,
    cell_types=("normal",),
    inputs=1,
    nodes=NODES,
    output_nodes=1,
    skeleton=nasbench201_skeleton,
    genotype=ArchGenotype,
    derives_none=True,
    norms_after_pools=False,
)
