"""depthwise_conv2d in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], relu: bool
) -> Tensor:
    """y = conv2d(relu(x) if relu else x, weight, groups=C).

    x: [B, C, H, W]; weight: [C, 1, kh, kw]; y: [B, C, H', W'].
    """
    return F.conv2d(F.relu(x) if relu else x, weight, None, tuple(stride), tuple(padding), tuple(dilation), x.shape[1])
