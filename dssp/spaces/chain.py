"""The chain space: stages of inverted bottlenecks, each layer a decision of its own, and so is the number of layers."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from dssp.chain_genotype import EXPANSIONS, KERNELS, OPERATIONS, STAGES, ChainGenotype
from dssp.spaces import operations
from dssp.spaces.cell_space import CellSpace
from dssp.spaces.operations import BodyAndNorm
from dssp.spaces.skeleton import BuildEdges, Cell, Skeleton
from dssp_kernels import DepthwiseConv2d

# MobileNetV2's stages 2 to 7 (arXiv:1801.04381, table 2): widths in halves of the first's, 16 there, and strides.
WIDTHS = (3, 4, 8, 12, 20, 40)
STRIDES = (2, 2, 2, 1, 2, 1)
LAST = 4  # MobileNetV2 classifies 1280 channels, four times those of its last stage


class InvertedBottleneck(nn.Module):
    """MobileNetV2's block without its shortcut: [B, c_in, H, W] -> [B, c_out, H', W'], not activated.

    A pointwise convolution to `expansion` times the channels (none where that is 1), a depthwise one, and a pointwise
    one down to c_out, a BatchNorm after each. ReLU, as in FBNet, where MobileNetV2 has ReLU6: the depthwise kernel has
    it inside.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, stride: int, expansion: int, affine: bool = True
    ) -> None:
        super().__init__()
        hidden = expansion * c_in
        expand = [nn.Conv2d(c_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden, affine=affine)]
        self.op = nn.Sequential(
            *(expand if expansion > 1 else []),
            DepthwiseConv2d(hidden, kernel_size, stride, kernel_size // 2, relu=expansion > 1),
            nn.BatchNorm2d(hidden, affine=affine),
            nn.ReLU(),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)

    def body_and_norm(self) -> BodyAndNorm:
        *body, norm = self.op
        return body, norm


def _build(kernel_size: int, expansion: int, c_in: int, c_out: int, stride: int, affine: bool) -> nn.Module:
    return InvertedBottleneck(c_in, c_out, kernel_size, stride, expansion, affine)


operations.OPERATIONS |= {f"mb_conv_{k}x{k}_e{e}": partial(_build, k, e) for e in EXPANSIONS for k in KERNELS}


class Stage(Cell):
    """The layers of one width. The first brings the state before to it; each of the others has a shortcut."""

    def __init__(self, edges: BuildEdges, cell_type: str, c_in: int, channels: int, stride: int) -> None:
        super().__init__(cell_type)
        self._ops = edges(cell_type, channels, stride, c_in)


def chain_skeleton(
    edges: BuildEdges, *, channels: int, cells: int, image_channels: int, affine: bool, stem: str
) -> Skeleton:
    """MobileNetV2 with the first `cells` of its stages searched: stem, a fixed bottleneck of `channels`, the stages.

    The cifar stem leaves images and first stage as large as they are (strides 1), imagenet halves both, as the paper
    does. Raises ValueError for more stages than MobileNetV2 has.
    """
    if cells > STAGES:
        raise ValueError(f"cells: the chain has up to {STAGES} stages, got {cells}")
    first = 2 if stem == "imagenet" else 1
    strides = (first, *STRIDES[1:])
    entry = nn.Sequential(
        nn.Conv2d(image_channels, 2 * channels, 3, stride=first, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        InvertedBottleneck(2 * channels, channels, 3, 1, 1),
    )
    widths = [channels, *(channels * width // 2 for width in WIDTHS[:cells])]
    built = [Stage(edges, f"stage{i + 1}", widths[i], widths[i + 1], strides[i]) for i in range(cells)]
    last = nn.Sequential(
        nn.Conv2d(widths[-1], LAST * widths[-1], 1, bias=False), nn.BatchNorm2d(LAST * widths[-1]), nn.ReLU()
    )
    return Skeleton({"stem": entry}, built, last, LAST * widths[-1])


CHAIN = CellSpace(
    name="chain",
    operations=OPERATIONS,
    cell_types=None,
    inputs=1,
    nodes=3,
    fan_in=1,
    shortcuts=True,
    output_nodes=1,
    skeleton=chain_skeleton,
    genotype=ChainGenotype,
    derives_none=True,
)
"""Stages are its cells, layers their nodes: one edge into each, and beside all but the first a fixed shortcut."""
