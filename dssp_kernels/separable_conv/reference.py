"""separable_conv2d, and the norm of a SeparablePair, in plain PyTorch: the oracle.

Any device, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dssp_kernels.depthwise_conv.reference import depthwise_conv2d_reference
from dssp_kernels.pool_batch_norm.reference import batch_norm_with_statistics


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


def batch_norm_reference(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """batch_norm(z) by the statistics of the batch, and these, without gradients, [C] in float32 at least.

    They are the mean, the unbiased variance and 1 / sqrt(biased variance + eps).
    """
    y, mean, variance = batch_norm_with_statistics(z, eps)
    count = z.numel() // z.shape[1]
    return y, mean, variance, (variance * ((count - 1) / count) + eps).rsqrt()
