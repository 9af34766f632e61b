"""separable_conv2d in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dssp_kernels.depthwise_conv.reference import depthwise_conv2d_reference


def separable_conv2d_reference(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    """y = conv2d(conv2d(relu(x) if relu else x, depthwise, groups=C), pointwise).

    x: [B, C, H, W]; depthwise: [C, 1, kh, kw]; pointwise: [C_out, C, 1, 1]; y: [B, C_out, H', W'].
    """
    return F.conv2d(depthwise_conv2d_reference(x, depthwise, stride, padding, dilation, relu), pointwise)
