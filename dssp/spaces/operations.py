"""The candidate operations: DARTS' and NAS-Bench-201's, module for module and key for key as in theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dssp.spaces.relu_diagonals import relu_diagonals
from dssp_kernels import DepthwiseConv2d, SeparableStep, relu_pointwise_norms
from dssp_kernels.folding import is_watched
from dssp_kernels.pointwise_batch_norm.step import runs_as_one

BodyAndNorm = tuple[Sequence[Callable[[Tensor], Tensor]], nn.Module]
"""What an operation does before its last BatchNorm2d, and that: what dssp_kernels.folding asks for."""


class ReLUConvBN(nn.Module):
    """BatchNorm(conv(relu(x))): [B, c_in, H, W] -> [B, c_out, H', W']."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c_in, c_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(c_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) if is_watched(self.op) else self.read_together([self], [x])[0]

    def reads_maps(self, maps: Sequence[Tensor]) -> bool:
        """Whether a kernel computes forward(cat(maps, dim=1)) from the maps themselves, and nobody watches."""
        return not (is_watched(self) or is_watched(self.op)) and runs_as_one(self._stage(), maps)

    @staticmethod
    def read_together(readers: Sequence[ReLUConvBN], maps: Sequence[Tensor]) -> list[Tensor]:
        """What each of them makes of cat(maps, dim=1)."""
        return relu_pointwise_norms([reader._stage() for reader in readers], maps)

    def _stage(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        relu, conv, norm = _members(self.op)
        return relu, conv, norm

    def body_and_norm(self) -> BodyAndNorm:
        *body, norm = _members(self.op)
        return body, norm


def _members(sequence: nn.Sequential) -> list[nn.Module]:
    """list(sequence), ten times as fast: it is asked for several times per candidate and step."""
    return list(sequence._modules.values())


def _separable(depthwise: nn.Module, pointwise: nn.Module) -> SeparableStep:
    assert isinstance(depthwise, DepthwiseConv2d) and isinstance(pointwise, nn.Conv2d)
    return SeparableStep(depthwise, pointwise, depthwise.relu)


class DilConv(nn.Module):
    """ReLU, dilated depthwise convolution and pointwise convolution (in one kernel), BatchNorm."""

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, stride: int, padding: int, dilation: int, affine: bool = True
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.Identity(),  # where DARTS has the ReLU: the state_dict keys stay those of DARTS
            DepthwiseConv2d(c_in, kernel_size, stride, padding, dilation, relu=True),
            nn.Conv2d(c_in, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        _, depthwise, pointwise, norm = _members(self.op)
        return norm(_separable(depthwise, pointwise)(x))

    def body_and_norm(self) -> BodyAndNorm:
        _, depthwise, pointwise, norm = _members(self.op)
        return [_separable(depthwise, pointwise)], norm


class SepConv(nn.Module):
    """ReLU, depthwise, pointwise (in one kernel), BatchNorm, twice; only the first depthwise convolution strides."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.Identity(),
            DepthwiseConv2d(c_in, kernel_size, stride, padding, relu=True),
            nn.Conv2d(c_in, c_in, 1, bias=False),
            nn.BatchNorm2d(c_in, affine=affine),
            nn.Identity(),
            DepthwiseConv2d(c_in, kernel_size, 1, padding, relu=True),
            nn.Conv2d(c_in, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        (first, inner, second), norm = self.body_and_norm()
        return norm(second(inner(first(x))))

    def body_and_norm(self) -> BodyAndNorm:
        members = _members(self.op)
        return [_separable(*members[1:3]), members[3], _separable(*members[5:7])], members[7]


class Identity(nn.Identity):
    """The skip connection of stride 1."""


class Zero(nn.Module):
    """The candidate `none`. Returns None, which every mix takes for a tensor of zeros that need not exist."""

    def forward(self, x: Tensor) -> None:
        return None


class FactorizedReduce(nn.Module):
    """Halves H and W: two pointwise convolutions of stride 2, the second one pixel off, side by side, then BatchNorm.

    H and W that are odd round up: the shifted half is padded with one row or column of zeros (DARTS fails there).
    """

    # The pixels are picked before the convolutions, not by their stride: in channels_last the gradient of a strided 1x1
    # convolution with fewer input channels than a vector holds writes out of bounds (oneDNN issue 6035).

    def __init__(self, c_in: int, c_out: int, affine: bool = True) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out - c_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self._halves(relu_diagonals(x)))

    def body_and_norm(self) -> BodyAndNorm:
        return [relu_diagonals, self._halves], self.bn

    def _halves(self, diagonals: Tensor) -> Tensor:
        even, odd = diagonals.chunk(2, dim=1)
        return torch.cat([self.conv_1(even), self.conv_2(odd)], dim=1)


def _skip_connect(c_in: int, c_out: int, stride: int, affine: bool) -> nn.Module:
    return Identity() if stride == 1 else FactorizedReduce(c_in, c_out, affine)


OPERATIONS: dict[str, Callable[[int, int, int, bool], nn.Module]] = {
    "none": lambda c_in, c_out, stride, affine: Zero(),
    "max_pool_3x3": lambda c_in, c_out, stride, affine: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda c_in, c_out, stride, affine: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    "skip_connect": _skip_connect,
    "sep_conv_3x3": lambda c_in, c_out, stride, affine: SepConv(c_in, c_out, 3, stride, 1, affine),
    "sep_conv_5x5": lambda c_in, c_out, stride, affine: SepConv(c_in, c_out, 5, stride, 2, affine),
    "dil_conv_3x3": lambda c_in, c_out, stride, affine: DilConv(c_in, c_out, 3, stride, 2, 2, affine),
    "dil_conv_5x5": lambda c_in, c_out, stride, affine: DilConv(c_in, c_out, 5, stride, 4, 2, affine),
    "nor_conv_1x1": lambda c_in, c_out, stride, affine: ReLUConvBN(c_in, c_out, 1, stride, 0, affine),
    "nor_conv_3x3": lambda c_in, c_out, stride, affine: ReLUConvBN(c_in, c_out, 3, stride, 1, affine),
}
"""(c_in, c_out, stride, affine) -> the operation as a derived network holds it: [B, c_in, H, W] to [B, c_out, H', W'].

DARTS' PRIMITIVES in their order first. Add your own under a name of its own, and that name to a space's `operations`.
c_in and c_out differ only in spaces whose cells say so; pools and `skip_connect` of stride 1 cannot change the width.
"""


def build_operation(name: str, channels: int, stride: int, affine: bool = True, c_in: int | None = None) -> nn.Module:
    """The operation as a derived network holds it: affine BatchNorm, pools without BatchNorm.

    It gives `channels`, and takes as many unless c_in says otherwise. Raises ValueError if `name` is none of
    OPERATIONS.
    """
    if name not in OPERATIONS:
        raise ValueError(f"operation: got {name!r}, expected one of {', '.join(OPERATIONS)}")
    return OPERATIONS[name](channels if c_in is None else c_in, channels, stride, affine)


def build_candidate(
    name: str, channels: int, stride: int, *, c_in: int | None = None, norms_after_pools: bool = True
) -> nn.Module:
    """The operation as a supernet holds it: BatchNorm without parameters, and one after each pool (DARTS' MixedOp).

    Raises ValueError if `name` is none of OPERATIONS.
    """
    operation = build_operation(name, channels, stride, affine=False, c_in=c_in)
    if norms_after_pools and "pool" in name:
        return nn.Sequential(operation, nn.BatchNorm2d(channels, affine=False))
    return operation
