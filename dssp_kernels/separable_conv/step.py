"""SeparableStep: what a candidate's depthwise and pointwise convolution are when they run as one."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dssp_kernels.depthwise_conv.arguments import has_channels_last
from dssp_kernels.separable_conv.op import SeparableConvolution


@dataclass(eq=False)
class SeparableStep:
    """x -> pointwise(depthwise(relu(x) if relu else x)) in one kernel, see separable_conv2d(): a step of a body.

    Its type tells a FusedMixedEdge that it may run with the others on the edge, see separable_conv2d_group().

    Args:
        depthwise, pointwise: the modules whose weights and geometry these are, without biases; nobody calls them.
        relu: whether x passes through a ReLU first.
        channels_last_only: x of another layout goes through the modules instead.
    """

    depthwise: nn.Conv2d
    pointwise: nn.Conv2d
    relu: bool
    channels_last_only: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.takes(x):
            return self.convolution()(x)
        return self.pointwise(self.depthwise(F.relu(x) if self.relu else x))

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel runs on this x."""
        return not self.channels_last_only or has_channels_last(x)

    def convolution(self) -> SeparableConvolution:
        """The weights as they are now, and the geometry."""
        conv = self.depthwise
        return SeparableConvolution(
            conv.weight,
            self.pointwise.weight,
            conv.stride,
            conv.padding,  # type: ignore[arg-type]  # never a word here: who made the step has seen to that
            conv.dilation,
            self.relu,
        )
