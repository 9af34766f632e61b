"""DepthwiseConv2d: nn.Conv2d with one filter per channel and the leading ReLU inside."""

from __future__ import annotations

from torch import Tensor, nn

from dssp_kernels.depthwise_conv.op import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """conv2d(relu(x) if relu else x, weight, groups=channels) without bias, in one kernel.

    A drop-in for ``nn.Conv2d(channels, channels, ..., groups=channels, bias=False)``: same weight, initialisation,
    state_dict key and numbers, and for the ``nn.ReLU`` before it.

    Args:
        channels: C; x is [B, C, H, W].
        kernel_size, stride, padding, dilation: an integer or a pair (rows, columns).
        relu: whether x passes through a ReLU first.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        relu: bool = False,
    ) -> None:
        super().__init__(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W'], see depthwise_conv2d()."""
        return depthwise_conv2d(
            input,
            self.weight,
            stride=self.stride,
            padding=self.padding,  # type: ignore[arg-type]  # nn.Conv2d also takes a word here, we do not
            dilation=self.dilation,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"{super().extra_repr()}, relu={self.relu}"
